"""The training loop, shared by every entry: next batch -> step -> guard -> evaluate -> log -> save -> stop."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pretrain.checkpoint.manifest import Header
from pretrain.checkpoint.save import Checkpoints
from pretrain.config.schema import Config, TrainConfig
from pretrain.config.steps import at_step
from pretrain.dist import Ranks, all_gather_objects, all_reduce_sum, expect_steps
from pretrain.engine import compiling
from pretrain.engine.engine import Engine, MicroBatch, Step
from pretrain.evaluation.validation import Best, Evaluation
from pretrain.examples.stream import ExampleRows, ExampleStream
from pretrain.guard import Guard
from pretrain.optim.schedule import learning_rate
from pretrain.report.log import Log
from pretrain.stream.objectives import IGNORE
from pretrain.stream.order import hash_key
from pretrain.stream.stream import HASH_SUMS, DataError, Rows, Stream, digest_sums, hash_of_sums


@dataclass(frozen=True)
class Data:
    """What a run learns from, and the held-out part that it is judged by."""

    stream: Stream | ExampleStream
    collate: Callable[[Rows | ExampleRows], dict[str, np.ndarray]]  # rows -> a batch of as many, by names
    validation: Evaluation | None
    best: Best | None


@dataclass(frozen=True)
class ModelFacts:
    """What checkpoints keep of the model, and what its speed is measured by."""

    config: dict  # with the vocabulary filled in
    flops_per_token: Callable[[float], float]  # at a sequence length
    peak_flops: float  # of all ranks together, a second


def train_loop(
    config: Config, engine: Engine, data: Data, model: ModelFacts, checkpoints: Checkpoints, guard: Guard, log: Log,
    ranks: Ranks, start_step: int,
) -> int:  # fmt: skip
    """Train from `start_step` to `config.train.steps`, to a stop signal (one that came before too), or until nothing
    got better for long enough; returns the last step, which is saved. Raises `FloatingPointError` when the guard ends
    the run.
    """
    stream, validation, best, train = data.stream, data.validation, data.best, config.train
    told, late = stream.quarantine, Late(guard, log, checkpoints)
    batches = prepared(stream.batches(start_step), data.collate, train, start_step)
    step, stopped = start_step, (best.is_over if best else None) or guard.agreed_now()
    skipped = step - engine.layout.optimizer_steps if engine.loss_scale else 0
    batch = next(batches) if step < train.steps and not stopped else NO_BATCH
    compile_blocks(config, engine, data, batch, log, ranks)
    targets = all_reduce_sum(torch.tensor(batch.targets, dtype=torch.float64)).to(engine.device)
    while step < train.steps and not stopped:
        started, now, seed = time.perf_counter(), batch, hash_key(config.seed, step)
        lr = learning_rate(step - skipped, train.steps, config.optim.lr, config.schedule)
        micro_batches = [on_device(part, engine.device) for part in now.parts()]
        batch = ahead(batches) if step + 1 < train.steps else NO_BATCH
        tallies = (batch.targets, *now.digests, *guard.flags())
        running = engine.step(micro_batches, targets, lr, seed, tallies)
        targets = running.sums.on_device()[1]  # of the next batch
        step, skipped = step + 1, skipped + running.skipped
        stopped, is_best = late.settle(), False  # the step before
        row = {"step": step, "tokens": stream.progress(step)[1], "loss": None, "lr": lr, "grad_norm": None}
        late.begun(row, running)
        evaluates, saves = (due(step, every, train.steps) for every in (train.eval_every, train.save_every))
        if is_due := bool(stopped or evaluates or saves or batch.error):
            stopped = late.judge() or stopped
        row |= scaling(engine, skipped) | speed(stream, step, time.perf_counter() - started, now.global_size, model)
        if not is_due:
            continue
        # one that is told to stop has little time, unless nothing but the evaluation is left
        if validation and evaluates and (not stopped or step == train.steps):
            log.doing("validating")
            row |= validation.run(engine.evaluate, ranks, engine.device)
            is_best = best is not None and best.offer(row, validation)
            stopped = stopped or (best.is_over if best else None)
        late.settle()
        if stopped or is_best or saves:
            state = agree_on_state(stream, step, told, log)
            steps, scale = engine.layout.optimizer_steps, engine.loss_scale
            header = Header(step, config.optim.name, steps, state, model.config, scale)
            log.sync()  # a checkpoint is never newer than its journal, whatever crashes
            checkpoints.save(header, engine.layout.fragments_to_save(), best.step if best else None)
    batches.close()
    conclude(checkpoints, log, step, stopped)
    return step


def conclude(checkpoints: Checkpoints, log: Log, step: int, stopped: str | None) -> None:
    """Wait until the last step is saved, and say why it was the last."""
    log.doing("saving")
    if not checkpoints.wait():
        raise OSError(f"the checkpoint of step {step} could not be written; events.jsonl says why")
    if stopped:
        log.event("stopped", reason=stopped, step=step)


class Late:
    """The row of the last step, whose figures are read when the next step is under way, or when somebody needs them:
    until then nothing waits for the device. In order, and before anything of a step is saved.
    """

    def __init__(self, guard: Guard, log: Log, checkpoints: Checkpoints):
        self._guard, self._log, self._checkpoints = guard, log, checkpoints
        self._row: dict | None = None
        self._step: Step | None = None

    def begun(self, row: dict, step: Step) -> None:
        self._row, self._step = row, step

    def judge(self) -> str | None:
        """Fill in the figures; why the run is to stop, or None. `FloatingPointError` where they end it."""
        if self._step is None:
            return None
        row, step, self._step = self._row, self._step, None
        loss, norm = step.read()
        expect_steps()  # loading was over with the first one
        if problem := self._guard.problem(row["step"], loss, 0.0 if step.skipped else norm):
            self._checkpoints.wait()
            self._log.event("not_finite", step=row["step"], loss=loss, grad_norm=norm)
            raise FloatingPointError(problem)
        _, *hashed = step.tallies[: 1 + HASH_SUMS]
        row |= {"loss": loss, "grad_norm": norm, "batch_hash": hash_of_sums(hashed)}
        return self._guard.agreed(step.tallies[1 + HASH_SUMS :])

    def settle(self) -> str | None:
        """Judge, and write the row."""
        stopped = self.judge()
        if self._row is not None:
            self._log.row(self._row)
            self._row = None
            self._checkpoints.poll()
        return stopped


def speed(
    stream: Stream | ExampleStream, step: int, seconds: float, samples: int, model: ModelFacts
) -> dict[str, float]:
    """How fast a step was: tokens a second, and the share of the peak that the model's FLOPs are (MFU)."""
    tokens = stream.progress(step)[1] - stream.progress(step - 1)[1]
    flops = tokens * model.flops_per_token(tokens / samples)
    mfu = flops / seconds / model.peak_flops
    return {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "mfu": mfu}


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: only at the end) is due after this one."""
    return step == last or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch of `global_size` rows: how many targets it has, and the sum of its digests. Or
    the `error` that reading it met.
    """

    rows: list[dict[str, np.ndarray]]
    targets: int
    digests: Sequence[float]
    global_size: int
    error: DataError | None = None

    def parts(self) -> list[dict[str, np.ndarray]]:
        """The micro-batches; the error, where there is one."""
        if self.error:
            raise self.error
        return self.rows


