"""Run under torchrun by test_finetune.py: many fine-tuning runs, one after the other, in one process group.

    torchrun --nproc-per-node 2 tests/dist/finetune_worker.py RUNS.json     # a list of command lines
"""

import json
import sys
from pathlib import Path

from pretrain import compose, dist, entry, finetune


def main(runs: list[list[str]]) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    for overrides in runs:
        sys.argv = [sys.argv[0], *overrides]
        entry.run(finetune.make_plan(compose.from_command_line("finetune", entry.model_of), ranks), ranks, device)
    dist.finish(0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
