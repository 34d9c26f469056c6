"""Stands in for the trainer in test_launch.py, started by the launchers as MODULE: saves on a signal, starts a child.

NPROC=2 MODULE=tests.dist.stub_trainer launch/torchrun.sh FOLDER
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    if "--check" in arguments or "--help" in arguments:
        print("checked" if "--check" in arguments else "help")
        return
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    subprocess.Popen(["sleep", "600"])  # like W&B's service or a data worker: must not outlive the launch
    folder, rank = Path(arguments[0]), os.environ["RANK"]
    (folder / f"started-{rank}").write_text(str(os.getpid()))
    while not received:
        time.sleep(0.05)
    if "stubborn" in arguments:
        time.sleep(600)
    (folder / f"saved-{rank}").write_text(signal.Signals(received[0]).name)


if __name__ == "__main__":
    main()
