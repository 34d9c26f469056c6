"""The training loop, shared by every entry: next batch -> step -> guard -> evaluate -> log -> save -> stop."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from pretrain import checkpoint, optim
from pretrain.config import Config, at_step
from pretrain.data.objectives import IGNORE, batch_of
from pretrain.data.stream import Rows, Stream, batch_hash, row_digests
from pretrain.dist import Ranks, all_gather_objects, all_gather_tensor
from pretrain.engine import Engine, MicroBatch
from pretrain.evaluate import Validation
from pretrain.guard import Guard
from pretrain.log import Log


def train_loop(
    config: Config, engine: Engine, stream: Stream, objective: Callable, validation: Validation | None,
    checkpoints: checkpoint.Checkpoints, guard: Guard, log: Log, ranks: Ranks, model_facts: dict, start_step: int,
) -> int:  # fmt: skip
    """Train from `start_step` to `config.train.steps` or to a stop signal; returns the last step, which is saved.

    `model_facts`: the model's config with its vocabulary (kept in checkpoints), its FLOPs a token at a sequence length,
    the ranks' peak FLOPs a second.
    Raises `FloatingPointError` when the guard ends the run.
    """
    batches, told = stream.batches(start_step), stream.quarantine
    step, stopped = start_step, None
    while step < config.train.steps and not stopped:
        train = at_step(config.train, step)
        started = time.perf_counter()
        rows = next(batches)
        batch = batch_of(objective, rows)
        targets, hashed = agree_on_batch(rows, labels=batch[1])
        lr = optim.learning_rate(step, train.steps, config.optim.lr, config.schedule)
        parts = micro_batches(batch, train.micro_batch_size, engine.device)
        loss, grad_norm = engine.step(list(parts), targets, lr)
        step += 1
        if problem := guard.problem(step, loss, grad_norm):
            checkpoints.wait()
            log.event("not_finite", step=step, loss=loss, grad_norm=grad_norm)
            raise FloatingPointError(problem)
        seconds = time.perf_counter() - started
        speed = train.global_batch_size * train.seq_len / seconds
        flops = speed * model_facts["flops_per_token"](train.seq_len)
        row = {
            "step": step, "tokens": stream.progress(step)[1], "loss": loss, "lr": lr, "grad_norm": grad_norm,
            "tokens_per_second": speed, "step_seconds": seconds, "mfu": flops / model_facts["peak_flops"],
            "batch_hash": hashed,
        }  # fmt: skip
        stopped = guard.agreed_stop()
        if validation and not stopped and due(step, train.eval_every, train.steps):
            row |= validation.run(engine.evaluate, ranks, engine.device)
        log.row(row)
        checkpoints.poll()
        if stopped or due(step, train.save_every, train.steps):
            state = agree_on_state(stream, step, told, log)
            header = checkpoint.Header(step, config.optim.name, engine.optimizer_steps, state, model_facts["model"])
            log.sync()  # a checkpoint is never newer than its journal, whatever crashes
            checkpoints.save(header, engine.fragments_to_save())
    batches.close()
    if not checkpoints.wait():
        raise OSError(f"the checkpoint of step {step} could not be written; events.jsonl says why")
    if stopped:
        log.event("stopped", signal=stopped, step=step)
    return step


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: only at the end) is due after this one."""
    return step == last or (every > 0 and step % every == 0)


def micro_batches(batch: tuple[np.ndarray, ...], size: int, device: torch.device) -> Iterator[MicroBatch]:
    """This rank's rows, `size` at a time, on its device."""
    for start in range(0, len(batch[0]), size):
        yield tuple(torch.from_numpy(column[start : start + size]).to(device) for column in batch)


def agree_on_state(stream: Stream, step: int, told: set, log: Log) -> dict:
    """The stream's state after `step` steps, with what any rank has put in quarantine; what is new becomes an event."""
    found = set().union(*all_gather_objects(stream.quarantine))
    for place in sorted(found - told):
        log.event("quarantined", step=step, **stream.describe(place))
    told |= found
    stream.adopt_quarantine(found)
    return stream.state(step)


def agree_on_batch(rows: Rows, labels: np.ndarray) -> tuple[int, str]:
    """(target tokens of the global batch, its hash in global order), the same on every rank, by one small gather."""
    digests = row_digests(rows).view(np.int64)
    mine = torch.from_numpy(np.column_stack([digests, (labels != IGNORE).sum(1)]))
    everything = all_gather_tensor(mine).transpose(0, 1).flatten(0, 1).numpy()  # rank r holds rows r::w
    hashed = batch_hash(np.ascontiguousarray(everything[:, :2]).view(np.uint8))
    return int(everything[:, 2].sum()), hashed
