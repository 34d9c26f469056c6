"""python tools/bench.py [loss] [attention] [step] [data] [seek] [tokenize] [memory] [checkpoint]

Measures one thing against another in one run, alternately, and prints the ratio of their medians. The machine's speed
varies; ratios taken together do not. `data` compares with litdata and MosaicML Streaming where they are installed
(pip install litdata mosaicml-streaming). `train` is tools/bench_train.py and `gpu` tools/bench_gpu.py, with the options
of those.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pretrain import dist, hardware
from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.engine.settings import deepspeed_config
from pretrain.model.attention import plain, sdpa
from pretrain.model.heads import LanguageModel
from pretrain.model.losses import loss_rows
from pretrain.model.output import Output
from pretrain.shards import manifest as manifests
from pretrain.shards.writer import DatasetWriter
from pretrain.stream.mixture import Phase
from pretrain.stream.objectives import causal_lm
from pretrain.stream.stream import Stream
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import load_tokenizer

ROUNDS = 7


def main(argv: list[str] | None = None) -> None:
    if sys.argv[1:2] in (["train"], ["gpu"]):
        sys.exit(subprocess.call([sys.executable, Path(__file__).with_name(f"bench_{sys.argv[1]}.py"), *sys.argv[2:]]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], *BENCHES], help="which to run (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1, a rank's on 2 cores)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    precision = hardware.resolve_precision("auto", torch.device("cpu"))
    for name in args.what or BENCHES:
        BENCHES[name](hardware.DTYPES[precision], precision)


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], names: tuple[str, str]) -> float:
    """Run both in turn, once to warm up and then `ROUNDS` times; returns the seconds of the first."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_number in range(ROUNDS + 1):
        for run, kept in zip((ours, theirs), seconds, strict=True):
            seconds_taken = seconds_of(run)
            if round_number:
                kept.append(seconds_taken)
    mine, other = (statistics.median(values) for values in seconds)
    print(f"{title}: {names[0]} {1e3 * mine:.1f} ms, {names[1]} {1e3 * other:.1f} ms, ratio {mine / other:.4f}")
    return mine


def bench_loss(dtype: torch.dtype, precision: str) -> None:
    """The output matrix, the loss and their gradients at the quickstart's micro-batch, against torch's."""
    output = Output(320, 24576, bias=False, softcap=0.0).to(dtype)
    hidden = torch.randn(4, 256, 320).to(dtype).requires_grad_()
    labels = torch.randint(0, 24576, (4, 256))

    def ours() -> None:
        output(hidden, labels).sum().backward()

    def torchs() -> None:
        F.cross_entropy(output(hidden).flatten(0, 1).float(), labels.flatten(), reduction="sum").backward()

    compare(f"logits, cross entropy and gradients ({precision})", ours, torchs, ("ours", "torch"))


def bench_attention(dtype: torch.dtype, precision: str) -> None:
    """The formula as written against the fused kernel, forward and backward, short and long."""
    for length in (256, 1024):
        q, k, v = (torch.randn(4, 4, length, 80).to(dtype).requires_grad_() for _ in range(3))
        runs = [lambda route=route, qkv=(q, k, v): route(*qkv, True, 0.0).sum().backward() for route in (plain, sdpa)]
        compare(f"attention over {length} tokens ({precision})", *runs, ("plain", "sdpa"))


def bench_step(dtype: torch.dtype, precision: str) -> None:
    """A step of the quickstart's model through the engine on one rank, against the bare forward and backward."""
    from pretrain.engine.engine import Engine  # not for `gpu`, which tells of a DeepSpeed that is broken

    cfg = compose.compose("pretrain", ["run.name=bench", "experiment=quickstart", "model.vocab_size=24576"])
    ranks, device = dist.ALONE, dist.start(dist.ALONE)
    micro, accumulation = cfg.train.micro_batch_size, 2
    settings = deepspeed_config(cfg.deepspeed, micro * accumulation, micro, accumulation, 1.0, precision)

    trainer = Engine(lambda: LanguageModel(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
    tokens = torch.randint(0, 24576, (micro, cfg.train.seq_len))
    parts = [{"inputs": tokens, "labels": tokens}] * accumulation
    bare = LanguageModel(cfg.model).to(dtype)

    def forward_and_backward() -> None:
        for part in parts:
            loss_rows(bare, **part).sum().backward()

    targets = tokens.numel() * accumulation
    step_seconds = compare(f"step of {targets} tokens ({precision})", lambda: trainer.step(parts, targets, 1e-4),
            forward_and_backward, ("engine", "bare model"))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        random_tokens = np.random.default_rng(0).integers(7, 24576, 1 << 20, dtype=np.uint16)
        batches = open_stream(Path(folder) / "data", random_tokens, cfg.train.seq_len, micro * accumulation).batches(0)
        causal_lm(next(batches))
        start = time.process_time()  # of all threads: the reading in the background counts
        for _ in range(400):
            causal_lm(next(batches))
        seconds = (time.process_time() - start) / 400
        batches.close()
    milliseconds = f"stream {1e3 * seconds:.3f} ms, step {1e3 * step_seconds:.1f} ms"
    print(f"CPU time of its batch: {milliseconds}, ratio {seconds / step_seconds:.6f}")


def bench_data(dtype: torch.dtype, precision: str) -> None:
    """Shuffled windows of 1,024 tokens into batches, in CPU time of all threads, against other formats and readers.

    Each reader lives in a process of its own, so that the threads of one do not count for another.
    """
    readers = {name: module for name, (module, _) in DATA_READERS.items() if importlib.util.find_spec(module)}
    print("".join(f"data: {name} is not installed\n" for name in DATA_READERS.keys() - readers.keys()), end="")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, spawn, open_reader, (name, f"{folder}/{number}")))
            for number, name in enumerate(readers)
        }
        for pool in pools.values():
            pool.submit(read_batches).result()
        rounds = [{name: pool.submit(read_batches).result() for name, pool in pools.items()} for _ in range(ROUNDS)]
        for name in readers:
            speed = statistics.median(found[name] for found in rounds)
            ratio = statistics.median(found["pretrain"] / found[name] for found in rounds)
            print(f"data: {name} {speed / 1e6:.1f}M tokens a CPU-second, ratio {ratio:.2f}")


