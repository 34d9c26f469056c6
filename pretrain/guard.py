"""What ends a run early: a loss that is not finite, the signals that clusters send before they take a node away, and a
launcher that is gone.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import torch

from pretrain.cli import STOP_SIGNALS
from pretrain.config.schema import GuardConfig
from pretrain.dist import all_reduce_sum

ORPHANED = 1000  # above all signals
REASONS = (*STOP_SIGNALS, ORPHANED)
ANSWER = (
    "the run saves within two steps and stops (Ctrl-C again: at once, unsaved); the same command goes on from there"
)


def launchers() -> set[int]:
    """The processes, still alive, that started this rank: a launcher, and the script of `launch/` around that."""
    is_launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 or "LOCAL_WORLD_SIZE" in os.environ
    found = {os.getppid()} if is_launched else set()
    if script := os.environ.get("PRETRAIN_LAUNCH"):
        found |= {int(script.partition("-")[0])}
    return {pid for pid in found if os.path.exists(f"/proc/{pid}")}


class Guard:
    """Watches one run. A stop signal on any rank becomes the same decision on all of them, between two steps.

    Without its launcher a rank would go on as an orphan, beside the run when that is started again. A process that has
    none (`python -m`) goes on when its shell is gone, as under nohup or setsid; else SIGHUP comes.
    """

    def __init__(self, config: GuardConfig, tells: bool = False):
        """`tells`: a signal is answered with a line at once."""
        self.config, self._tells = config, tells
        self.received, self._interrupted = 0, 0.0
        self.stopped: str | None = None  # why, once the ranks have agreed
        self.was_asked = False  # to stop: by a signal, that is
        self.launchers = launchers()
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted and time.monotonic() > self._interrupted + 1:  # `timeout` sends it twice
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._interrupted = self._interrupted or time.monotonic()
        if not self.received and self._tells:  # by a thread: a print of this one may be what was interrupted
            said = f"\n{signal.Signals(number).name}: {ANSWER}"
            threading.Thread(target=print, args=(said,), kwargs={"file": sys.stderr}, daemon=True).start()
        self.received = number

    def flags(self) -> list[float]:
        """For each of `REASONS` 1 where this rank has it to stop: a signal that it received, its launcher that is gone.
        `agreed` is asked with the sum of what all ranks say.
        """
        gone = ORPHANED if self.launchers - launchers() else 0
        return [float(reason == (self.received or gone)) for reason in REASONS]

    def agreed(self, sums: Sequence[float]) -> str | None:
        """Why the run is to stop, the same on every rank, or None."""
        if number := max((reason for reason, ranks in zip(REASONS, sums, strict=True) if ranks), default=0):
            self.was_asked = number != ORPHANED
            self.stopped = signal.Signals(number).name if self.was_asked else "the launcher is gone"
        return self.stopped

    def agreed_now(self) -> str | None:
        """The same of this moment, on all ranks: they wait for each other."""
        return self.agreed(all_reduce_sum(torch.tensor(self.flags())).tolist())

    def problem(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the run must end before anything of this step is saved, the same on every rank; None to go on."""
        if self.config.on_nonfinite == "ignore" or (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        return (
            f"step {step}: loss {loss}, gradient norm {grad_norm}. The last checkpoint is good: run the same command "
            "to go on from it, with a lower optim.lr, more schedule.warmup_steps or train.precision=fp32"
        )
