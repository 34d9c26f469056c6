"""python tools/write_shards.py --input PATH... --tokenizer tokenizer.model --output DIR [--val-fraction 0.01]

Tokenizes text files, JSONL, or folders of them (also .gz, .zst) into WebDataset tar shards (format 1: see
pretrain/data/manifest.py). With --val-fraction, DIR/train and DIR/val: a document belongs to one of them by the hash of
its text, so copies of a text never lie on both sides. The same input gives the same bytes.

Everything is written in a hidden folder beside DIR, which gets its name when all is complete: an interrupted run leaves
no DIR, and running it again starts over.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain.cli import run_tool
from pretrain.data.documents import Counts, InputFile, find_files, is_held_out, read_documents
from pretrain.data.manifest import INDEX_NAME, TOKENIZER_NAME, Manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.writer import DatasetWriter, token_dtype
from pretrain.files import sync_folder, write_atomically

BATCH_CHARS = 4_000_000  # text that is tokenized together; bounds the memory
PIECE_CHARS = 500_000  # longer documents are tokenized in pieces, cut after a line where there is one


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.monotonic()
    tokenizer = Tokenizer(args.tokenizer)
    files = find_files(args.input, args.include, args.exclude)
    counts = Counts()
    with staging(Path(args.output).resolve()) as folder:
        names = ("train", "val") if args.val_fraction else (".",)
        writers = [make_writer(folder / name, tokenizer, args) for name in names]
        try:
            tokenize(files, tokenizer, writers, counts, args)
            check_split(writers, counts, args)
            manifests = [finish(writer, folder / name, tokenizer) for name, writer in zip(names, writers, strict=True)]
        finally:
            for writer in writers:
                writer.abandon()
    report(args.output, names, manifests, counts, time.monotonic() - start)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokenize text into WebDataset shards.",
        epilog="example: python tools/write_shards.py --input my_texts/ --tokenizer tokenizer.model --output shards "
        "--val-fraction 0.01",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="text or JSONL files, or folders")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="from tools/train_tokenizer.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to make; must not exist")
    parser.add_argument("--val-fraction", type=float, default=0.0, metavar="F", help="share of documents for DIR/val")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field of a JSONL line (default: text)")
    parser.add_argument("--include", nargs="+", default=[], metavar="GLOB", help="files of folders to take")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="files and subfolders to leave out")
    parser.add_argument("--shard-mb", type=float, default=128, metavar="MB", help="size of a shard in MiB (128)")
    parser.add_argument("--chunk-tokens", type=int, default=262_144, metavar="N", help="tokens in a chunk (262144)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all")
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    if args.shard_mb <= 0 or args.chunk_tokens < 1 or args.threads < 1:
        parser.error("--shard-mb, --chunk-tokens and --threads must be positive")
    return args


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A fresh folder beside `output` that becomes `output` at the end, unless something goes wrong."""
    if any((output / part / INDEX_NAME).exists() for part in (".", "train", "val")):
        raise ValueError(f"{output} holds a finished data set: delete it, or choose another --output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: choose another --output")
    folder = output.with_name(f".{output.name}.write_shards-partial")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, output)
        empty(folder)  # what an earlier run left when it was killed
        try:
            yield folder
            sync_folder(folder)
            os.rename(folder, output)
            sync_folder(output.parent)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(
                    f"no room for {output} ({error.strerror}): free some space, or choose another --output; "
                    "what was written is removed"
                ) from None
            raise
    finally:
        os.close(handle)


def lock(handle: int, output: Path) -> None:
    """Refuse to write beside another process that writes the same output."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another write_shards.py is writing {output} now: wait for it, or stop it") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # file systems without locks
            raise


def empty(folder: Path) -> None:
    """Delete what is in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def make_writer(folder: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> DatasetWriter:
    folder.mkdir(exist_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    shard_tokens = max(1, int(args.shard_mb * 2**20) // np.dtype(dtype).itemsize)
    return DatasetWriter(folder, dtype, args.chunk_tokens, shard_tokens)


def tokenize(
    files: list[InputFile],
    tokenizer: Tokenizer,
    writers: list[DatasetWriter],
    counts: Counts,
    args: argparse.Namespace,
) -> None:
    """Read, tokenize and write all documents, batch by batch, in order."""
    start = time.monotonic()
    batch: list[str] = []
    chars = waiting = 0
    total = sum(file.bytes for file in files)
    with tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, mininterval=0.5) as bar:

        def write_batch() -> None:
            write(batch, tokenizer, writers, args)
            tokens = sum(writer.tokens for writer in writers)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start) / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(waiting)

        for document in read_documents(files, args.text_key, counts):
            batch.append(document.text)
            chars += len(document.text)
            waiting += document.input_bytes
            if chars >= BATCH_CHARS:
                write_batch()
                batch, chars, waiting = [], 0, 0
        write_batch()
        bar.update(total - bar.n)  # empty documents at the end


def write(texts: list[str], tokenizer: Tokenizer, writers: list[DatasetWriter], args: argparse.Namespace) -> None:
    """Tokenize documents and write each as bos + ids + eos to the split it belongs to."""
    pieces = [cut(text) for text in texts]
    ids = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts], args.threads))
    for text, parts in zip(texts, pieces, strict=True):
        tokens = np.concatenate(
            [[tokenizer.bos], *(np.array(next(ids), dtype=np.uint32) for _ in parts), [tokenizer.eos]]
        )
        data = text.encode()
        is_val = len(writers) > 1 and is_held_out(data, args.val_fraction)
        writers[int(is_val)].add(tokens, len(data))


def cut(text: str) -> list[str]:
    """A text in pieces of at most PIECE_CHARS."""
    parts, start = [], 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def check_split(writers: list[DatasetWriter], counts: Counts, args: argparse.Namespace) -> None:
    """`ValueError` when there is nothing to learn from, or nothing held out."""
    if counts.documents == 0:
        raise ValueError(f"the input holds no text ({counts.empty} empty documents): check --input")
    if any(writer.docs == 0 for writer in writers):
        train, val = (writer.docs for writer in writers)
        raise ValueError(
            f"--val-fraction {args.val_fraction} of {counts.documents} documents leaves {train} to train on and {val} "
            "held out: choose another fraction, or give more documents (a text file is one document)"
        )


def finish(writer: DatasetWriter, folder: Path, tokenizer: Tokenizer) -> Manifest:
    """Add the tokenizer, then the index: what has an index is complete."""
    write_atomically(folder / TOKENIZER_NAME, tokenizer.path.read_bytes())
    return writer.finish(tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids)


def report(output: str, names: tuple[str, ...], manifests: list[Manifest], counts: Counts, seconds: float) -> None:
    """Print what was written."""
    if notes := counts.summary():
        print(f"note: {notes}")
    for name, manifest in zip(names, manifests, strict=True):
        print(
            f"wrote {Path(output) / name}: {manifest.docs:,} documents, {manifest.text_bytes / 1e6:,.1f} MB of text, "
            f"{manifest.tokens:,} tokens ({manifest.text_bytes / manifest.tokens:.2f} bytes a token, bos and eos "
            f"included), {len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"
        )
    size = sum(manifest.text_bytes for manifest in manifests)
    tokens = sum(manifest.tokens for manifest in manifests)
    print(f"{seconds:.1f} s: {size / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s")


if __name__ == "__main__":
    run_tool(main)
