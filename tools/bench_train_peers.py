"""python tools/bench_train_peers.py does nothing by itself; tools/bench_train.py --against trainer nanogpt has it done.

The Trainer of transformers, and nanoGPT's recipe (Karpathy, github.com/karpathy/nanoGPT, 2023), written anew from what
is published of it: GPT-2 without biases, its output matrix the embedding, AdamW with betas 0.9 and 0.95, weight decay
0.1 on matrices, clipping at 1. They train models of the run's shape on its batches.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from pretrain.config.schema import Config
from pretrain.hub.families import auto_class, to_hf_config

Batches = Iterator[list[dict[str, torch.Tensor]]]
KEPT = 16  # global batches that a peer reads over and over: what they hold is no matter for its speed


def trainer(gate: Callable, config: Config, batches: Batches, dtype: torch.dtype) -> None:
    """The architecture of Hugging Face that computes the same, from random weights, under their own loop."""
    import transformers

    theirs = to_hf_config(config.model)
    hf_config = transformers.AutoConfig.for_model(theirs.pop("model_type"), **theirs)
    model = getattr(transformers, auto_class(config.model)).from_config(hf_config)

    class Gated(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate()

    kept = [part for batch in itertools.islice(batches, KEPT) for part in batch]
    rows, optim = len(kept[0]["inputs"]), config.optim
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder, use_cpu=True, bf16=dtype == torch.bfloat16, max_steps=1 << 20, save_strategy="no",
            report_to="none", per_device_train_batch_size=rows,
            gradient_accumulation_steps=config.train.global_batch_size // rows, learning_rate=optim.lr,
            weight_decay=optim.weight_decay, adam_beta1=optim.beta1, adam_beta2=optim.beta2,
            max_grad_norm=optim.grad_clip,
        )  # fmt: skip
        run = transformers.Trainer(model, settings, train_dataset=Rows(kept, config.model.causal), callbacks=[Gated()])
        run.train()


class Rows(Dataset):
    """The rows of some batches over and over. A causal model of theirs moves the labels itself."""

    def __init__(self, parts: list[dict[str, torch.Tensor]], causal: bool):
        inputs, labels = (torch.cat([part[name] for part in parts]) for name in ("inputs", "labels"))
        self.inputs, self.labels = inputs, inputs if causal else labels

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = number % len(self.inputs)
        return {"input_ids": self.inputs[row], "labels": self.labels[row]}


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).contiguous().flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = CausalSelfAttention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """nanoGPT's model, without dropout: token ids [B, T] and the ids that follow -> the mean loss."""

    def __init__(self, layers: int, width: int, heads: int, vocab_size: int, seq_len: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(seq_len, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt(gate: Callable, config: Config, batches: Batches, dtype: torch.dtype) -> None:
    """Its loop in fp32, as it is on a CPU: batches out of a flat file, AdamW that is not fused, a loss printed every
    ten steps.
    """
    in_precision(gate, config, batches, contextlib.nullcontext())


def nanogpt_bf16(gate: Callable, config: Config, batches: Batches, dtype: torch.dtype) -> None:
    """The same with the forward pass in bf16 autocast, as its loop has it on a GPU."""
    in_precision(gate, config, batches, torch.autocast("cpu", torch.bfloat16))


def in_precision(gate: Callable, config: Config, batches: Batches, autocast: Any) -> None:
    kept = [part["inputs"] for batch in itertools.islice(batches, KEPT) for part in batch]
    rows, seq_len = kept[0].shape
    shape = config.model
    model = GPT(shape.layers, shape.width, shape.heads, shape.vocab_size, seq_len)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": decay}
              for is_matrix, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.95))
    accumulation = config.train.global_batch_size // rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        torch.cat(kept).numpy().astype(np.uint32).tofile(path)
        step, batch = 0, get_batch(path, rows, seq_len)
        while True:
            gate()
            for _ in range(accumulation):
                with autocast:
                    loss = model(*batch) / accumulation
                batch = get_batch(path, rows, seq_len)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                print(f"step {step}: loss {loss.item() * accumulation:.4f}")
            step += 1


def get_batch(path: Path, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows from random places of a flat file, and the same one token on."""
    tokens = np.memmap(path, np.uint32, "r")
    starts = torch.randint(len(tokens) - seq_len, (rows,)).tolist()
    windows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


CONTESTANTS = {"trainer": trainer, "nanogpt": nanogpt, "nanogpt-bf16": nanogpt_bf16}
