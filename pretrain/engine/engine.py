"""One training step under DeepSpeed ZeRO, whatever the split into ranks, micro-batches and accumulation steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import groups
from deepspeed.utils.logging import logger as deepspeed_logger

from pretrain.config.schema import OptimConfig
from pretrain.dist import HostCopy, LateSum, Ranks
from pretrain.engine.fragments import Whole, layout_of
from pretrain.engine.sums import in_fewer_passes
from pretrain.hardware import DTYPES
from pretrain.model.transformer import Block
from pretrain.optim import optimizers
from pretrain.stream.order import hash_key

MicroBatch = dict[str, torch.Tensor]  # of b rows each: what `LossRows` takes besides the model
LossRows = Callable[..., torch.Tensor]
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scale


class Step:
    """A step that is under way. Its figures are read when the next one is: until then nothing waits for the device."""

    def __init__(self, sums: LateSum, norm: torch.Tensor | float, skipped: bool):
        self.sums, self._norm = sums, HostCopy(torch.as_tensor(norm))
        self.skipped = skipped  # because gradients overflowed in fp16: nothing was updated

    def read(self) -> tuple[float, float]:
        """The global mean loss in nats a target token, and the gradient norm before clipping."""
        return self.sums.read()[0], self._norm.read().item()

    @property
    def tallies(self) -> list[float]:
        """What was given to be added up over the ranks."""
        return self.sums.read()[1:]


@contextmanager
def placed(device: torch.device, settings: dict) -> Iterator[None]:
    """Modules are made where they live and in the precision that they compute in, not in fp32 on the host first."""
    before = torch.get_default_dtype()
    low = [DTYPES[name] for name in ("bf16", "fp16") if settings[name]["enabled"]]
    torch.set_default_dtype(*low or [torch.float32])
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


class Engine:
    """A model under DeepSpeed ZeRO, stepped by global batches."""

    def __init__(
        self, build_model: Callable[[], torch.nn.Module], loss_rows: LossRows, settings: dict,
        optim_config: OptimConfig, ranks: Ranks, device: torch.device,
        lr_scale: Callable[[str], float] = lambda name: 1.0, compiles: bool = False,
    ):  # fmt: skip
        """`settings` is `deepspeed_config(...)`; `loss_rows(model, **micro_batch)` gives each row's summed loss.

        Parameters without `requires_grad` do not learn; `lr_scale(name)` multiplies the learning rate of the others. A
        `loss_rows.across(run, micro_batches)`, where there is one, is called first, for losses between the rows of the
        whole batch: it gives the micro-batches to use, and `run(number, function)` computes `function(model,
        **micro_batches[number])` without gradients. `compiles`: the blocks are to be compiled (`compiling`).
        """
        torch.set_flush_denormal(True)  # moments that fade away pass through numbers that a CPU is slow with
        deepspeed_logger.setLevel("ERROR")
        bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it prints, and collects garbage, at every start
        # Built at first use, for ~2 minutes, to speed up what gloo does well enough for the sizes a CPU trains.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=None, verbose=False)
        groups._WORLD_GROUP = torch.distributed.group.WORLD  # or it makes another of all ranks, with its own timeout
        self.stage = settings["zero_optimization"]["stage"]
        self.world_size, self.rank, self.device, self.loss_rows = ranks.world_size, ranks.rank, device, loss_rows
        with deepspeed.zero.Init(config_dict_or_path=settings) if self.stage == 3 else placed(device, settings):
            model = build_model()
        self.compiles = compiles
        if compiles and self.stage == 3:  # a block's weights are gathered before it, and not by hooks within it
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        stepped_by = optimizers.build(optim_config, model.named_parameters(), lr_scale)
        self.engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=stepped_by, config=settings)
        if type(optimizer) is bf16_optimizer.BF16_Optimizer:
            in_fewer_passes(self.engine, optimizer, self.world_size)
        self.parameters = dict(self.engine.module.named_parameters())
        self.layout = layout_of(self.stage, self.parameters, optimizer, self.rank)
        if matrices := self.layout.matrices():
            dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
            partners = self.engine.seq_data_parallel_group  # over which DeepSpeed cuts
            self.layout.torch_optimizer.arrange(matrices, self.rank, self.world_size, partners, dtype)
        self._scaler = optimizer.loss_scaler if settings["fp16"]["enabled"] else None

    @property
    def loss_scale(self) -> dict[str, float]:
        """What fp16 multiplies the loss with, and since when; nothing in other precisions. For checkpoints."""
        if self._scaler is None:
            return {}
        return {name: getattr(self._scaler, name) for name in SCALER_STATE}

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float]) -> None:
        for name in self.loss_scale.keys() & state.keys():
            setattr(self._scaler, name, state[name])

    def step(
        self, micro_batches: list[MicroBatch], targets: torch.Tensor | int, lr: float, seed: int = 0,
        tallies: Sequence[float] = (),
    ) -> Step:  # fmt: skip
        """One update from this rank's micro-batches, any number of them, of a global batch with `targets` target
        tokens. `tallies` are added up over the ranks beside the loss, in the one small sum of a step.

        The gradient is that of the mean over all targets of the global batch, however it is split: DeepSpeed averages
        over the ranks, so each row's sum is scaled by ranks / targets. A batch may happen to have none: its loss is 0.
        Dropout is a function of (`seed`, rank, micro-batch).
        """
        targets = torch.as_tensor(targets, dtype=torch.float64, device=self.device).clamp(min=1)
        for group in self.layout.torch_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        micro_batches, forward = self._begin(micro_batches, seed)
        sums = torch.tensor([0.0, *tallies], dtype=torch.float64).to(self.device, non_blocking=True)
        scale, norm = self.world_size / targets, None
        for index in range(len(micro_batches)):
            is_last = index == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(is_last)  # DeepSpeed would count to a fixed number
            loss_sum = forward(index).sum()
            sums[0] += loss_sum.detach()
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
            if is_last and type(self.layout) is Whole:  # here DeepSpeed tells none
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            if is_last:
                sums[0] /= targets
                late = LateSum(sums)
            self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        # At the least scale an overflow is none of the scale: it is for the guard.
        skipped = self._scaler is not None and self._scaler.cur_scale > 1 and self.layout.optimizer.overflow
        return Step(late, norm, skipped)

    def rehearse(self, micro_batches: list[MicroBatch]) -> None:
        """The first forward pass of a step. Nothing of it stays but what is made at first use."""
        _, forward = self._begin(micro_batches, 0)
        forward(0)

    def _begin(
        self, micro_batches: list[MicroBatch], seed: int
    ) -> tuple[list[MicroBatch], Callable[[int], torch.Tensor]]:
        """The micro-batches to use, and the losses of the rows of one by its number, with a graph."""
        self.engine.train()

        def forward(number: int, function: Callable[..., torch.Tensor] = self.loss_rows) -> torch.Tensor:
            torch.manual_seed(hash_key(seed, self.rank, number) >> 1)
            return function(self.engine, **micro_batches[number])

        if across := getattr(self.loss_rows, "across", None):
            micro_batches = across(torch.no_grad()(forward), micro_batches)
        return micro_batches, forward

    @torch.no_grad()
    def evaluate(self, score_rows: LossRows, **micro_batch: torch.Tensor) -> torch.Tensor:
        """What `score_rows(model, **micro_batch)` says of each row [b, ...], fp64 on the CPU.

        Under ZeRO-3 every rank must call it equally often.
        """
        self.engine.eval()
        return score_rows(self.engine, **micro_batch).double().cpu()
