"""The only module that knows DeepSpeed: its configuration, one training step, and the fragments a rank owns.

A *fragment* is a flat piece of a parameter's fp32 weight or of one of its optimizer moments. Every ZeRO stage comes
down to a list of fragments a rank owns, as views into the memory that DeepSpeed trains on: initialising, saving and
loading are all a walk over that list.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidia0") else "cuda")

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from deepspeed.utils.logging import logger as deepspeed_logger

from pretrain import optim
from pretrain.config.schema import DeepSpeedConfig, OptimConfig
from pretrain.dist import Ranks, all_reduce_sum
from pretrain.stream.order import hash_key

# DeepSpeed calls collectives by names that torch is renaming: nothing a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

WEIGHT = "weight"
EXTRA_KEYS = (
    "zero_optimization", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler",
)  # fmt: skip
MicroBatch = dict[str, torch.Tensor]  # of b rows each: what `LossRows` takes besides the model
LossRows = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Fragment:
    """`values` (1-D, a view that training uses) is [offset, offset + numel) of the flat parameter `name`.

    fp32; a weight that does not learn is kept in the precision it is computed with. `is_shared`: all ranks hold it.
    """

    name: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    values: torch.Tensor
    is_shared: bool = False


def deepspeed_config(
    config: DeepSpeedConfig, global_batch: int, micro_batch: int, accumulation: int, grad_clip: float, precision: str
) -> dict:
    """The whole DeepSpeed configuration, generated; `deepspeed.extra` is merged in after its keys are checked."""
    generated = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": config.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": None,
    }
    if precision == "bf16" and config.stage:  # DeepSpeed would add the gradients of micro-batches in bf16
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    check_extra(config)
    for key, value in config.extra.items():
        generated[key] = {**generated[key], **value} if isinstance(generated.get(key), dict) else value
    return generated


def check_extra(config: DeepSpeedConfig) -> None:
    """DeepSpeed accepts unknown top-level keys in silence, so they are refused here."""
    for key in config.extra:
        if key not in EXTRA_KEYS:
            raise ValueError(f"deepspeed.extra.{key} is not passed on to DeepSpeed; these are: {', '.join(EXTRA_KEYS)}")
    zero = config.extra.get("zero_optimization", {})
    known = set(DeepSpeedZeroConfig.model_fields) - {"stage"}
    for key in zero:
        if key not in known:
            raise ValueError(f"deepspeed.extra.zero_optimization.{key}: DeepSpeed has no such setting; the stage is "
                             "chosen by deepspeed=zero0 ... zero3")  # fmt: skip


class Engine:
    """A model under DeepSpeed ZeRO, stepped by global batches."""

    def __init__(
        self, build_model: Callable[[], torch.nn.Module], loss_rows: LossRows, settings: dict,
        optim_config: OptimConfig, ranks: Ranks, device: torch.device,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):  # fmt: skip
        """`settings` is `deepspeed_config(...)`; `loss_rows(model, **micro_batch)` gives each row's summed loss.

        Parameters without `requires_grad` do not learn; `lr_scale(name)` multiplies the learning rate of the others. A
        `loss_rows.across(run, micro_batches)`, where there is one, is called first, for losses between the rows of the
        whole batch: it gives the micro-batches to use, and `run(number, function)` computes `function(model,
        **micro_batches[number])` without gradients.
        """
        deepspeed_logger.setLevel("ERROR")
        # Built at first use, for ~2 minutes, to speed up what gloo does well enough for the sizes a CPU trains.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=None, verbose=False)
        self.stage = settings["zero_optimization"]["stage"]
        self.world_size, self.rank, self.device, self.loss_rows = ranks.world_size, ranks.rank, device, loss_rows
        sharded = deepspeed.zero.Init(config_dict_or_path=settings) if self.stage == 3 else nullcontext()
        with sharded:
            model = build_model()
        groups = optim.parameter_groups(model.named_parameters(), optim_config.weight_decay, lr_scale)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optim.build(optim_config, groups), config=settings
        )
        self.torch_optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.grad_clip = optim_config.grad_clip
        self.parameters = dict(self.engine.module.named_parameters())
        self._states = {id(flat): optim.init_state(self.torch_optimizer, optim_config.name, flat)
                        for flat in self._flat_parameters()}  # fmt: skip
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self.state_kinds = optim.STATE_KINDS[optim_config.name]

    def step(self, micro_batches: list[MicroBatch], targets: int, lr: float, seed: int = 0) -> tuple[float, float]:
        """One update from this rank's micro-batches, any number of them, of a global batch with `targets` target
        tokens. Returns the global mean loss in nats a target token and the gradient norm before clipping.

        The gradient is that of the mean over all targets of the global batch, however it is split: DeepSpeed averages
        over the ranks, so each row's sum is scaled by ranks / targets. A batch may happen to have none: its loss is 0.
        Dropout is a function of (`seed`, rank, micro-batch).
        """
        targets = max(targets, 1)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.train()

        def forward(number: int, function: Callable[..., torch.Tensor]) -> torch.Tensor:
            torch.manual_seed(hash_key(seed, self.rank, number) >> 1)
            return function(self.engine, **micro_batches[number])

        if across := getattr(self.loss_rows, "across", None):
            micro_batches = across(torch.no_grad()(forward), micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        norm = None
        for index in range(len(micro_batches)):
            is_last = index == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(is_last)  # DeepSpeed would count to a fixed number
            loss_sum = forward(index, self.loss_rows).sum()
            total += loss_sum.detach()
            self.engine.backward(loss_sum * (self.world_size / targets), scale_wrt_gas=False)
            if is_last and self._is_plain():
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return all_reduce_sum(total.cpu()).item() / targets, float(norm)

    @torch.no_grad()
    def evaluate(self, score_rows: LossRows, **micro_batch: torch.Tensor) -> torch.Tensor:
        """What `score_rows(model, **micro_batch)` says of each row [b, ...], fp64 on the CPU.

        Under ZeRO-3 every rank must call it equally often.
        """
        self.engine.eval()
        return score_rows(self.engine, **micro_batch).double().cpu()

    def fragments(self) -> Iterator[Fragment]:
        """All that this rank owns: together the ranks own every element exactly once, or each of them all of it."""
        walk = {1: self._fragments_of_partition, 2: self._fragments_of_partition, 3: self._fragments_of_stage3}
        for name, parameter in self.parameters.items():
            learning = walk.get(self.stage, self._fragments_of_copy)
            yield from (learning if parameter.requires_grad else self._fragments_of_frozen)(name, parameter)

    def fragments_to_save(self) -> Iterator[Fragment]:
        """The fragments of which this rank is the one to write: what all hold is rank 0's."""
        return (fragment for fragment in self.fragments() if self.rank == 0 or not fragment.is_shared)

    @property
    def optimizer_steps(self) -> int:
        """Updates the optimizer has counted, for its bias correction."""
        return int(next(iter(self._states.values()))["step"].item())

    @torch.no_grad()
    def refresh(self, optimizer_steps: int) -> None:
        """After the fragments were written to: bring the weights that the model computes with up to date."""
        for state in self._states.values():
            state["step"].fill_(float(optimizer_steps))
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            persistent = self.optimizer.persistent_parameters  # small ones, that DeepSpeed keeps whole on each rank
            if persistent:
                persistent[0].partition(persistent)
            lows, fulls = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
            for low, full in zip(lows, fulls, strict=True):
                low.data.copy_(full.data)
            if persistent:
                persistent[0].all_gather(persistent)
        elif not self._is_plain():
            for low, full in self._copies().values():
                low.data.copy_(full.data)

    def _is_plain(self) -> bool:
        """Stage 0 in fp32: DeepSpeed leaves the torch optimizer as it is."""
        return self.optimizer is self.torch_optimizer

    def _flat_parameters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the torch optimizer steps."""
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if self.stage in (1, 2):  # the second name is that of stage 1 with bf16 weights and fp32 gradients
            names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
            return list(next(getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name)))
        return [p for group in self.torch_optimizer.param_groups for p in group["params"]]

    def _copies(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Stage 0 in bf16: id of a parameter -> (it, its fp32 copy)."""
        return {
            id(low): (low, full)
            for lows, fulls in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            for low, full in zip(lows, fulls, strict=True)
        }

    def _fragments_of_copy(self, name: str, parameter: torch.nn.Parameter) -> Iterator[Fragment]:
        full = parameter if self._is_plain() else self._copies()[id(parameter)][1]
        shape = tuple(parameter.shape)
        yield Fragment(name, WEIGHT, 0, shape, full.data.view(-1), is_shared=True)
        for kind in self.state_kinds:
            yield Fragment(name, kind, 0, shape, self._states[id(full)][kind].view(-1), is_shared=True)

    def _fragments_of_frozen(self, name: str, parameter: torch.nn.Parameter) -> Iterator[Fragment]:
        if self.stage < 3:
            yield Fragment(name, WEIGHT, 0, tuple(parameter.shape), parameter.data.view(-1), is_shared=True)
            return
        offset, owned = self._partition_of(parameter)
        if owned:
            yield Fragment(name, WEIGHT, offset, tuple(parameter.ds_shape), parameter.ds_tensor.data[:owned])

    def _fragments_of_partition(self, name: str, parameter: torch.nn.Parameter) -> Iterator[Fragment]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return
        offset, shape = mapping.lp_fragment_address.start, tuple(parameter.shape)
        yield Fragment(name, WEIGHT, offset, shape, mapping.get_hp_fragment().data)
        for kind in self.state_kinds:
            yield Fragment(name, kind, offset, shape, mapping.get_hp_fragment(kind))

    def _fragments_of_stage3(self, name: str, parameter: torch.nn.Parameter) -> Iterator[Fragment]:
        offset, owned = self._partition_of(parameter)
        if not owned:
            return
        shape = tuple(parameter.ds_shape)
        yield Fragment(name, WEIGHT, offset, shape, safe_get_local_fp32_param(parameter).data[:owned])
        for kind in self.state_kinds:
            yield Fragment(name, kind, offset, shape, safe_get_local_optimizer_state(parameter, kind)[:owned])

    def _partition_of(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """Stage 3: where this rank's part of a flat parameter begins, and how long it is."""
        width = parameter.ds_tensor.ds_numel  # the same on every rank: the last one's is padded
        offset = self.rank * width
        return offset, max(0, min(width, parameter.ds_numel - offset))
