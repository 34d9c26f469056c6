"""What the tests of tasks share: small tokenizers of three kinds, tasks, tables, batches, models."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pretrain.config import compose
from pretrain.config.schema import Config
from pretrain.dist import ALONE
from pretrain.examples.stream import ExampleRows, Examples
from pretrain.examples.tables import Table, read_table
from pretrain.hub.families import fitting_head
from pretrain.stream.objectives import IGNORE
from pretrain.tasks import Task, make_task
from pretrain.tasks.validation import TaskValidation
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.models import filled_model

SMALL = ["run.name=x", "model=llama_tiny", "data.train=x", "train.seq_len=32", "train.precision=fp32"]


def _saved(folder: Path, content: dict, config: dict) -> Tokenizer:
    folder.mkdir()
    for name, file in {"tokenizer.json": content, "tokenizer_config.json": config}.items():
        (folder / name).write_text(json.dumps(file))
    return load_tokenizer(folder)


def word_pieces(folder: Path, words: list[str]) -> Tokenizer:
    """As BERT: lowercase words out of a list, [CLS] a text [SEP]; ids: [PAD] [UNK] [CLS] [SEP] 0 to 3, then `words`."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return _saved(folder, json.loads(made.to_str()), roles)


def byte_level(folder: Path) -> Tokenizer:
    """As GPT-2, with a token for each byte and none before a text; id 0 ends one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate(["<|endoftext|>", *letters])}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return _saved(folder, json.loads(made.to_str()), {"eos_token": "<|endoftext|>"})


def sentence_pieces(folder: Path, texts: list[str], vocab_size: int = 320) -> Tokenizer:
    """Trained as tools/train_tokenizer.py does; <s> before a text, bytes for characters that `texts` do not have."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train(texts, vocab_size))
    return load_tokenizer(folder)


@functools.cache
def config_of(task: str, *overrides: str) -> Config:
    return compose.compose("finetune", [f"task={task}", *SMALL, *overrides])


def make(task: str, tokenizer: Tokenizer, *overrides: str, table: Table | None = None) -> Task:
    cfg = config_of(task, *overrides)
    return make_task(cfg.task, tokenizer, cfg.model, cfg.train.seq_len, cfg.data.packing, cfg.seed, table,
                     cfg.objective)  # fmt: skip


def table_of(folder: Path, *rows: dict, name: str = "rows.jsonl") -> Table:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(str(folder / name), "data.train")


def batch_of(task: Task, examples: Examples, *numbers: int) -> dict[str, torch.Tensor]:
    """The batch of some examples, or of all of them."""
    chosen = np.array(numbers or range(len(examples)))
    return {k: torch.from_numpy(v) for k, v in task.collate(ExampleRows(chosen, chosen, examples)).items()}


def new_model(task: Task, scale: float = 1) -> torch.nn.Module:
    """The model of a task with its first weights, `scale` times."""
    base = dataclasses.replace(task.model, vocab_size=task.tokenizer.vocab_size)
    config = base if task.head == base.head == "lm" else fitting_head(base, task.head, len(task.labels))
    return filled_model(config, scale)


def taught(task: Task, table: Table, steps: int) -> torch.nn.Module:
    """A new model that has learnt from the examples of a table, 16 at a time, or all where there are fewer."""
    model, examples = new_model(task), task.encode(table)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    some = np.arange(min(16, len(examples)))
    for step in range(steps):
        batch = batch_of(task, examples, *(some + len(some) * step) % len(examples))
        targets = (batch["labels"] != IGNORE).sum()
        (task.loss_rows(model, **batch).sum() / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def evaluated(model: torch.nn.Module) -> Callable:
    """What `Engine.evaluate` is for a model alone."""
    return lambda function, **batch: function(model, **batch).detach().double()


def judged(
    task: Task, table: Table, model: torch.nn.Module, micro_batch_size: int = 8
) -> tuple[dict[str, float], TaskValidation]:
    """The figures of a model on held-out examples, and what told them, in a process alone."""
    validation = TaskValidation(task, table, task.encode(table), micro_batch_size)
    figures = validation.run(evaluated(model), ALONE, torch.device("cpu"))
    return figures, validation
