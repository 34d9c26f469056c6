"""Fine-tune a model for a task: config -> examples -> model -> engine -> loop, the loop of pretraining.

    torchrun --nproc-per-node 2 -m pretrain.finetune task=classification init=runs/NAME run.name=mood \
        data.train=train.jsonl data.val=val.jsonl task.text=text task.label=label

`--help` lists every key; `--check` judges the configuration and the examples and trains nothing; `--drop-bad` leaves
out examples that cannot be learnt from. Started again, the same command continues the run.
"""

import functools
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from pretrain import dist, entry, run_folder, tuning
from pretrain.checkpoint.load import run_of
from pretrain.cli import among
from pretrain.config import compose
from pretrain.config.held_out import HeldOut, column, held_out_sets, parted
from pretrain.config.schema import Config, ModelConfig
from pretrain.config.steps import accumulation_steps, with_steps
from pretrain.engine.settings import check_extra
from pretrain.evaluation.validation import together
from pretrain.examples.stream import ExampleStream
from pretrain.examples.tables import read_table
from pretrain.files import TASK
from pretrain.hub import convert
from pretrain.hub.families import fitting_head
from pretrain.model.heads import parameter_shapes
from pretrain.model.transformer import flops_per_token
from pretrain.plan import Plan
from pretrain.tasks import Task, make_task
from pretrain.tasks.task import encode_and_tell
from pretrain.tasks.validation import TaskValidation
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer


def make_plan(cfg: Config, ranks: dist.Ranks) -> Plan:
    """Read and check everything the run needs; every mistake in it is a `ValueError` here, before anything starts."""
    accumulation_steps(cfg.train, ranks.world_size)
    check_extra(cfg.deepspeed)
    if cfg.task.name == "embedding" and cfg.train.global_batch_size < 2:
        raise ValueError("train.global_batch_size=1 leaves a pair alone, and it is told apart from the others of its "
                         "batch: take 2 or more")  # fmt: skip
    if not cfg.data.sources:
        raise ValueError("data.train has no value: give a file of examples")
    tokenizer = open_tokenizer(cfg)
    base = replace(cfg.model, vocab_size=cfg.model.vocab_size or tokenizer.vocab_size)
    table = read_table(cfg.data.sources, "data.train")
    others = (tokenizer, base, cfg.train.seq_len, cfg.data.packing, cfg.seed, table, cfg.objective)
    task = with_known_labels(cfg, make_task(cfg.task, *others), others, ranks)
    cfg = replace(cfg, task=task.config)
    task.check_room()
    examples = encode_and_tell(task, table, ranks.is_main)
    task.weigh(examples)
    stream = ExampleStream(examples, cfg.seed, cfg.train.global_batch_size, ranks.rank, ranks.world_size)
    files = {TASK: (json.dumps(task.described(), indent=1, ensure_ascii=False) + "\n").encode()}
    cfg = with_steps(cfg, len(examples))
    model = tuned_model(cfg, task, base)
    if model.head != "lm" and (cfg.objective.name != "causal_lm" or cfg.objective.z_loss):
        raise ValueError(f"objective is for language models: leave it as it is with task={cfg.task.name}")
    held_out = open_validation(cfg, task, ranks)
    validations = {each.name: its for each, its in held_out.items()}
    identity = {"train": examples.fingerprint, "tokenizer_sha256": tokenizer.sha256, "val": fingerprint(validations)}
    find_new = functools.partial(new_parameters, cfg, model, task, ranks)
    return Plan(
        config=cfg, model=model, tokenizer=tokenizer, stream=stream, collate=task.collate, loss_rows=task.loss_rows,
        validation=together(validations),
        flops_per_token=functools.partial(flops_per_token, model, frozen=tuning.frozen_layers(cfg.tuning, model)),
        identity=identity,
        changes=run_folder.check(cfg, identity) if ranks.is_main else (),
        find_new=find_new, new_parameters=find_new() if run_folder.begins(cfg) else None,
        trains_on_held_out=tuple(
            str(each) for each, its in held_out.items() if its.examples.fingerprint == examples.fingerprint
        ),
        files=files, trainable=tuning.trainable(cfg.tuning, model), lr_scale=tuning.lr_scale(cfg.tuning, model),
        best_metric=best_metric(cfg, task, validations) if validations else None,
    )  # fmt: skip


def best_metric(cfg: Config, task: Task, validations: dict[str, TaskValidation]) -> str:
    """The figure that says which checkpoint is the best: by default one of the first held-out set."""
    first, validation = next(iter(validations.items()))
    best = cfg.tuning.best or column(first, parted(task.best_on(validation.examples))[1])
    known = [column(name, figure) for name, each in validations.items() for figure in task.figures_of(each.examples)]
    if best not in known:
        raise ValueError(f"tuning.best={best} is no figure of task={cfg.task.name}: take one of {', '.join(known)}")
    return best


