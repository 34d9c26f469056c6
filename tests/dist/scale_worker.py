"""Run under torchrun by test_scale.py: what DeepSpeed's further settings change of the results, as JSON.

torchrun --nproc-per-node 4 tests/dist/scale_worker.py OUT.json
"""

import json
import sys
from pathlib import Path

import deepspeed.utils.groups
from engine_worker import build, train

from pretrain import dist

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


def main(out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    found = []
    for part in ("all", "lora"):
        for stage, settings in EXTRAS.items():
            found += [case(part, stage, {"zero_optimization": each}, ranks, device) for each in settings]
    found += [case("all", 1, each, ranks, device) for each in OTHERS]
    plain = {part: case(part, 1, {}, ranks, device)["losses"] for part in ("all", "lora")}
    if ranks.is_main:
        out.write_text(json.dumps({"plain": plain, "found": found}))
    dist.finish(0)


def case(part: str, stage: int, extra: dict, ranks, device) -> dict:
    """The losses of a few steps."""
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # one of a process otherwise
    losses = train(build(stage, "fp32", 1, ranks, device, part=part, extra=extra), ranks, 4)["losses"]
    return {"part": part, "stage": stage, "extra": extra, "losses": losses}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