def open_reader(name: str, folder: str) -> None:
    """In a process of its own: write the data and open one reader of it."""
    global reader
    tokens = np.random.default_rng(0).integers(7, 50_000, DATA_TOKENS, dtype=np.uint16)
    reader = DATA_READERS[name][1](Path(folder), tokens)


def read_batches() -> float:
    """Tokens a CPU-second of the reader of this process."""
    start = time.process_time()
    for batch in itertools.islice(reader, DATA_BATCHES):
        assert batch.shape == (DATA_ROWS, DATA_WIDTH) and batch.dtype == np.int64
    return DATA_BATCHES * DATA_ROWS * (DATA_WIDTH - 1) / (time.process_time() - start)


def batches_of(samples: Callable[[], Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
    """Batches out of single windows, epoch after epoch, as a trainer makes them."""
    while True:
        windows = iter(samples())
        while len(batch := list(itertools.islice(windows, DATA_ROWS))) == DATA_ROWS:
            yield np.stack(batch).astype(np.int64)


def ours(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Our shards through the stream and its background thread."""
    stream = open_stream(folder, tokens, DATA_WIDTH - 1, DATA_ROWS)
    return (rows.tokens.astype(np.int64) for rows in stream.batches(0))


def open_stream(folder: Path, tokens: np.ndarray, seq_len: int, batch_size: int) -> Stream:
    """The stream of a data set of these tokens, in four shards."""
    folder.mkdir()
    writer = DatasetWriter(folder, "<u2", 262_144, len(tokens) // 4)
    for document in np.array_split(tokens, 4 * 64):
        writer.add(document, text_bytes=1)
    writer.finish("0" * 64, 50_000, {})
    return Stream([manifests.load(folder)], [Phase(0, seq_len, batch_size, (1.0,))], seed=0)


def flat_memmap(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """One flat file mapped into memory, and a permutation of its windows (nanoGPT, Megatron)."""
    tokens.tofile(folder)
    mapped, width = np.memmap(folder, np.uint16, "r"), DATA_WIDTH - 1
    places = np.random.default_rng(0).permutation(len(tokens) // width - 1) * width
    return batches_of(lambda: (mapped[place : place + width + 1] for place in places.tolist()))


def stock_webdataset(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Stock webdataset, one window a member, with its shuffle buffer."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=4096, verbose=0) as sink:
        for number, window in enumerate(windows_of(tokens)):
            sink.write({"__key__": f"{number:08d}", "tokens.npy": window})
    shards = sorted(map(str, folder.glob("*.tar")))
    source = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000).decode()
    return batches_of(lambda: (sample["tokens.npy"] for sample in source))


def litdata(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """litdata's optimized token chunks."""
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming import Cache

    loader = TokensLoader(block_size=DATA_WIDTH)
    cache = Cache(str(folder), chunk_size=DATA_WIDTH * 8192, item_loader=loader)
    for number, window in enumerate(windows_of(tokens)):
        cache[number] = torch.from_numpy(window.astype(np.int32))
    cache.done()
    cache.merge()
    source = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=DATA_WIDTH), shuffle=True)
    return batches_of(lambda: (sample.numpy() for sample in source))


def mosaicml_streaming(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """MosaicML Streaming's MDS shards."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{DATA_WIDTH}"}) as sink:
        for window in windows_of(tokens):
            sink.write({"tokens": window})
    source = StreamingDataset(local=str(folder), shuffle=True, batch_size=DATA_ROWS)
    return batches_of(lambda: (sample["tokens"] for sample in source))


def windows_of(tokens: np.ndarray) -> np.ndarray:
    """The tokens cut into samples of one window each."""
    return tokens[: len(tokens) // DATA_WIDTH * DATA_WIDTH].reshape(-1, DATA_WIDTH)


def bench_seek(dtype: torch.dtype, precision: str) -> None:
    """The middle of an epoch of 100 billion samples, found in a process of its own: the time and memory it takes."""
    program = (
        "import time, numpy as np; from pretrain.stream.order import Order\n"
        "windows = np.full(1_525_879, 65_536); place = windows.sum() // 2 + np.arange(512)\n"
        "start = time.perf_counter(); Order(windows, seed=1).locate(place); seconds = time.perf_counter() - start\n"
        "print(f'seek: sample {place[0]:,} of {windows.sum():,} in {seconds:.3f} s')"
    )
    print("{}, process {:.0f} MiB".format(*run_apart(program)))


def bench_tokenize(dtype: torch.dtype, precision: str) -> None:
    """tools/write_shards.py on the standard library's text, all of its work included, against bare SentencePiece."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = copy_stdlib(folder, copies=4)
        tokenizer = load_tokenizer(folder)
        runs = {
            "bare SentencePiece, 1 thread": lambda: tokenizer.encode_batch(texts, num_threads=1),
            "bare SentencePiece, 2 threads": lambda: tokenizer.encode_batch(texts, num_threads=2),
            "write_shards --threads 1": lambda: write_shards(folder, "--threads", "1"),
            "write_shards --threads 2": lambda: write_shards(folder, "--threads", "2"),
            "write_shards --workers 2": lambda: write_shards(folder, "--workers", "2", "--threads", "1"),
        }
        rounds = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(3)]
        size = sum(len(text.encode()) for text in texts) / 1e6
        for name in runs:
            seconds = statistics.median(found[name] for found in rounds)
            ratio = statistics.median(found["write_shards --threads 1"] / found[name] for found in rounds)
            print(f"tokenize: {name} {size / seconds:.2f} MB/s, ratio {ratio:.4f}")


def copy_stdlib(folder: Path, copies: int) -> list[str]:
    """The standard library's modules in folder/text, some times over, each as a JSONL file; a tokenizer; the texts."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    texts = [file.read_text(errors="replace", encoding="utf-8") for file in files if "site-packages" not in file.parts]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text").mkdir()
    for copy in range(copies):
        (folder / "text" / f"{copy}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(train(texts[:200], 8192))
    return texts * copies


def write_shards(folder: Path, *options: str) -> float:
    """Run the tool on folder/text, in parts of about 4 MiB; the most memory its process took, in MiB."""
    shutil.rmtree(folder / "shards", ignore_errors=True)
    line = ["--input", str(folder / "text"), "--tokenizer", str(folder / "tokenizer.model"), "--shard-mb", "2",
            "--output", str(folder / "shards"), *options]  # fmt: skip
    return run_apart(f"from tools.write_shards import main; main({line})")[1]


def run_apart(program: str) -> tuple[str, float]:
    """Run a program in a process of its own; what it printed, and the most memory it took, in MiB."""
    program += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, encoding="utf-8", cwd=root)
    *said, kib = done.stdout.splitlines()
    return "\n".join(said), int(kib) / 1024


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bench_memory(dtype: torch.dtype, precision: str) -> None:
    """The most memory that writing and reading take, of some data and of ten times as much."""
    read_epoch = (
        "import sys; from pretrain.shards import manifest; from pretrain.stream import mixture, stream as streams\n"
        "stream = streams.Stream([manifest.load(sys.argv[1])], [mixture.Phase(0, 1024, 32, (1.0,))], 0)\n"
        "for _ in zip(range(stream.epoch_samples // 32), stream.batches(0)): pass"
    )
    found: dict[str, list[float]] = {"writer": [], "reader": []}
    for copies in (3, 30):
        with tempfile.TemporaryDirectory() as name:
            copy_stdlib(Path(name), copies)
            found["writer"].append(write_shards(Path(name), "--threads", "2"))
            found["reader"].append(run_apart(f"import sys; sys.argv[1:] = ['{name}/shards']\n{read_epoch}")[1])
    for what, (once, ten_times) in found.items():
        print(f"memory: {what} {once:.0f} MiB, of ten times the data {ten_times:.0f} MiB, ratio {ten_times / once:.4f}")


def bench_checkpoint(dtype: torch.dtype, precision: str) -> None:
    """What a save costs, in a process of its own, whose memory nothing else takes."""
    subprocess.run([sys.executable, Path(__file__).with_name("bench_checkpoint.py")], check=True)


DATA_TOKENS, DATA_ROWS, DATA_WIDTH, DATA_BATCHES = 32 << 20, 32, 1025, 64
DATA_READERS = {  # name -> (the module it needs, how it is written and opened)
    "pretrain": ("pretrain", ours), "flat memmap": ("numpy", flat_memmap),
    "webdataset": ("webdataset", stock_webdataset), "litdata": ("litdata", litdata),
    "MosaicML Streaming": ("streaming", mosaicml_streaming),
}  # fmt: skip
BENCHES = {
    "loss": bench_loss, "attention": bench_attention, "step": bench_step, "data": bench_data, "seek": bench_seek,
    "tokenize": bench_tokenize, "memory": bench_memory, "checkpoint": bench_checkpoint,
}  # fmt: skip

if __name__ == "__main__":
    run_tool(main)
