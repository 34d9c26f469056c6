"""python tools/bench_train_others.py does nothing by itself; tools/bench_train.py --against bare floor has it done.

What a run is measured by: a loop written by hand, and the matrix products of its steps.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from pretrain.config.schema import Config, ModelConfig, OptimConfig
from pretrain.model.heads import build_model
from pretrain.model.initial import fill_initial
from pretrain.model.losses import loss_rows
from pretrain.model.transformer import head_width
from pretrain.optim.schedule import learning_rate
from pretrain.stream import opening
from pretrain.stream.objectives import IGNORE, batch_of, make_objective

Batches = Iterator[list[dict[str, torch.Tensor]]]


def bare(gate: Callable, config: Config, batches: Batches, dtype: torch.dtype) -> None:
    """The same model on the same data and terms, without an engine."""
    if config.optim.base_width:
        raise ValueError("optim.base_width: here rates do not follow the width: leave it out")
    sparse = config.objective.name == "masked_lm"
    losses = functools.partial(loss_rows, z_loss=config.objective.z_loss, sparse=sparse)
    model = build_model(config.model, config.train.activation_checkpointing).to(dtype)
    loop = BareLoop(model, losses, config.optim)
    loop.fill(config.model, config.seed)
    for step, batch in enumerate(batches):
        gate(loop.watches)
        lr = learning_rate(step, config.train.steps, config.optim.lr, config.schedule)
        gate.losses.append(loop.step(batch, lr))


class BareLoop:
    """Mixed-precision training as one writes it by hand: fp32 weights beside those that the model computes with,
    gradients of micro-batches added up in fp32, clipping, fused AdamW, and torch's Muon where the run has it. It stays
    as it is: others are measured by it.
    """

    def __init__(self, model: nn.Module, losses: Callable, config: OptimConfig):
        self.model, self.losses, self.clip = model, losses, config.grad_clip
        self.weights = dict(model.named_parameters())
        self.is_mixed = next(iter(self.weights.values())).dtype != torch.float32
        self.masters = self.weights
        if self.is_mixed:
            self.masters = {name: torch.empty_like(w, dtype=torch.float32) for name, w in self.weights.items()}
            for master in self.masters.values():
                master.requires_grad_().grad = torch.zeros_like(master)
        matrices, groups = [], []
        for name, master in self.masters.items():
            if config.name == "muon" and master.dim() == 2 and name.startswith("trunk.blocks."):
                matrices.append(master)
                continue
            decays = master.dim() >= 2 and "positions" not in name
            scale = config.adamw_lr_scale if config.name == "muon" else 1.0
            scale *= config.embedding_lr_scale if name.startswith(("trunk.embedding.", "trunk.values.")) else 1.0
            groups.append({"params": [master], "weight_decay": config.weight_decay * decays, "scale": scale})
        betas = (config.beta1, config.beta2)
        self.optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)]
        if matrices:
            muon = torch.optim.Muon([{"params": matrices, "scale": 1.0}], config.lr, config.weight_decay,
                                    config.momentum, adjust_lr_fn="match_rms_adamw")  # fmt: skip
            self.optimizers.append(muon)

    @torch.no_grad()
    def fill(self, config: ModelConfig, seed: int) -> None:
        """The initial values of a run."""
        for name, master in self.masters.items():
            fill_initial(master.view(-1), 0, name, tuple(master.shape), config, seed)
            self.weights[name].copy_(master)

    def step(self, micro_batches: list[dict[str, torch.Tensor]], lr: float) -> float:
        """The mean loss of the batch before it."""
        targets = sum(int((part["labels"] != IGNORE).sum()) for part in micro_batches)
        mean = 0.0
        for part in micro_batches:
            loss = self.forward(part) / targets
            self.backward(loss)
            mean += loss.item()
        self.update(lr)
        return mean

    def forward(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.losses(self.model, **part).sum()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        if self.is_mixed:
            for name, weight in self.weights.items():
                self.masters[name].grad += weight.grad
                weight.grad = None

    @torch.no_grad()
    def update(self, lr: float) -> None:
        if self.clip:
            nn.utils.clip_grad_norm_(self.masters.values(), self.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
        for name, weight in self.weights.items():
            if self.is_mixed:
                weight.copy_(self.masters[name])
            self.masters[name].grad.zero_()

    def watches(self) -> Iterator[tuple]:
        yield from ((self, name, name) for name in ("forward", "backward"))
        yield self, "update", "optimizer: norm, clipping, copies"
        yield from ((optimizer, "step", "optimizer: update") for optimizer in self.optimizers)


def batches(config: Config, rows: int) -> Batches:
    """The run's global batches, on one rank, in micro-batches of `rows` rows."""
    sources = opening.open_sources(config.data)
    objective = make_objective(config.objective, opening.open_tokenizer(config.data, sources), config.seed)
    size = config.train.global_batch_size
    for batch in opening.open_training(config.data, config.train, config.seed, sources, 0, 1).batches(0):
        parts = (batch_of(objective, batch.part(start, min(start + rows, size))) for start in range(0, size, rows))
        yield [{name: torch.from_numpy(column) for name, column in part.items()} for part in parts]


