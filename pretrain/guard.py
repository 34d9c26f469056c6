"""What ends a run early: a loss that is not finite, and the signals that clusters send before they take a node away."""

import math
import signal

import torch

from pretrain.cli import STOP_SIGNALS
from pretrain.config.schema import GuardConfig
from pretrain.dist import all_gather_tensor


class Guard:
    """Watches one run. A stop signal on any rank becomes the same decision on all of them, between two steps."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.received = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = number

    def agreed_stop(self) -> str | None:
        """The name of a stop signal that some rank received, the same on every rank, or None. On all ranks."""
        number = int(all_gather_tensor(torch.tensor([self.received])).max())
        return signal.Signals(number).name if number else None

    def problem(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the run must end before anything of this step is saved, the same on every rank; None to go on."""
        if self.config.on_nonfinite == "ignore" or (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        return (
            f"step {step}: loss {loss}, gradient norm {grad_norm}. The last checkpoint is good: run the same command "
            "to go on from it, with a lower optim.lr, more schedule.warmup_steps or train.precision=fp32"
        )