NO_BATCH = Batch([], 0, [0.0] * HASH_SUMS, 0)


def compile_blocks(config: Config, engine: Engine, data: Data, batch: Batch, log: Log, ranks: Ranks) -> None:
    """Where that is chosen, compile the model's blocks before the first step; an event says how long it took, or why
    they stay plain.
    """
    if not engine.compiles or batch is NO_BATCH:
        return

    def tell(problem: str) -> None:
        log.event("not_compiled", problem=problem)
        if not ranks.is_main:
            print(f"note: not compiled on rank {ranks.rank}: {problem}", file=sys.stderr, flush=True)

    log.say(f"{config.run.name}: compiling the blocks of the model")
    started, varies = time.perf_counter(), config.task is not None  # examples are padded to the longest of a few
    if varies:  # how a graph rounds may depend on what it is first shown: the same after a resume
        mine = np.arange(ranks.rank, config.train.global_batch_size, ranks.world_size)
        batch = next(prepared((rows for rows in [data.stream.rows(mine)]), data.collate, config.train, 0))
    micro_batches = [on_device(part, engine.device) for part in batch.parts()]
    if problem := compiling.compile_blocks(engine, micro_batches, varies, tell):
        log.event("not_compiled", problem=problem)
    else:
        log.event("compiled", seconds=time.perf_counter() - started)


def ahead(batches: Iterator[Batch]) -> Batch:
    """The next batch, while the step before it is not done: what goes wrong now must not undo that."""
    try:
        return next(batches)
    except DataError as error:
        return replace(NO_BATCH, error=error)


def prepared(
    batches: Iterator[Rows | ExampleRows], collate: Callable, train: TrainConfig, step: int
) -> Iterator[Batch]:
    """This rank's batches from the one after `step` steps on."""
    with contextlib.closing(batches):
        for number, rows in enumerate(batches, step):
            now = at_step(train, number)
            parts = [collate(part) for part in split(rows, now.micro_batch_size)]
            targets = sum(int((part["labels"] != IGNORE).sum()) for part in parts)
            yield Batch(parts, targets, digest_sums(rows.digests()), now.global_batch_size)


def split(rows: Rows | ExampleRows, size: int) -> Iterator[Rows | ExampleRows]:
    """This rank's rows, `size` at a time."""
    count = len(rows.sample_numbers)
    return (rows.part(start, min(start + size, count)) for start in range(0, count, size))


def on_device(batch: dict[str, np.ndarray], device: torch.device) -> MicroBatch:
    tensors = {name: torch.from_numpy(column) for name, column in batch.items()}
    if device.type == "cuda":  # out of pinned memory, or the host would wait for the step before
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def agree_on_state(stream: Stream | ExampleStream, step: int, told: set, log: Log) -> dict:
    """The stream's state after `step` steps, with what any rank has put in quarantine; what is new becomes an event."""
    found = set().union(*all_gather_objects(stream.quarantine))
    for place in sorted(found - told):
        log.event("quarantined", step=step, **stream.describe(place))
    told |= found
    stream.adopt_quarantine(found)
    return stream.state(step)


def scaling(engine: Engine, skipped: int) -> dict[str, float]:
    """What the journal has of fp16 besides."""
    scale = engine.loss_scale
    return {"loss_scale": scale["cur_scale"], "skipped_steps": skipped} if scale else {}