class Product(NamedTuple):
    """`count` matrix products of a micro-batch, [m, k] x [k, n], or `batch` of them at once for each row and head.
    `turned`: which of the two operands lies transposed in memory.
    """

    m: int
    k: int
    n: int
    turned: int
    count: int
    batch: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.count * (self.batch or 1) * self.m * self.k * self.n


def products_of(config: ModelConfig, rows: int, seq_len: int, predicted: float = 1.0) -> list[Product]:
    """All of a micro-batch: of every linear layer forward, and backward to its inputs and to its weights; attention's
    two (scores, mixture), and their four backward, over the whole square as `flops_per_token` counts them.
    """
    with torch.device("meta"):
        model = build_model(config)
    linears: collections.Counter = collections.Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            share = 1.0 if name.startswith("trunk.") else predicted
            linears[round(share * rows * seq_len), module.in_features, module.out_features] += 1
    found = []
    for (n, inputs, outputs), count in linears.items():
        found += [Product(n, inputs, outputs, 2, count), Product(n, outputs, inputs, 0, count),
                  Product(outputs, n, inputs, 1, count)]  # fmt: skip
    width, heads, layers = head_width(config), rows * config.heads, config.layers
    scores, mixture = (seq_len, width, seq_len), (seq_len, seq_len, width)
    found += [Product(*scores, 2, 2 * layers, heads), Product(*mixture, 0, 2 * layers, heads),
              Product(*mixture, 1, 2 * layers, heads)]  # fmt: skip
    return found


def floor(gate: Callable, config: Config, batches: Batches, dtype: torch.dtype) -> None:
    """The matrix products of a step, alone: no step of this model in this type can take less."""
    train, sparse = config.train, config.objective.name == "masked_lm"
    predicted = config.objective.mask_rate if sparse else 1.0
    prepared = []
    for product in products_of(config.model, train.micro_batch_size, train.seq_len, predicted):
        a = operand(product.batch, product.m, product.k, product.turned == 1).to(dtype)
        b = operand(product.batch, product.k, product.n, product.turned == 2).to(dtype)
        prepared.append((product.count, a, b, a @ b))
    while True:
        gate()
        for _ in range(train.global_batch_size // train.micro_batch_size):
            for count, a, b, out in prepared:
                for _ in range(count):
                    torch.matmul(a, b, out=out)


def operand(batch: int, rows: int, columns: int, is_turned: bool) -> torch.Tensor:
    shape = (columns, rows) if is_turned else (rows, columns)
    values = torch.randn(batch, *shape) if batch else torch.randn(shape)
    return values.transpose(-1, -2) if is_turned else values


CONTESTANTS = {"bare": bare, "floor": floor}
