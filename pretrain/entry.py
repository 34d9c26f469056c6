"""What every run goes through, whatever it learns: checks, the run's folder, the engine, its start, the loop, its end.

`train` and `finetune` make a `Plan` of a configuration; the rest is here.
"""

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import console, dist, hardware, loop, run_folder, threads
from pretrain.checkpoint import load
from pretrain.checkpoint.load import Weights, load_model
from pretrain.checkpoint.manifest import Reader, step_folder
from pretrain.checkpoint.save import Checkpoints
from pretrain.cli import FAILED, FINISHED, HELD, MISTAKE, STOPPED, Held, stops_as_ctrl_c
from pretrain.config import compose
from pretrain.config.schema import Config, ModelConfig, to_yaml
from pretrain.config.steps import accumulation_steps, at_step, phases
from pretrain.engine import memory
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import WEIGHT
from pretrain.engine.settings import bucket_of, check_stage, deepspeed_config
from pretrain.evaluation.validation import Best
from pretrain.files import DATA, NO_ROOM, RESULT, write_atomically
from pretrain.guard import Guard
from pretrain.hub import convert
from pretrain.inference import generate
from pretrain.model.heads import build_model, parameter_shapes
from pretrain.model.initial import fill_initial
from pretrain.plan import Plan, check_sample, disagreement, facts_of_data, notes, reasons, what_would_run, writes_sample
from pretrain.report import page
from pretrain.report.log import Log
from pretrain.stream.stream import DataError

MakePlan = Callable[[Config, dist.Ranks], Plan]
Refusal = tuple[int, str] | None  # exit code and message


def main(config_name: str, make_plan: MakePlan) -> None:
    """The command line: one voice for a user's mistake, a traceback for a failure, an exit code for each (`cli`)."""
    console.outlive("stdout", "stderr", unhurried=True)
    try:
        with stops_as_ctrl_c():
            begun = begin(config_name, make_plan)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted before training began: nothing is lost, run the same command again", file=sys.stderr)
        dist.finish(STOPPED, is_agreed=False)  # others may wait for what this one was to say
    if begun is not None:
        plan, ranks, _ = begun
        code, last = guarded(lambda: run(*begun), plan, ranks) or (FAILED, lambda: True)
        dist.finish(code, last=lambda: bool(guarded(last, plan, ranks)))


def begin(config_name: str, make_plan: MakePlan) -> tuple[Plan, dist.Ranks, torch.device] | None:
    """Everything up to the run, which all ranks agree on; None where the command line only asks for something."""
    check_only = "--check" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--check"]
    try:
        ranks, plan, mistake = dist.from_environment(is_launched=not check_only), None, None
    except ValueError as error:
        refuse([(MISTAKE, str(error))], dist.ALONE)
    try:
        cfg = compose.from_command_line(config_name, model_of)
        if cfg is None:
            return None
        plan = make_plan(cfg, ranks)
        check_sample(plan)
    except (ValueError, OSError) as error:
        mistake = refusal(error)
    if check_only:
        refuse([mistake], ranks)
        head = f"{plan.config.run.name}: {what_would_run(plan)}; nothing is wrong"
        print(head, *notes(plan), *plan.changes, sep="\nnote: ")
        print(f"folder: {plan.config.run.folder}")  # for scripts
        return None
    try:
        device = dist.start(ranks)
    except ValueError as error:  # before the ranks are together it may be of this one alone
        refuse([mistake or (MISTAKE, str(error))], ranks if torch.distributed.is_initialized() else dist.ALONE)
    precision = None
    try:
        if plan is not None:
            precision = check_device(plan, ranks, device)
    except ValueError as error:
        mistake = mistake or (MISTAKE, str(error))
    refuse(dist.all_gather_objects(mistake), ranks)
    if differing := disagreement(plan, precision):
        refuse([(MISTAKE, differing)], ranks)
    refuse(dist.all_gather_objects(held_elsewhere(plan) if ranks.is_main else None), ranks)
    return plan, ranks, device


