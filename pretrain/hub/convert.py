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
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pretrain.checkpoint.load import Weights, filled_model, run_of
from pretrain.checkpoint.save import write_weights
from pretrain.checkpoint.tensors import Spec, write_folder
from pretrain.cli import how_to_install
from pretrain.config import compose
from pretrain.config.schema import ModelConfig
from pretrain.files import IMPORTED, TASK, check_new_folder, check_room, lock, sha256_of_file, sync_folder, write_synced
from pretrain.hardware import DTYPES
from pretrain.hub import parity
from pretrain.hub.card import model_card
from pretrain.hub.families import auto_class, hf_tensors, label_settings, to_hf_config
from pretrain.hub.folder import TASK_OF_HEAD, Source, check_vocabulary, open_source
from pretrain.hub.parts import LABELLED
from pretrain.hub.sentences import sentence_files
from pretrain.model.heads import parameter_shapes
from pretrain.tokenizer.chat import ChatFormat
from pretrain.tokenizer.huggingface import TEMPLATE_NAME
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

INSTALL = how_to_install("hf")


def open_model(path: Path, config: ModelConfig | None = None) -> Weights | Source:
    """The weights of a run, of one of its checkpoints, or of a Hugging Face folder: `config`, `shapes`, `read(name)`,
    `read_range(name, offset, numel)`. With the `config` of the model that they are for, those of a folder are what
    transformers would load into it.
    """
    if not (Path(path) / "config.json").is_file():
        return Weights(Path(path))
    source = open_source(Path(path))
    return source.fitted(config) if config else source


def load_model(path: Path) -> torch.nn.Module:
    """The model of a run, of one of its checkpoints, or of a Hugging Face folder, in fp32 on the CPU, ready to use."""
    weights = open_model(path)
    if isinstance(weights, Weights):
        weights.verify()
    else:
        weights.check_copies()
    return filled_model(weights.config, weights.read)


def import_hf(folder: Path, output: Path, ignore: Collection[str] = (), check: bool = True) -> dict[str, Any]:
    """Import a Hugging Face folder as a run's folder with a checkpoint of weights; what was found is returned.

    `ignore`: keys of config.json to leave out. `ValueError` says what cannot be imported, and where transformers and
    this program part; then nothing is written.
    """
    source = open_source(Path(folder), ignore)
    source.check_copies()
    size = sum(4 * torch.Size(shape).numel() for shape in parameter_shapes(source.config).values())
    with staged(Path(output)) as staging:
        hashes = {}
        total = size + sum(path.stat().st_size for path in source.files())
        with tqdm(total=total, desc="importing", unit="B", unit_scale=True) as bar:
            for path in source.files():
                hashes[path.name] = sha256_of_file(path)
                bar.update(path.stat().st_size)
            write_weights(staging, source.config, source.read, bar.update)
        write_synced(staging / source.tokenizer.file_name, source.tokenizer.file_bytes)
        if source.task:
            write_synced(staging / TASK, _json(source.task))
        proof = None
        if check and has_transformers():
            allowed = [leftover.name for leftover in source.leftovers]
            read = Weights(staging).read
            proof = compared(source.folder, source.config, read, source.tokenizer, staging, allowed)
        facts = {
            "source": source.folder.resolve().name, "architecture": source.architecture,
            "parameters": size // 4, "sha256": hashes, "ignored_keys": sorted(ignore),
            "left_out": [{"name": leftover.name, "reason": leftover.reason} for leftover in source.leftovers],
            "proof": proof,
        }  # fmt: skip
        write_synced(staging / IMPORTED, _json(facts))
    return facts


def task_of(path: Path) -> dict[str, Any]:
    """What a model of `open_model` was tuned for, as a run's task.json says it; empty where for nothing."""
    weights = open_model(path)
    return weights.task if isinstance(weights, Source) else task_of_run(run_of(path), weights.config)


def task_of_run(run: Path, config: ModelConfig) -> dict[str, Any]:
    """A run's task.json, empty where it has none."""
    if not (run / TASK).is_file():
        return {}
    task = json.loads((run / TASK).read_text(encoding="utf-8"))
    if config.head in LABELLED and len(task["labels"]) != config.labels:
        raise ValueError(f"{run / TASK} names {len(task['labels'])} labels, the model has {config.labels} outputs: "
                         "they do not belong together")  # fmt: skip
    return task


