"""Pretrain a language model: config -> data -> model -> engine -> loop.

    torchrun --nproc-per-node 2 -m pretrain.train experiment=quickstart run.name=first data.train=shards data.val=shards

`--help` lists every key; `--check` judges the configuration and the data and trains nothing. Started again, the same
command continues the run.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pretrain import dist, entry, run_folder
from pretrain.checkpoint.load import run_of
from pretrain.config import checks
from pretrain.config.held_out import HeldOut, held_out_sets
from pretrain.config.schema import Config
from pretrain.config.steps import accumulation_steps, at_step, phases, with_steps
from pretrain.engine.settings import check_extra
from pretrain.evaluation.validation import Validation, together
from pretrain.model.losses import loss_rows
from pretrain.model.transformer import flops_per_token
from pretrain.plan import Plan
from pretrain.stream import opening
from pretrain.stream.objectives import batch_of, make_objective
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer


def make_plan(cfg: Config, ranks: dist.Ranks) -> Plan:
    """Open and check everything the run needs; every mistake in it is a `ValueError` here, before anything starts.

    Rank 0 looks at each shard, for all: the others trust what it finds, and end with it (`entry.begin`).
    """
    check_batches(cfg, ranks)
    check_extra(cfg.deepspeed)
    sources = opening.open_sources(cfg.data, trusting=not ranks.is_main)
    tokenizer = opening.open_tokenizer(cfg.data, sources)
    stream = opening.open_training(cfg.data, cfg.train, cfg.seed, sources, ranks.rank, ranks.world_size)
    cfg = with_steps(cfg, stream.epoch_samples)
    needed = tokenizer.vocab_size
    if 0 < cfg.model.vocab_size < needed:
        raise ValueError(f"model.vocab_size={cfg.model.vocab_size} is below the tokenizer's {needed} ids: take 0")
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or needed)
    checks.check_objective(cfg.objective, model)
    objective = make_objective(cfg.objective, tokenizer, cfg.seed)
    sparse = cfg.objective.name == "masked_lm"

    def find_new() -> dict[str, str]:
        if not cfg.init:
            return {}
        check_tokenizer(cfg.init, tokenizer)
        return entry.check_initial_weights(cfg, model, ranks)

    held_out, known = open_validation(cfg, tokenizer, objective, ranks), {source.fingerprint for source in sources}
    identity = {"train": " ".join(s.fingerprint for s in sources), "tokenizer_sha256": tokenizer.sha256}
    return Plan(
        config=cfg, model=model, tokenizer=tokenizer, stream=stream,
        collate=functools.partial(batch_of, objective),
        loss_rows=functools.partial(loss_rows, z_loss=cfg.objective.z_loss, sparse=sparse),
        validation=together({each.name: its for each, its in held_out.items()}),
        trains_on_held_out=tuple(
            str(each) for each, its in held_out.items() if not known.isdisjoint(its.stream.fingerprints)
        ),
        flops_per_token=functools.partial(
            flops_per_token, model, predicted=cfg.objective.mask_rate if sparse else 1.0
        ),
        identity=identity,
        changes=run_folder.check(cfg, identity) if ranks.is_main else (),
        find_new=find_new, new_parameters=find_new() if run_folder.begins(cfg) else None,
        files={},
    )  # fmt: skip


def check_batches(cfg: Config, ranks: dist.Ranks) -> None:
    """The batch of every phase must divide; `ValueError` says of which one."""
    for number, phase in enumerate(phases(cfg.train), -1):
        try:
            accumulation_steps(at_step(cfg.train, phase.from_step), ranks.world_size)
        except ValueError as error:
            if number < 0:
                raise
            raise ValueError(f"train.phases[{number}] (from step {phase.from_step}): {error}") from None


def check_tokenizer(init: str, tokenizer: Tokenizer) -> None:
    """Weights and shards must speak of the same ids."""
    theirs = run_of(Path(init))
    if load_tokenizer(theirs).sha256 != tokenizer.sha256:
        raise ValueError(
            f"init={init} has another tokenizer than the shards of data.train: write them with its own "
            f"(tools/write_shards.py --tokenizer {theirs})"
        )


def open_validation(
    cfg: Config, tokenizer: Tokenizer, objective: Callable, ranks: dist.Ranks
) -> dict[HeldOut, Validation]:
    """Each set of held-out shards that the config names, in its natural order."""
    samples, micro = cfg.train.eval_samples, cfg.train.micro_batch_size
    found = {}
    for held_out in held_out_sets(cfg.data.val):
        where = (held_out.place, cfg.data, cfg.train.seq_len, tokenizer)
        ordered = opening.open_held_out(*where, trusting=not ranks.is_main)
        found[held_out] = Validation(ordered, objective, samples, micro, tokenizer.byte_lengths())
    return found


if __name__ == "__main__":
    entry.main("pretrain", make_plan)
