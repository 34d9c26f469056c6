"""Models from and to Hugging Face's folders, each conversion proven (`parity`) before its result gets its name.

Weights are streamed, one tensor at a time. Work is done in a hidden folder beside the output; whatever ends it early,
nothing is left behind.
"""

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pretrain import checkpoint, parity
from pretrain.card import model_card
from pretrain.config import ModelConfig
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.files import check_room, lock, sha256_of_file, sync_folder, write_synced
from pretrain.model.heads import parameter_shapes
from pretrain.model.hf import HFTensor, Leftover, auto_class, from_hf_config, hf_tensors, match_names, to_hf_config
from pretrain.tensors import INDEX, READABLE, SINGLE, Spec, TensorFolder, write_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "tokenizer.model")  # fmt: skip
INSTALL = "pip install 'pretrain[hf]'"
IMPORTED = "imported.json"


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that can be imported: everything about it is checked but the values of its weights."""

    folder: Path
    architecture: str
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: TensorFolder
    listed: list[HFTensor]
    found: dict[str, str]
    leftovers: list[Leftover]

    @cached_property
    def _home(self) -> dict[str, HFTensor]:
        return {ours: tensor for tensor in self.listed for ours in tensor.ours}

    def read(self, name: str) -> torch.Tensor:
        """A parameter of ours."""
        tensor = self._home[name]
        theirs = self.tensors.read(self.found[tensor.name])
        if not theirs.isfinite().all():
            raise ValueError(f"{self.found[tensor.name]} has values that are not finite numbers: the model is damaged")
        return tensor.from_hf(theirs)[tensor.ours.index(name)]

    def files(self) -> list[Path]:
        names = ("config.json", *TOKENIZER_FILES)
        others = [self.folder / name for name in names if (self.folder / name).is_file()]
        return others + [file.path for file in self.tensors.files]


def import_hf(folder: Path, output: Path, ignore: Collection[str] = (), check: bool = True) -> dict[str, Any]:
    """Import a Hugging Face folder as a run's folder with a checkpoint of weights; what was found is returned.

    `ignore`: keys of config.json to leave out. `ValueError` says what cannot be imported, and where transformers and
    this program part; then nothing is written.
    """
    source = open_source(Path(folder), ignore)
    size = sum(4 * torch.Size(shape).numel() for shape in parameter_shapes(source.config).values())
    with staged(Path(output)) as staging:
        hashes = {}
        total = size + sum(path.stat().st_size for path in source.files())
        with tqdm(total=total, desc="importing", unit="B", unit_scale=True) as bar:
            for path in source.files():
                hashes[path.name] = sha256_of_file(path)
                bar.update(path.stat().st_size)
            checkpoint.write_weights(staging, source.config, source.read, bar.update)
        write_synced(staging / source.tokenizer.file_name, source.tokenizer.file_bytes)
        proof = None
        if check and has_transformers():
            allowed = [leftover.name for leftover in source.leftovers]
            read = checkpoint.Weights(staging).read
            proof = compared(source.folder, source.config, read, source.tokenizer, staging, allowed)
        facts = {
            "source": source.folder.resolve().name, "architecture": source.architecture,
            "parameters": size // 4, "sha256": hashes, "ignored_keys": sorted(ignore),
            "left_out": [{"name": leftover.name, "reason": leftover.reason} for leftover in source.leftovers],
            "proof": proof,
        }  # fmt: skip
        write_synced(staging / IMPORTED, (json.dumps(facts, indent=1) + "\n").encode())
    return facts


def open_source(folder: Path, ignore: Collection[str] = ()) -> Source:
    """Check a Hugging Face folder, all but the values of its weights; `ValueError` for what cannot be imported."""
    hf = read_config(folder)
    check_files(folder, hf)
    tensors = TensorFolder(folder)
    config = from_hf_config(hf, ignore, tensors.names)
    found, leftovers = match_names(config, tensors.names, hf["model_type"])
    listed = hf_tensors(config, hf["model_type"])
    wrong = [f"{found[t.name]} has the shape {list(shape)}, config.json calls for {list(t.shape)}" for t in listed
             if (shape := tensors.shape(found[t.name])) != t.shape]  # fmt: skip
    wrong += [f"{name} is stored as {dtype}; {', '.join(READABLE)} can be read" for name in found.values()
              if (dtype := tensors.dtype(name)) not in READABLE]  # fmt: skip
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong[:4])}" + f"; {len(wrong) - 4} more" * (len(wrong) > 4))
    for leftover in leftovers:
        if leftover.copy_of and not torch.equal(tensors.read(leftover.name), tensors.read(leftover.copy_of)):
            raise ValueError(f"{folder}: {leftover.name} differs from {leftover.copy_of}, and config.json says that "
                             "they are one (tie_word_embeddings): the two do not belong together")  # fmt: skip
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    architecture = (hf.get("architectures") or [hf["model_type"]])[0]
    return Source(folder, architecture, config, tokenizer, tensors, listed, found, leftovers)


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: if that is a model's name on the Hugging Face hub, download "
                         f"it (hf download {folder} --local-dir {folder.name}) and import {folder.name}")  # fmt: skip
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    try:
        hf = json.loads(path.read_text())
        if not isinstance(hf, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get the file again") from None
    return hf


def check_files(folder: Path, hf: dict[str, Any]) -> None:
    """Whether the weights are in files that can be read without running code."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a whole Hugging Face model")
    kind, old, new = (hf.get("architectures") or ["AutoModel"])[0], str(folder), f"{folder.name}-safetensors"
    steps = f"[k.from_pretrained({old!r}).save_pretrained({new!r}) for k in (t.{kind}, t.AutoTokenizer)]"
    command = f'python -c "import transformers as t; {steps}"'
    raise ValueError(
        f"{folder} has its weights in {', '.join(pickles[:3])} and not in {SINGLE}. That is a pickle: to read it is to "
        f"run whatever code is in it. If you trust its origin, convert it ({command}) and import {new}"
    )


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{tokenizer.path} has {tokenizer.vocab_size:,} ids, the model's embedding only "
                         f"{config.vocab_size:,} rows: they do not belong together")  # fmt: skip