def export_hf(run: Path, output: Path, dtype: str = "fp32", shard_gb: float = 5.0) -> dict[str, Any]:
    """Export a run's checkpoint (`checkpoint_of`) as a Hugging Face folder; what was proven is returned.

    `ValueError` says what no architecture there has, and where transformers and this program part; then nothing is
    written.
    """
    if not has_transformers():
        raise ValueError(f"an export is made only when transformers shows that it is right: {INSTALL}")
    weights = Weights(Path(run))
    folder, config = run_of(Path(run)), weights.config
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    task = task_of_run(folder, config)
    hf = hf_config(config, tokenizer, dtype, task)
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
            weights.verify(on_bytes=bar.update)
            write_folder(staging, specs, read_theirs, int(shard_gb * 1e9), bar.update)
        length = tuned_length(folder, config)
        for name, content in small_files(hf, tokenizer, config, task, length).items():
            (staging / name).parent.mkdir(exist_ok=True)
            write_synced(staging / name, content)
        judged = length if config.head in TASK_OF_HEAD else 0
        proof = compared(staging, config, read_rounded, tokenizer, staging, length=judged)
        parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
        name, step = Path(output).name, weights.header.step
        card = model_card(name, folder, step, config, hf, parameters, auto_class(config), proof)
        write_synced(staging / "README.md", card.encode())
    return proof


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str, task: dict[str, Any]) -> dict[str, Any]:
    """config.json, with the tokenizer's special ids and the names of a task's labels."""
    ids = dict(tokenizer.special_ids)
    if config.head in TASK_OF_HEAD and (role := padding(tokenizer)):
        ids["pad"] = ids[role]
    theirs = to_hf_config(config, ids.get("pad")) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    if config.head in LABELLED and task:
        theirs |= label_settings(task["labels"], task["multi_label"])
    return theirs | {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad", "cls", "sep") if name in ids}


def tuned_length(run: Path, config: ModelConfig) -> int:
    """The most tokens of a text that a run judges: what it was tuned at, where it was tuned."""
    settings = run / "config.yaml"
    if config.head not in TASK_OF_HEAD or not settings.is_file():
        return config.max_positions
    return min(compose.read(settings).train.seq_len, config.max_positions)


def padding(tokenizer: Tokenizer) -> str | None:
    """The role of the token that fills up batches of texts: where there is none for it, what ends a text does it. A
    causal model's texts are not over when they are judged, so none of them ends with it: transformers takes the last
    other token for a text's last one.
    """
    return next((role for role in ("pad", "eos", "sep") if role in tokenizer.special_ids), None)


def tokenizer_files(
    tokenizer: Tokenizer, config: ModelConfig, task: dict[str, Any], length: int
) -> dict[str, bytes]:  # fmt: skip
    """The tokenizer's; one for a task does with texts what `tasks` does, cuts them at the `length` at which the model
    was tuned, and fills up batches behind them. One for chats that brings no template gets ours, with which it must
    take special tokens in a text for what they are.
    """
    ends = config.head in TASK_OF_HEAD and not config.causal
    files, name = tokenizer.hf_files(config.max_positions, ends), "tokenizer_config.json"
    settings, role = json.loads(files[name]), padding(tokenizer)
    if task.get("chat") and tokenizer.chat_template is None:
        files[TEMPLATE_NAME] = ChatFormat(tokenizer).template.encode()
        return files | {name: _json(settings | {"split_special_tokens": False})}
    if config.head not in TASK_OF_HEAD:
        return files
    named = {} if role in (None, "pad") else {"pad_token": settings[f"{role}_token"]}
    changed = settings | named | {"padding_side": "right", "model_max_length": length}
    return files | {name: _json(changed)}


def small_files(
    hf: dict[str, Any], tokenizer: Tokenizer, config: ModelConfig, task: dict[str, Any], length: int
) -> dict[str, bytes]:
    """Everything of an export but the weights and the card."""
    files = {"config.json": hf} | (sentence_files(config, length) if config.head == "embedding" else {})
    if auto_class(config) == "AutoModelForCausalLM":
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
        files["generation_config.json"] = ids
    return {name: _json(content) for name, content in files.items()} | tokenizer_files(tokenizer, config, task, length)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def compared(
    folder: Path, config: ModelConfig, read: Callable[[str], torch.Tensor], tokenizer: Tokenizer, staging: Path,
    allowed_unused: Collection[str] = (), length: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The proof; a difference says what it means."""
    print("comparing with transformers", flush=True)
    try:
        return parity.prove(folder, config, read, tokenizer, staging / ".proof", allowed_unused, length)
    except ValueError as error:
        raise ValueError(f"transformers and this program do not agree, nothing is written: {error}") from None


def said(proof: dict[str, Any]) -> str:
    """What was compared, in a line."""
    continued = f", {proof['continued_tokens']} tokens of greedy text" if proof["continued_tokens"] else ""
    return (
        f"equal to transformers {proof['transformers']}: {proof['compared']} of {proof['positions']:,} {proof['unit']} "
        f"(largest difference {proof['max_difference']:.1e}){continued}, ids and text of {proof['texts']} tricky texts"
    )


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes it at the end. Whatever else happens, nothing is left."""
    output = output.absolute()
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already: delete it, or choose another name")
    check_new_folder(output)
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
