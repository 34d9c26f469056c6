"""A Hugging Face folder as a source of weights under our names: everything about it checked before any is read."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.tensors import INDEX, READABLE, SINGLE, TensorFolder
from pretrain.config.schema import ModelConfig
from pretrain.hub.families import HFTensor, Leftover, from_hf_config, head_tensors, hf_tensors, label_names, match_names
from pretrain.hub.parts import BARE, LABELLED, settled
from pretrain.hub.sentences import MODULES, POOLING, pooling_of
from pretrain.model.heads import parameter_shapes
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "tokenizer.model")  # fmt: skip
TASK_OF_HEAD = {
    "sequence": "classification", "tokens": "token_classification", "span": "extractive_qa", "embedding": "embedding",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that can be used: everything about it is checked but the values of its weights. `task`:
    what its model was tuned for, as a run's task.json says it; empty where for nothing.
    """

    folder: Path
    architecture: str
    model_type: str
    config: ModelConfig
    task: dict[str, Any]
    tokenizer: Tokenizer
    tensors: TensorFolder
    listed: list[HFTensor]
    found: dict[str, str]
    leftovers: list[Leftover]
    # the last matrix and the last vector that were read, by their dimensions: what is wanted next is often in one
    _last: dict[int, tuple[str, tuple[torch.Tensor, ...]]] = field(default_factory=dict)

    @cached_property
    def _home(self) -> dict[str, HFTensor]:
        return {ours: tensor for tensor in self.listed for ours in tensor.ours}

    def read(self, name: str) -> torch.Tensor:
        """A parameter of ours, not to be written to."""
        tensor = self._home[name]
        kept, ours = self._last.get(len(tensor.shape), ("", ()))
        if kept != tensor.name:
            self._last.pop(len(tensor.shape), None)
            ours = tensor.from_hf(_finite(self.found[tensor.name], self.tensors.read(self.found[tensor.name])))
            self._last[len(tensor.shape)] = tensor.name, ours
        return ours[tensor.ours.index(name)]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that are there."""
        trunk, shapes = parameter_shapes(self.config), {}
        for tensor in self.listed:
            shape = self.tensors.shape(self.found[tensor.name])
            of_head = shape[::-1] if tensor.transposed else shape
            shapes |= {name: trunk[name] if name.startswith("trunk.") else of_head for name in tensor.ours}
        return shapes

    def fitted(self, config: ModelConfig) -> "Source":
        """The folder as transformers loads it into the class of `config`, which may have another head: with what the
        files have of that, though config.json names a class without it, and without what is called otherwise there.
        """
        if config.head == self.config.head:
            return self
        trunk = [tensor for tensor in self.listed if tensor.ours[0].startswith("trunk.")]
        tops = head_tensors(config, self.model_type, self.config.head, self.tensors.names)
        found = {tensor.name: self.found[tensor.name] for tensor in trunk}
        found |= {tensor.name: name for name, tensor in tops.items()}
        return replace(self, listed=[*trunk, *tops.values()], found=found)

    def read_range(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """[offset, offset + numel) of the flat parameter, not to be written to; no other rows of it are read."""
        tensor, row = self._home[name], torch.Size(self.shapes[name][1:]).numel()
        above = tensor.rows_in_front + sum(tensor.rows[: tensor.ours.index(name)])
        first, last = offset // row, -(-(offset + numel) // row)
        read = self.tensors.read_columns if tensor.transposed else self.tensors.read_range
        theirs = _finite(self.found[tensor.name], read(self.found[tensor.name], above + first, above + last))
        rows = theirs.t() if tensor.transposed else theirs
        return rows.reshape(-1)[offset - first * row :][:numel].float()

    def check_copies(self) -> None:
        """`ValueError` where a tensor is not what config.json says that it repeats."""
        for copy in (leftover for leftover in self.leftovers if leftover.copy_of):
            if not torch.equal(self.tensors.read(copy.name), self.tensors.read(copy.copy_of)):
                raise ValueError(f"{self.folder}: {copy.name} differs from {copy.copy_of}, and config.json says that "
                                 "they are one (tie_word_embeddings): the two do not belong together")  # fmt: skip

    def files(self) -> list[Path]:
        names = ("config.json", *TOKENIZER_FILES)
        others = [self.folder / name for name in names if (self.folder / name).is_file()]
        return others + [file.path for file in self.tensors.files]


def _finite(name: str, values: torch.Tensor) -> torch.Tensor:
    if not values.isfinite().all():
        raise ValueError(f"{name} has values that are not finite numbers: the model is damaged")
    return values


def open_source(folder: Path, ignore: Collection[str] = ()) -> Source:
    """Check a Hugging Face folder, all but the values of its weights; `ValueError` for what cannot be imported."""
    hf = read_json(folder / "config.json")
    check_files(folder, hf)
    tensors = TensorFolder(folder)
    config = from_hf_config(hf, ignore, tensors.names)
    if config.head in BARE and (pooling := read_pooling(folder)):
        config = settled(replace(config, head="embedding", pooling=pooling))
    found, leftovers = match_names(config, tensors.names, hf["model_type"])
    listed = hf_tensors(config, hf["model_type"])
    wrong = [f"{found[t.name]} has the shape {list(shape)}, config.json calls for {list(t.shape)}" for t in listed
             if (shape := tensors.shape(found[t.name])) != t.shape]  # fmt: skip
    wrong += [f"{name} is stored as {dtype}; {', '.join(READABLE)} can be read" for name in found.values()
              if (dtype := tensors.dtype(name)) not in READABLE]  # fmt: skip
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong[:4])}" + f"; {len(wrong) - 4} more" * (len(wrong) > 4))
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    architecture = (hf.get("architectures") or [hf["model_type"]])[0]
    task = task_of_config(hf, config)
    if task:
        task |= {"seq_len": read_length(folder, config)}
    return Source(folder, architecture, hf["model_type"], config, task, tokenizer, tensors, listed, found, leftovers)


def read_json(path: Path, kind: type = dict) -> Any:
    """A file of a Hugging Face folder, an object or a list."""
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: if that is a model's name on the Hugging Face hub, download "
                         f"it (hf download {folder} --local-dir {folder.name}) and import {folder.name}")  # fmt: skip
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}: give the folder of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError("not an object" if kind is dict else "not a list")
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get the file again") from None
    return content


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


def read_pooling(folder: Path) -> str | None:
    """How a folder of sentence-transformers makes one vector of a text; None for any other folder."""
    if not (folder / MODULES).is_file() or not (folder / POOLING).is_file():
        return None
    return pooling_of(read_json(folder / MODULES, list), read_json(folder / POOLING))


def read_length(folder: Path, config: ModelConfig) -> int:
    """The most tokens of a text that the folder's model is given by its own libraries."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        said = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(said, int) and 0 < said <= config.max_positions:
            return said
    return config.max_positions


def task_of_config(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What a config.json says that its model was tuned for, as a run's task.json has it. A sequence's one output is a
    number (regression, ranking), which is no task here.
    """
    multi_label = config.head == "sequence" and hf.get("problem_type") == "multi_label_classification"
    if config.head not in TASK_OF_HEAD or (config.head == "sequence" and config.labels == 1 and not multi_label):
        return {}
    labels = label_names(hf) if config.head in LABELLED else []
    return {"name": TASK_OF_HEAD[config.head], "labels": labels, "multi_label": multi_label}


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{tokenizer.path} has {tokenizer.vocab_size:,} ids, the model's embedding only "
                         f"{config.vocab_size:,} rows: they do not belong together")  # fmt: skip