def check_device(plan: Plan, ranks: dist.Ranks, device: torch.device) -> str:
    """The precision that this device trains in. `ValueError` for what it cannot train in that, or in its memory."""
    cfg = plan.config
    precision, stage = hardware.resolve_precision(cfg.train.precision, device), cfg.deepspeed.stage
    for phase in phases(cfg.train):
        check_stage(stage, precision, accumulation_steps(at_step(cfg.train, phase.from_step), ranks.world_size))
    plan.compiles(device)  # or a refusal
    if device.type == "cuda":
        sizes, bucket = memory.counts(plan.model, cfg.optim.name, plan.trainable), bucket_of(cfg.deepspeed)
        memory.check_fits(sizes, stage, ranks.world_size, precision, hardware.memory_of(device), bucket)
    return precision


def guarded(action: Callable[[], Any], plan: Plan, ranks: dist.Ranks) -> Any:
    """What a part of the run gives, or None where it fails; what a user can do something about is said in a line,
    anything else as it is.
    """
    try:
        return action()
    except FloatingPointError as error:  # on all ranks
        told = str(error) if ranks.is_main else ""
    except DataError as error:  # on the rank that met it
        told = str(error)
    except OSError as error:
        if error.errno is not None and error.errno not in NO_ROOM:
            traceback.print_exc()
            return None
        told = (f"{error}: the last checkpoint is good: make room in {plan.config.run.folder}, and run the same "
                "command to go on from it")  # fmt: skip
    except BaseException as error:
        traceback.print_exc()
        if not isinstance(error, RuntimeError) or not dist.is_timeout(error):
            return None
        told = (f"another rank has not answered in time ({dist.STEP_TIMEOUT}={dist.step_timeout().seconds}): it hangs, "
                "or its node is gone; the last checkpoint is good: run the same command to go on from it")  # fmt: skip
    if told:
        print(f"error: {told}", file=sys.stderr)
    return None


def model_of(init: str) -> dict:
    """The model of a run, of one of its checkpoints, or of a Hugging Face folder, as the keys of a config."""
    return asdict(convert.open_model(Path(init)).config)


def refusal(error: Exception) -> Refusal:
    return HELD if isinstance(error, Held) else MISTAKE, str(error)


def refuse(found: list[Refusal], ranks: dist.Ranks) -> None:
    """End all ranks with one message when any of them found a reason."""
    if refused := next(filter(None, found), None):
        if ranks.is_main:
            print(f"error: {refused[1]}", file=sys.stderr)
        dist.finish(refused[0])


def held_elsewhere(plan: Plan) -> Refusal:
    """Take the run's folder for this process; why that cannot be, or None."""
    try:
        run_folder.hold(plan.config.run.folder)
    except (ValueError, OSError) as error:
        return refusal(error)
    return None


def check_initial_weights(cfg: Config, model: ModelConfig, ranks: dist.Ranks) -> dict[str, str]:
    """Judge whether `init` can start this run; returns the parameters that begin anew, each with the reason: those that
    `init` lacks, and heads of another shape.
    """
    weights, new = convert.open_model(Path(cfg.init), model), {}
    if isinstance(weights, Weights):
        weights.verify(ranks)
    elif ranks.is_main:
        weights.check_copies()
    for name, shape in parameter_shapes(model).items():
        found = weights.shapes.get(name)
        if found == shape:
            continue
        is_added = "lora_" in name
        if name.startswith("trunk.") and not is_added:
            raise ValueError(f"init={cfg.init}: {name} has shape {found} there and {shape} in this model")
        lacks = "LoRA adds it" if is_added else "the model has none of this kind"
        new[name] = lacks if found is None else f"it is {list(found)} there and {list(shape)} here"
    return new


