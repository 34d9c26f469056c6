"""Run under torchrun by tests/tasks/test_instruct.py: what ranks write together in an evaluation; results as JSON.

torchrun --nproc-per-node 2 tests/dist/written_worker.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch

from pretrain import dist
from pretrain.tasks.validation import continued
from tests.models import some_prompts, tiny_model


def main(out: Path) -> None:
    ranks, model, calls = dist.from_environment(), tiny_model(), []
    dist.start(ranks)
    model.register_forward_hook(lambda *_: calls.append(1))

    def evaluate(function) -> torch.Tensor:
        return function(model).double().cpu()

    cases = (some_prompts()[:5], ()), (some_prompts()[:5], range(50)), ([[7]], ())
    ids = [continued(2, evaluate, ranks, prompts, 9, stop_ids) for prompts, stop_ids in cases]
    results = dist.all_gather_objects({"ids": ids, "calls": len(calls)})
    if ranks.is_main:
        out.write_text(json.dumps(results))
    dist.finish(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