def export_hf(run: Path, output: Path, dtype: str = "fp32", shard_gb: float = 5.0) -> dict[str, Any]:
    """Export a run's newest checkpoint, or the checkpoint given, as a Hugging Face folder; what was proven is returned.

    `ValueError` says what no architecture there has, and where transformers and this program part; then nothing is
    written.
    """
    if not has_transformers():
        raise ValueError(f"an export is made only when transformers shows that it is right: {INSTALL}")
    weights = checkpoint.Weights(Path(run))
    folder, config = checkpoint.run_of(Path(run)), weights.config
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    hf = hf_config(config, tokenizer, dtype)
    listed = {tensor.name: tensor for tensor in hf_tensors(config, hf["model_type"])}
    specs = [Spec(name, DTYPES[dtype], tensor.shape) for name, tensor in listed.items()]

    def read_theirs(name: str) -> torch.Tensor:
        return listed[name].to_hf(*map(weights.read, listed[name].ours))

    def read_rounded(name: str) -> torch.Tensor:
        return weights.read(name).to(DTYPES[dtype]).float()

    with staged(Path(output)) as staging:
        size = sum(spec.bytes for spec in specs)
        check_room(staging, size, "the exported model")
        saved = sum(file.stat().st_size for file in weights.checkpoint.glob("*.safetensors"))
        with tqdm(total=saved + size, desc="exporting", unit="B", unit_scale=True) as bar:
            checkpoint.verify(weights.checkpoint, on_bytes=bar.update)
            write_folder(staging, specs, read_theirs, int(shard_gb * 1e9), bar.update)
        for name, content in small_files(hf, tokenizer, config).items():
            write_synced(staging / name, content)
        proof = compared(staging, config, read_rounded, tokenizer, staging)
        parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
        name, step = Path(output).name, weights.header.step
        card = model_card(name, folder, step, config, hf, parameters, auto_class(config), proof)
        write_synced(staging / "README.md", card.encode())
    return proof


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json, with the tokenizer's special ids."""
    ids = tokenizer.special_ids
    theirs = to_hf_config(config, ids.get("pad")) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    return theirs | {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad", "cls", "sep") if name in ids}


def small_files(hf: dict[str, Any], tokenizer: Tokenizer, config: ModelConfig) -> dict[str, bytes]:
    """Everything of an export but the weights and the card."""
    files = {"config.json": hf}
    if auto_class(config) == "AutoModelForCausalLM":
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
        files["generation_config.json"] = ids
    written = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    return written | tokenizer.hf_files(config.max_positions)


def compared(
    folder: Path, config: ModelConfig, read: Callable[[str], torch.Tensor], tokenizer: Tokenizer, staging: Path,
    allowed_unused: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The proof; a difference says what it means."""
    print("comparing with transformers", flush=True)
    try:
        return parity.prove(folder, config, read, tokenizer, staging / ".proof", allowed_unused)
    except ValueError as error:
        raise ValueError(f"transformers and this program do not agree, nothing is written: {error}") from None


def said(proof: dict[str, Any]) -> str:
    """What was compared, in a line."""
    continued = f", {proof['continued_tokens']} tokens of greedy text" if proof["continued_tokens"] else ""
    return (
        f"equal to transformers {proof['transformers']}: {proof['compared']} of {proof['positions']:,} positions "
        f"(largest difference {proof['max_difference']:.1e}){continued}, ids and text of {proof['texts']} tricky texts"
    )


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes it at the end. Whatever else happens, nothing is left."""
    output = output.absolute()
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already: delete it, or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.partial")
    staging.mkdir(exist_ok=True)
    handle = os.open(staging, os.O_RDONLY)
    try:
        lock(handle, f"another process is writing {output} now: wait for it, or stop it")
        try:
            for leftover in staging.iterdir():  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield staging
            sync_folder(staging)
            os.rename(staging, output)
            sync_folder(output.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(handle)