def run(plan: Plan, ranks: dist.Ranks, device: torch.device) -> tuple[int, Callable[[], bool]]:
    """A checked run on this rank, from its last checkpoint or its first step to the last: its exit code, and what this
    rank has to do then, with which no other has to do (`dist.finish`).
    """
    cfg, folder, guard = plan.config, plan.config.run.folder, Guard(plan.config.guard, tells=ranks.is_main)
    precision = hardware.resolve_precision(cfg.train.precision, device)
    hardware.set_deterministic(cfg.train.deterministic)
    if ranks.is_main:
        print(f"{cfg.run.name}: {ranks.world_size} x {device.type}, {precision}, ZeRO stage {cfg.deepspeed.stage}; "
              "measuring the peak and building the model", flush=True)  # fmt: skip
        for note in notes(plan, device, precision):
            print(f"note: {note}", flush=True)
        if plan.changes:
            print(f"{cfg.run.name} goes on with changed settings: {'; '.join(plan.changes)}", flush=True)
        write_run_folder(plan)
    computes_with = threads.settle(folder, ranks, device)
    if said := threads.note(ranks, device):
        print(f"note: {said}", flush=True)
    peak, peak_source = hardware.peak_flops(device, precision)
    trainer = build_engine(plan, precision, ranks, device)
    rejected: list[dict] = []
    found = load.choose(folder / "checkpoints", ranks, lambda kind, **facts: rejected.append(facts))
    if not found and plan.new_parameters is None:  # none of its checkpoints is whole
        plan = begun_anew(plan)
    start_step = start_from(found, trainer, plan)
    log = Log(cfg.log, folder, cfg.train.steps, asdict(cfg), start_step, ranks.is_main)
    for facts in rejected:
        log.event("checkpoint_rejected", **facts)
    log.event(
        "resume" if found else "start", step=start_step, checkpoint=found and found.name, ranks=ranks.world_size,
        zero_stage=cfg.deepspeed.stage, precision=precision, device=device.type, threads=computes_with,
        peak_source=peak_source, peak_tflops=peak * ranks.world_size / 1e12, interface=os.environ.get(dist.INTERFACE),
        compile="blocks" if trainer.compiles else "none",
    )  # fmt: skip
    tell_contents(plan, log, is_new=not found)
    best = best_so_far(plan, ranks)
    file_bytes = int(cfg.train.checkpoint_file_gb * 1e9)
    checkpoints = Checkpoints(folder / "checkpoints", ranks, cfg.train.keep_checkpoints, log.event, file_bytes)
    data = loop.Data(plan.stream, plan.collate, plan.validation, best)
    model = loop.ModelFacts(asdict(plan.model), plan.flops_per_token, peak * ranks.world_size)
    if start_step >= cfg.train.steps:
        log.say(f"{cfg.run.name} is complete at step {start_step}: raise train.steps to go on")
    step = loop.train_loop(cfg, trainer, data, model, checkpoints, guard, log, ranks, start_step)
    code = FINISHED if not guard.stopped or step == cfg.train.steps else STOPPED if guard.was_asked else FAILED
    return code, functools.partial(tell_end, plan, log, best, start_step, step) if ranks.is_main else lambda: True


def begun_anew(plan: Plan) -> Plan:
    """The plan of a run none of whose checkpoints is whole: `ValueError` on all ranks where it cannot start again."""
    found: list[dict[str, str]] = []
    if error := dist.agree(lambda: found.append(plan.find_new())):
        raise ValueError(error)
    return replace(plan, new_parameters=found[0])


def tell_end(plan: Plan, log: Log, best: Best | None, start_step: int, step: int) -> bool:
    """The last words of a run, by rank 0 alone: a sample text, the report. True when they are written."""
    cfg, folder = plan.config, plan.config.run.folder
    if start_step < step == cfg.train.steps:
        log.doing("writing a sample text")
        attempt(lambda: write_sample(plan, step), "the sample text", log)
    if best and best.step is not None:
        log.say(f"{cfg.run.name}: {best.told()}; {folder / RESULT}")
    log.doing("drawing the report")
    report = attempt(lambda: str(page.write_report(folder)), "the report", log)
    log.event("end", step=step, of=cfg.train.steps, report=report)
    log.close()
    return True


def attempt(action: Callable[[], Any], what: str, log: Log) -> Any:
    """What `action` gives; None where it fails: the run is trained and saved, and nothing after that undoes it."""
    try:
        return action()
    except Exception as error:
        log.event("not_written", what=what, error=f"{type(error).__name__}: {error}")


