"""The training loop, shared by every entry: next batch -> step -> guard -> evaluate -> log -> save -> stop."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pretrain import optim
from pretrain.checkpoint.manifest import Header
from pretrain.checkpoint.save import Checkpoints
from pretrain.config.schema import Config, at_step
from pretrain.dist import Ranks, all_gather_objects, all_gather_tensor, expect_steps
from pretrain.engine.engine import Engine, MicroBatch
from pretrain.evaluation.validation import Best, Evaluation
from pretrain.examples.stream import ExampleRows, ExampleStream
from pretrain.guard import Guard
from pretrain.report.log import Log
from pretrain.stream.objectives import IGNORE
from pretrain.stream.order import hash_key
from pretrain.stream.stream import Rows, Stream, batch_hash


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
    stream, validation, best = data.stream, data.validation, data.best
    batches, told = stream.batches(start_step), stream.quarantine
    step, stopped = start_step, (best.is_over if best else None) or guard.agreed_stop()
    while step < config.train.steps and not stopped:
        train = at_step(config.train, step)
        started = time.perf_counter()
        rows = next(batches)
        parts = [data.collate(part) for part in split(rows, train.micro_batch_size)]
        targets, hashed = agree_on_batch(rows, [part["labels"] for part in parts])
        lr = optim.learning_rate(step, train.steps, config.optim.lr, config.schedule)
        seed = hash_key(config.seed, step)
        loss, grad_norm = engine.step([on_device(part, engine.device) for part in parts], targets, lr, seed)
        before, (_, tokens) = stream.progress(step)[1], stream.progress(step + 1)
        step += 1
        expect_steps()  # loading was over with the first one
        if problem := guard.problem(step, loss, grad_norm):
            checkpoints.wait()
            log.event("not_finite", step=step, loss=loss, grad_norm=grad_norm)
            raise FloatingPointError(problem)
        row = {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm, "batch_hash": hashed}
        row |= speed(tokens - before, time.perf_counter() - started, train.global_batch_size, model)
        stopped, is_best = guard.agreed_stop(), False
        # one that is told to stop has little time, unless nothing but the evaluation is left
        if validation and due(step, train.eval_every, train.steps) and (not stopped or step == train.steps):
            log.doing("validating")
            row |= validation.run(engine.evaluate, ranks, engine.device)
            is_best = best is not None and best.offer(row, validation)
            stopped = stopped or (best.is_over if best else None)
        log.row(row)
        checkpoints.poll()
        if stopped or is_best or due(step, train.save_every, train.steps):
            state = agree_on_state(stream, step, told, log)
            header = Header(step, config.optim.name, engine.layout.optimizer_steps, state, model.config)
            log.sync()  # a checkpoint is never newer than its journal, whatever crashes
            checkpoints.save(header, engine.layout.fragments_to_save(), best.step if best else None)
    batches.close()
    log.doing("saving")
    if not checkpoints.wait():
        raise OSError(f"the checkpoint of step {step} could not be written; events.jsonl says why")
    if stopped:
        log.event("stopped", reason=stopped, step=step)
    return step


def speed(tokens: int, seconds: float, samples: int, model: ModelFacts) -> dict[str, float]:
    """How fast a step was: tokens a second, and the share of the peak that the model's FLOPs are (MFU)."""
    flops = tokens * model.flops_per_token(tokens / samples)
    mfu = flops / seconds / model.peak_flops
    return {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "mfu": mfu}


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: only at the end) is due after this one."""
    return step == last or (every > 0 and step % every == 0)


def split(rows: Rows | ExampleRows, size: int) -> Iterator[Rows | ExampleRows]:
    """This rank's rows, `size` at a time."""
    count = len(rows.sample_numbers)
    return (rows.part(start, min(start + size, count)) for start in range(0, count, size))


def on_device(batch: dict[str, np.ndarray], device: torch.device) -> MicroBatch:
    return {name: torch.from_numpy(column).to(device) for name, column in batch.items()}


def agree_on_state(stream: Stream | ExampleStream, step: int, told: set, log: Log) -> dict:
    """The stream's state after `step` steps, with what any rank has put in quarantine; what is new becomes an event."""
    found = set().union(*all_gather_objects(stream.quarantine))
    for place in sorted(found - told):
        log.event("quarantined", step=step, **stream.describe(place))
    told |= found
    stream.adopt_quarantine(found)
    return stream.state(step)


def agree_on_batch(rows: Rows | ExampleRows, labels: list[np.ndarray]) -> tuple[int, str]:
    """(targets of the global batch, its hash in global order), the same on every rank, by one small gather."""
    counts = np.concatenate([(part != IGNORE).reshape(len(part), -1).sum(1) for part in labels])
    mine = torch.from_numpy(np.column_stack([rows.digests().view(np.int64), counts]))
    everything = all_gather_tensor(mine).transpose(0, 1).flatten(0, 1).numpy()  # rank r holds rows r::w
    hashed = batch_hash(np.ascontiguousarray(everything[:, :2]).view(np.uint8))
    return int(everything[:, 2].sum()), hashed