def open_tokenizer(cfg: Config) -> Tokenizer:
    """That of `init`, or of the run that goes on; a model that begins anew is told which."""
    if not cfg.init and cfg.data.tokenizer:
        tokenizer = load_tokenizer(cfg.data.tokenizer)
        if 0 < cfg.model.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"model.vocab_size={cfg.model.vocab_size} is below the tokenizer's "
                             f"{tokenizer.vocab_size} ids: take 0")  # fmt: skip
        return tokenizer
    if not cfg.init:
        raise ValueError("init is null, so the model begins anew: name its tokenizer with data.tokenizer=..., and the "
                         "model with model=...; or give init=runs/NAME")  # fmt: skip
    if cfg.data.tokenizer:
        raise ValueError(f"init={cfg.init} brings its own tokenizer: leave data.tokenizer out")
    goes_on = (cfg.run.folder / "config.yaml").is_file() and not Path(cfg.init).exists()
    return load_tokenizer(cfg.run.folder if goes_on else run_of(Path(cfg.init)))


def with_known_labels(cfg: Config, task: Task, others: tuple, ranks: dist.Ranks) -> Task:
    """The task; a head that has all labels of the data stays as it is, with those that the data has not."""
    if cfg.task.labels is not None or not task.labels or not set(task.labels) <= set(known := known_labels(cfg)):
        return task
    if ranks.is_main and (absent := [label for label in known if label not in task.labels]):
        kept = f"the head keeps labels that data.train has not: {among('', absent)} (task.labels=[...] drops them)"
        print(kept, file=sys.stderr)
    return make_task(replace(cfg.task, labels=known), *others)


def known_labels(cfg: Config) -> list[str]:
    """The labels, in their order, of the run that goes on, or of the model that is tuned on."""
    own = cfg.run.folder / "config.yaml"
    if own.is_file():
        before = compose.read(own).task
        return (before and before.labels) or []
    return convert.task_of(Path(cfg.init)).get("labels", []) if cfg.init else []


def tuned_model(cfg: Config, task: Task, base: ModelConfig) -> ModelConfig:
    """The model with the head that the task needs and, for LoRA, its thin matrices."""
    model = base if task.head == base.head == "lm" else fitting_head(base, task.head, len(task.labels))
    if cfg.task.pooling == "first" and model.causal:
        raise ValueError("task.pooling=first: in a model that looks back only the first token sees no other: take last "
                         "or mean")  # fmt: skip
    if cfg.task.pooling:
        model = replace(model, pooling=cfg.task.pooling)
    if cfg.tuning.method == "lora":
        settings = cfg.tuning
        model = replace(
            model, lora_rank=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_on=settings.lora_on
        )  # fmt: skip
    return model


def new_parameters(cfg: Config, model: ModelConfig, task: Task, ranks: dist.Ranks) -> dict[str, str]:
    """The parameters that begin anew, each with the reason: also a head of the right shape, where its labels mean
    something else.
    """
    if not cfg.init:
        return {}
    new, theirs = entry.check_initial_weights(cfg, model, ranks), convert.task_of(Path(cfg.init)).get("labels", [])
    if theirs and theirs != task.labels:
        for name in parameter_shapes(model):
            if name.startswith("head."):
                new.setdefault(name, f"its labels are others ({among('', theirs)})")
    return new


def open_validation(cfg: Config, task: Task, ranks: dist.Ranks) -> dict[HeldOut, TaskValidation]:
    """Each set of held-out examples that the config names."""
    found = {}
    for held_out in held_out_sets(cfg.data.val):
        table = read_table(held_out.place, "data.val").some(cfg.train.eval_samples)
        examples = encode_and_tell(task, table, ranks.is_main)
        found[held_out] = TaskValidation(task, table, examples, cfg.train.micro_batch_size)
    return found


def fingerprint(validations: dict[str, TaskValidation]) -> str:
    """What tells the held-out examples from all others: of one set without a name its own; else names count too, and
    their order, because a run's figures and its best checkpoint go by them.
    """
    if "" in validations:
        return validations[""].examples.fingerprint
    named = [f"{name}={each.examples.fingerprint}" for name, each in validations.items()]
    return hashlib.sha256(" ".join(named).encode()).hexdigest() if named else "none"


if __name__ == "__main__":
    sys.argv = ["task.drop_bad=true" if argument == "--drop-bad" else argument for argument in sys.argv]
    entry.main("finetune", make_plan)