def tell_contents(plan: Plan, log: Log, is_new: bool) -> None:
    """Events of what a run starts from and of what it reads."""
    if plan.config.init and is_new:
        log.event("initialised", init=plan.config.init, anew=list(plan.new_parameters), **reasons(plan))
    for facts in plan.stream.summary(plan.config.train.steps):
        log.event("source", **facts)
    phases = plan.stream.phase_summary(plan.config.train.steps)
    for phase in phases if len(phases) > 1 else ():
        log.event("phase", **phase)


def best_so_far(plan: Plan, ranks: dist.Ranks) -> Best | None:
    """What the journal, cut back to the step that training goes on from, says of the evaluations before it."""
    if plan.best_metric is None:
        return None
    rows: list[dict] = []
    if ranks.is_main:
        with open(plan.config.run.folder / "metrics.jsonl", encoding="utf-8") as journal:
            rows = [row for row in map(json.loads, journal) if plan.best_metric in row]
    patience, folder = plan.config.tuning.early_stopping, plan.config.run.folder if ranks.is_main else None
    return Best(plan.best_metric, patience, dist.all_gather_objects(rows)[0], folder)


def write_run_folder(plan: Plan) -> None:
    """The resolved config, what identifies the data, the tokenizer and the environment: the run explains itself."""
    plan.config.run.folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.yaml": to_yaml(plan.config).encode(),  # first: by it a folder is known to be a run
        DATA: json.dumps(facts_of_data(plan), indent=1, ensure_ascii=False).encode(),
        plan.tokenizer.file_name: plan.tokenizer.file_bytes,
        "environment.json": json.dumps(hardware.environment(), indent=1).encode(),
        **plan.files,
    }.items():
        write_atomically(plan.config.run.folder / name, content)


def build_engine(plan: Plan, precision: str, ranks: dist.Ranks, device: torch.device) -> Engine:
    """The model under DeepSpeed, with weights still to be filled in (`start_from`)."""
    cfg, batch, micro = plan.config, plan.config.train.global_batch_size, plan.config.train.micro_batch_size
    accumulation = accumulation_steps(cfg.train, ranks.world_size)
    clip = cfg.optim.grad_clip
    settings = deepspeed_config(cfg.deepspeed, batch, micro, accumulation, clip, precision)

    def build() -> torch.nn.Module:
        model = build_model(plan.model, cfg.train.activation_checkpointing)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and plan.trainable(name))
        return model

    compiles = plan.compiles(device)
    return Engine(build, plan.loss_rows, settings, cfg.optim, ranks, device, plan.lr_scale, compiles)


def start_from(found: Reader | None, trainer: Engine, plan: Plan) -> int:
    """Fill the engine from a checkpoint, or from `init`, or with initial values; returns the steps done."""
    if found is not None:
        plan.stream.resume(found.header.state, found.header.step)
        header = load.fill(found, trainer.layout.fragments())
        trainer.layout.refresh(header.optimizer_steps)
        trainer.loss_scale = header.loss_scale
        return header.step
    weights = convert.open_model(Path(plan.config.init), plan.model) if plan.config.init else None
    for fragment in trainer.layout.fragments():
        if fragment.kind != WEIGHT:
            continue
        if weights and fragment.name not in plan.new_parameters:
            fragment.values.copy_(weights.read_range(fragment.name, fragment.offset, fragment.values.numel()))
        else:
            fill_initial(fragment.values, fragment.offset, fragment.name, fragment.shape, plan.model, plan.config.seed)
    trainer.layout.refresh(0)
    return 0


def write_sample(plan: Plan, step: int) -> None:
    """Add a continuation of `log.sample_prompt`, from the checkpoint just saved, to the run's samples."""
    settings, folder = plan.config.log, plan.config.run.folder
    if not writes_sample(plan):
        return
    model = load_model(step_folder(folder / "checkpoints", step))
    text = "".join(generate.continue_text(model, plan.tokenizer, settings.sample_prompt, settings.sample_tokens))
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
        sample = {"step": step, "prompt": settings.sample_prompt, "text": text, "time": time.time()}
        file.write(json.dumps(sample) + "\n")
