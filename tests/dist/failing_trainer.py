"""Stands in for the trainer in test_slurm.py, as MODULE: fails with or without a new checkpoint, or saves for long.

MODULE=tests.dist.failing_trainer sbatch launch/slurm.sbatch run.root=FOLDER run.name=NAME +fails=[step-1,step-2,-]
"""

import os
import signal
import sys
import time
from pathlib import Path

SAVED = '{"time": "now", "kind": "saved", "step": 5, "seconds": 100.5, "megabytes": 1.3}\n'


def main() -> None:
    said = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    run, attempt = Path(said["run.root"]) / said["run.name"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if "--check" in sys.argv:
        print(f"nothing is wrong\nfolder: {run}")
        return
    if "fails" in said:
        made = said["fails"].strip("[]").split(",")[attempt]
        if made != "-":
            (run / "checkpoints" / made).mkdir(parents=True, exist_ok=True)
        sys.exit(1)
    if attempt:
        return
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    run.mkdir(parents=True, exist_ok=True)
    Path(os.environ["PRETRAIN_EXIT_CODE"]).write_text("75\n")
    (run / "events.jsonl").write_text(SAVED)
    time.sleep(600)


if __name__ == "__main__":
    main()
