"""Run by test_checkpoint.py: a save is killed (SIGKILL) at each of its file operations in turn; results as JSON.

python tests/dist/kill_worker.py OUT.json
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from pretrain import dist
from pretrain.checkpoint import load
from pretrain.checkpoint.save import Checkpoints
from tests.dist.checkpoint_worker import correct, fragments, header

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def in_child(action) -> int:
    """Run `action` in a forked process with a process group of its own; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            dist.start(dist.ALONE)
            action()
        except BaseException:
            os._exit(9)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def save(folder: Path, step: int, kill_at: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in WATCHED and str(folder) in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    saver = Checkpoints(folder, dist.ALONE, 1, lambda *args, **facts: None)
    sys.addaudithook(hook)
    saver.save(header(step), fragments(step, [0, 1], 0))
    assert saver.wait()


def check(folder: Path) -> None:
    """Exit with 0 only when a checkpoint is there, complete and right, and nothing half written is left."""
    Checkpoints(folder, dist.ALONE, 1, lambda *args, **facts: None)
    chosen = load.choose(folder, dist.ALONE, lambda *args, **facts: os._exit(8))
    loaded = fragments(0, [0, 1], 0)
    step = load.fill(chosen, loaded).step
    visible = {path.name for path in folder.iterdir()}
    good = correct(loaded, step) and all(name.startswith("step-") for name in visible)
    os._exit(step if good else 7)


def main(out: Path) -> None:
    statuses, survivors = [], []
    for kill_at in range(1, 100):
        folder = out.parent / "kill"
        shutil.rmtree(folder, ignore_errors=True)
        assert in_child(lambda folder=folder: save(folder, 1, 0)) == 0
        statuses.append(in_child(lambda folder=folder, at=kill_at: save(folder, 2, at)))
        survivors.append(os.waitstatus_to_exitcode(in_child(lambda folder=folder: check(folder))))
        if statuses[-1] == 0:
            break
    out.write_text(json.dumps({"statuses": statuses, "survivors": survivors}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
