"""A run that passed every check, and what there is to say of it before it starts."""

import hashlib
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain import hardware
from pretrain.checkpoint.manifest import committed
from pretrain.config.held_out import told_of_trained_on
from pretrain.config.schema import Config, ModelConfig, flatten
from pretrain.dist import all_gather_objects
from pretrain.engine import compiling, memory
from pretrain.engine.engine import LossRows
from pretrain.evaluation.validation import Evaluation
from pretrain.examples.stream import ExampleStream
from pretrain.files import TRAINED_ON
from pretrain.inference import generate
from pretrain.model.attention import why_masks
from pretrain.model.heads import parameter_shapes
from pretrain.model.transformer import head_width
from pretrain.report.events import listed, told
from pretrain.stream.stream import Stream
from pretrain.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """A run that passed every check: its config, the model with its vocabulary, the data, opened."""

    config: Config
    model: ModelConfig
    tokenizer: Tokenizer
    stream: Stream | ExampleStream
    collate: Callable  # rows of the stream -> a batch
    loss_rows: LossRows
    validation: Evaluation | None
    flops_per_token: Callable[[float], float]  # of a sequence length
    identity: dict  # of the data: another one is another run
    changes: tuple[str, ...]  # of the config, since the run was last started
    find_new: Callable[[], dict[str, str]]  # parameters that begin anew, though there is `init`, each with the reason;
    # ValueError where it cannot start the run
    new_parameters: dict[str, str] | None  # those, where the run begins
    files: dict[str, bytes]  # further ones of the run's folder
    trainable: Callable[[str], bool] = lambda name: True
    lr_scale: Callable[[str], float] = lambda name: 1.0
    best_metric: str | None = None
    trains_on_held_out: tuple[str, ...] = ()  # of data.val, the sets that are the training data, or one of its sources

    def compiles(self, device: torch.device) -> bool:
        """Whether the model's blocks are to be compiled; `ValueError` where that would fail."""
        cfg, sizes = self.config, memory.counts(self.model, self.config.optim.name, self.trainable)
        return compiling.is_chosen(cfg.train.compile, device, cfg.deepspeed.stage, sizes.trained == sizes.parameters)


def notes(plan: Plan, device: torch.device | None = None, precision: str = "") -> list[str]:
    """What is allowed and seldom meant; also of a device and its precision, where they are known."""
    cfg, found = plan.config, []
    if cfg.schedule.warmup_steps > cfg.train.steps:
        found.append(f"schedule.warmup_steps={cfg.schedule.warmup_steps} is more than train.steps={cfg.train.steps}: "
                     "the learning rate never reaches optim.lr")  # fmt: skip
    found += map(told_of_trained_on, plan.trains_on_held_out)
    if device is not None and device.type == "cuda" and plan.model.attention == "sdpa":
        why = why_masks(device, hardware.DTYPES[precision], head_width(plan.model), plan.model.dropout)
        if why and (plan.model.sliding_window or cfg.data.document_mask):
            found.append(f"attention takes memory and time for all pairs of positions of a row, as a mask of them says "
                         f"what sees what: {why}")  # fmt: skip
    if plan.new_parameters is not None:  # the run begins: later, what was recorded counts, and events say it
        found += [f"phase: {told({'kind': 'phase'} | phase)}"
                  for phase in plan.stream.phase_summary(cfg.train.steps) if phase["left"]]  # fmt: skip
    return found


def disagreement(plan: Plan, precision: str) -> str | None:
    """Why the ranks cannot run together, the same on all: one has another configuration, other data, or a device that
    train.precision=auto means another `precision` for; or None.
    """
    facts = flatten(plan.config) | plan.identity | {"train.precision": precision}
    mine = {key: str(value) for key, value in facts.items()}
    if len(set(all_gather_objects(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()))) == 1:
        return None
    everyone = all_gather_objects([socket.gethostname(), mine])  # long, and only now
    host, first = everyone[0]
    rank, (other, found) = next((rank, its) for rank, its in enumerate(everyone) if its[1] != first)
    listed = "; ".join(f"{key}: {first.get(key)} there, {found.get(key)} here"
                       for key in first | found if first.get(key) != found.get(key))  # fmt: skip
    return (f"rank {rank} on {other} has another configuration than rank 0 on {host}: {listed}. Start all nodes with "
            "the same command, version and data")  # fmt: skip


def facts_of_data(plan: Plan) -> dict[str, str]:
    """What a run's folder says of its data: what identifies it, and which held-out data is none."""
    trained_on = {TRAINED_ON: ", ".join(plan.trains_on_held_out)} if plan.trains_on_held_out else {}
    return plan.identity | trained_on


def reasons(plan: Plan) -> dict[str, list[str]]:
    """Why parameters begin anew, for an event: nothing where none does."""
    named: dict[str, list[str]] = {}
    for name, reason in plan.new_parameters.items():
        named.setdefault(reason, []).append(name)
    return {"reasons": [f"{listed(names)}: {reason}" for reason, names in named.items()]} if named else {}


def what_would_run(plan: Plan) -> str:
    """One line for --check."""
    cfg, size = plan.config, sum(map(math.prod, parameter_shapes(plan.model).values()))
    found = committed(cfg.run.folder / "checkpoints")
    start = f"goes on from {found[0].name}" if found else "begins"
    return f"{start}, {size:,} parameters, to step {cfg.train.steps:,} of {cfg.train.global_batch_size} samples"


def writes_sample(plan: Plan) -> bool:
    return plan.config.log.sample_tokens > 0 and plan.model.causal and plan.model.head == "lm"


def check_sample(plan: Plan) -> None:
    """`ValueError` for a prompt that the model will not be able to continue, at the end."""
    if writes_sample(plan):
        ids = generate.prompt_ids(plan.tokenizer, plan.config.log.sample_prompt)
        if len(ids) >= plan.model.max_positions:
            raise ValueError(f"log.sample_prompt has {len(ids)} tokens, and the model {plan.model.max_positions} "
                             "positions: shorten it, or write no sample with log.sample_tokens=0")  # fmt: skip
