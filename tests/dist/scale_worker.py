"""Run under torchrun by test_scale.py: what a step says to other ranks; on 4, what further settings change. As JSON.

torchrun --nproc-per-node 4 tests/dist/scale_worker.py SHARDS OUT.json
"""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import deepspeed.utils.groups
import torch
from engine_worker import build, is_in_one_go, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import dist, entry
from pretrain import train as train_entry
from pretrain.config import compose
from pretrain.engine import memory
from pretrain.guard import REASONS
from pretrain.stream.stream import HASH_SUMS

RUN = ["model=llama_tiny", "model.layers=2", "train.seq_len=32", "train.micro_batch_size=2", "log=none",
       "log.sample_tokens=0", "train.save_every=0", "train.eval_every=0", "train.steps=3"]  # fmt: skip
OURS = 8 * (1 + 1 + HASH_SUMS + len(REASONS))  # bytes: the loss, the next batch's targets, its digests, reasons to stop

SMALL = {"stage3_param_persistence_threshold": 0}  # or the whole of so small a model is kept on every rank
# By stage: values of each setting that its default is not, and that change something of what this model goes through.
EXTRAS = {
    1: [{"reduce_bucket_size": 5000}, {"allgather_bucket_size": 5000}, {"contiguous_gradients": False}],
    2: [{"reduce_bucket_size": 5000}, {"overlap_comm": False}, {"reduce_scatter": False},
        {"contiguous_gradients": False}, {"use_multi_rank_bucket_allreduce": False}],
    3: [{"zero_hpz_partition_size": 2} | SMALL, {"zero_hpz_partition_size": 4} | SMALL, SMALL,
        {"reduce_bucket_size": 5000}, {"sub_group_size": 4000}, {"stage3_prefetch_bucket_size": 1000} | SMALL,
        {"stage3_max_live_parameters": 1000} | SMALL, {"stage3_max_reuse_distance": 0} | SMALL,
        {"stage3_model_persistence_threshold": 1000}, {"stage3_use_all_reduce_for_fetch_params": True} | SMALL,
        {"stage3_allgather_sequential": True} | SMALL, {"reduce_scatter": False}, {"contiguous_gradients": False},
        {"overlap_comm": False}],
}  # fmt: skip
OTHERS = [{"communication_data_type": "bf16"}, {"wall_clock_breakdown": True}, {"memory_breakdown": True},
          {"comms_logger": {"enabled": True}},
          {"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": "/dev/null"}}]  # fmt: skip


def main(shards: str, out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    spoken = {f"{precision}-{stage}": spoken_in_a_step(precision, stage, shards, out.parent / "runs", ranks, device)
              for precision in ("fp32", "bf16") for stage in range(4)}  # fmt: skip
    spoken |= {f"bf16-{stage}-muon": spoken_in_a_step("bf16", stage, shards, out.parent / "runs", ranks, device, "muon")
               for stage in range(4)}  # fmt: skip
    extras = tried(ranks, device) if ranks.world_size == 4 else {}
    if ranks.is_main:
        out.write_text(json.dumps({"spoken": spoken} | extras))
    dist.finish(0)


class Spoken(TorchDispatchMode):
    """Notes the collectives of this thread in turn: name, and the bytes that a rank gives, or gets of a scatter."""

    def __init__(self, journal: Path):
        super().__init__()
        self.said: list[tuple[str, int]] = []
        self.rows: list[int] = []  # of the journal, when the sum of each step begins
        self._journal = journal

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args["gather" in func.__name__ or "alltoall" in func.__name__]  # beside where the answer goes
            size = sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
            self.said.append((func.__name__.partition(".")[0], size))
            if self.said[-1] == ("allreduce_", OURS):
                self.rows.append(self._journal.read_text().count("\n"))
        return func(*args, **(kwargs or {}))


def spoken_in_a_step(
    precision: str, stage: int, shards: str, root: Path, ranks, device, optimizer: str = "adamw"
) -> dict:
    """[collective, bytes, how often] of one step of a real run, of 2 micro-batches: between the sums of two steps."""
    accumulation = 1 if is_in_one_go(stage, precision) else 2
    sys.argv = [sys.argv[0], f"run.root={root}", f"run.name={precision}-{stage}-{optimizer}", f"data.train={shards}",
                *RUN, f"train.precision={precision}", f"deepspeed=zero{stage}", f"optim={optimizer}",
                f"train.global_batch_size={2 * accumulation * ranks.world_size}"]  # fmt: skip
    plan = train_entry.make_plan(compose.from_command_line("pretrain", entry.model_of), ranks)
    with Spoken(plan.config.run.folder / "metrics.jsonl") as spoken:
        entry.run(plan, ranks, device)
    ours = [number for number, said in enumerate(spoken.said) if said == ("allreduce_", OURS)]
    steps = [spoken.said[first:last] for first, last in itertools.pairwise(ours)]
    assert len(steps) == 2 and steps[0] == steps[1], steps
    sizes = memory.counts(plan.model, optimizer)
    step = sorted([*said, count] for said, count in Counter(steps[0]).items())
    return {
        "rows": spoken.rows,
        "step": step,
        "parameters": sizes.parameters,
        "trained": sizes.trained,
        "matrices": 2 * sizes.trained - sizes.moments,  # numbers, of those that Muon steps
        "accumulation": accumulation,
    }


def tried(ranks, device) -> dict:
    found = []
    for part, stages in (("all", (1, 2, 3)), ("lora", (3,))):
        for stage in stages:
            found += [case(part, stage, {"zero_optimization": each}, ranks, device) for each in EXTRAS[stage]]
    found += [case("all", 1, each, ranks, device) for each in OTHERS]
    plain = {part: case(part, 1, {}, ranks, device)["losses"] for part in ("all", "lora")}
    return {"plain": plain, "found": found}


def case(part: str, stage: int, extra: dict, ranks, device) -> dict:
    """The losses of a few steps."""
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # one of a process otherwise
    losses = train(build(stage, "fp32", 1, ranks, device, part=part, extra=extra), ranks, 4)["losses"]
    return {"part": part, "stage": stage, "extra": extra, "losses": losses}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
