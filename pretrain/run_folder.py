"""The folder of a run: whose it is, who writes in it, what it was and what may change when it goes on."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint.manifest import committed
from pretrain.cli import Held
from pretrain.config import compose
from pretrain.config.schema import Config, differences
from pretrain.files import DATA, holder, read_object, take, why_not_in
from pretrain.optim.schedule import learning_rate

SHAPES_EXAMPLES = ("train.seq_len:", "data.train:")  # what makes other examples of the same file, or of another
LOCK = ".lock"  # held by the process that trains, as long as it lives
PREDECESSOR_SECONDS = 600  # what is left of a launch has so long to save and end before the same launch, restarted


def begins(cfg: Config) -> bool:
    """Whether the run has no checkpoint to go on from."""
    return not committed(cfg.run.folder / "checkpoints")


def check(cfg: Config, identity: dict) -> tuple[str, ...]:
    """Refuse a folder that holds another run, that another process trains, or that cannot be written; else the settings
    that changed and that the run can go on with, and what follows from that.
    """
    folder = cfg.run.folder
    _check_place(folder)
    if not folder.exists() or not any(path.name != LOCK for path in folder.iterdir()):
        return ()
    if other := _without_predecessor(lambda: holder(folder / LOCK)):
        raise Held(_busy(folder, other))
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} exists and is not a run: choose another run.name")
    if cfg.resume == "never":
        raise ValueError(f"{folder} holds a run already: choose another run.name, or resume=auto to continue it")
    before = compose.read(folder / "config.yaml")
    safe, unsafe = differences(before, cfg)
    old = read_object(folder / DATA) or identity  # without: it ended before its first step
    changed = [key for key, value in identity.items() if old.get(key) != value]
    if "val" in changed:
        unsafe += [setting for setting in safe if setting.startswith(("data.val", "train.eval_samples"))]
    reasons = [setting for setting in safe if setting.startswith(SHAPES_EXAMPLES)] if cfg.task else []
    if reasons and {"train", "val"} & set(changed):
        unsafe, changed = [*unsafe, *reasons], []
    unsafe += [f"data ({key}): {str(old.get(key))[:12]} -> {identity[key][:12]}" for key in changed]
    if unsafe:
        changes = "; ".join(unsafe)
        raise ValueError(f"{folder} holds a run of another config ({changes}): choose another run.name")
    return (*safe, *_jump(before, cfg))


def hold(folder: Path) -> None:
    """Make the folder, and lock it for this process until it ends; `Held` when another one trains there."""
    folder.mkdir(parents=True, exist_ok=True)
    about = ", ".join(_launches())
    if other := _without_predecessor(lambda: take(folder / LOCK, f" ({about})" if about else "")):
        raise Held(_busy(folder, other))


def _launches() -> dict[str, bool]:
    """The launches that this process belongs to, of launchers that start again what has ended; and whether it did."""
    found, environment = {}, os.environ
    if job := environment.get("SLURM_JOB_ID"):
        found[f"Slurm job {job}"] = environment.get("SLURM_RESTART_COUNT", "0") != "0"
    if "TORCHELASTIC_RUN_ID" in environment:  # which is "none" for most: the process that starts the ranks is one
        found[f"torchrun {os.getppid()}"] = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return found


def _without_predecessor(ask: Callable[[], str | None]) -> str | None:
    """Who holds the folder (`ask`), once what is left of this launch from before its restart has ended."""
    own = {launch for launch, is_restart in _launches().items() if is_restart}
    until, told = time.monotonic() + PREDECESSOR_SECONDS, False
    while (other := ask()) and own & {*other.partition(" (")[2].rstrip(")").split(", ")} and time.monotonic() < until:
        if not told:
            print(f"waiting until {other} ends, of which this is a restart", file=sys.stderr, flush=True)
            told = True
        time.sleep(1)
    return other


def _busy(folder: Path, other: str) -> str:
    return f"{folder} is being trained by {other}: wait until it ends, or choose another run.name"


def _check_place(folder: Path) -> None:
    """Refuse a folder in which nothing can be written, before anything was done."""
    if why := why_not_in(folder):
        raise ValueError(f"run.root={folder.parent}: {why}: choose another run.root")


def _jump(before: Config, cfg: Config) -> list[str]:
    """The learning rate of the last step and of the next, where changed settings make it jump."""
    if begins(cfg):
        return []
    step = int(committed(cfg.run.folder / "checkpoints")[0].name.removeprefix("step-"))
    if not 0 < step < cfg.train.steps:
        return []
    planned, now, last = (
        learning_rate(at, config.train.steps or step, config.optim.lr, config.schedule)
        for config, at in ((before, step), (cfg, step), (before, step - 1))
    )
    if abs(now - planned) <= 0.1 * max(now, planned):
        return []
    told = f"the learning rate goes from {last:.2e} at step {step} to {now:.2e} at step {step + 1}"
    smooth = "schedule=wsd keeps it until its last part, so that a run can be made longer without a jump"
    return [f"{told} ({smooth})" if cfg.schedule.name in ("cosine", "linear") else told]
