"""What ranks say to each other in a step, and what further settings of DeepSpeed change: speed, never the results."""

import functools

import pytest

from pretrain.config import compose
from pretrain.engine.settings import EXTRA_KEYS, ZERO_KEYS, deepspeed_config

# Collectives of a step of two micro-batches (one at stage 0 in bf16), those of single numbers counted.
SAID = {"fp32-0": 3, "fp32-1": 6, "fp32-2": 7, "fp32-3": 25, "bf16-0": 2, "bf16-1": 4, "bf16-2": 8, "bf16-3": 25}


@pytest.fixture(scope="module")
def results(worker, shards):
    """{number of ranks: what scale_worker.py found}."""
    return functools.cache(lambda ranks: worker("scale_worker.py", shards / "train", ranks=ranks))


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_what_ranks_say_in_a_step(results, ranks):
    """The formula of pretrain/engine/README.md: one small sum of ours, and what the stage asks for."""
    for case, found in results(ranks)["spoken"].items():
        precision, stage, *optimizer = case.split("-")
        stage, low = int(stage), 4 if precision == "fp32" else 2
        assert found["rows"] == [0, 0, 1], "the figures of a step are read when the next one is under way"
        trained, micro_batches = found["trained"], found["accumulation"]
        matrices = [said for said in found["step"] if said[0] in ("alltoall_base_", "broadcast_")]
        found["step"] = [said for said in found["step"] if said not in matrices]
        small = {size: count for name, size, count in found["step"] if size <= 88 and "gather" not in name}
        assert small.pop(88) == 1 and sum(small.values()) <= 4 and max(small, default=0) <= 8, "sums of a number"
        reduced = {(name, size): count for name, size, count in found["step"] if size > 88 and "gather" not in name}
        gathered = sum(size * count for name, size, count in found["step"] if "gather" in name)
        if stage < 3:
            times = micro_batches if stage == 2 else 1
            assert reduced == {("allreduce_", 4 * trained): times}
            assert gathered == (pytest.approx(low * trained / ranks, rel=0.001) if stage else 0)
        else:
            [((name, size), times)] = reduced.items()
            assert (name, times) == ("_reduce_scatter_base_", micro_batches)
            assert size == pytest.approx(4 * trained / ranks, rel=0.01)
            assert gathered == pytest.approx(low * found["parameters"] / ranks, rel=0.01)
        if optimizer:
            check_matrices(matrices, stage, ranks, found["matrices"])
        else:
            assert not matrices
            assert sum(count for *_, count in found["step"]) == SAID[case], "whatever the number of ranks"


def check_matrices(said, stage, ranks, numbers):
    """Muon's, in bf16: updates of whole matrices (stage 0), pieces of all (3), or of the few that lie on two ranks."""
    moved, calls = sum(size * count for _, size, count in said), sum(count for *_, count in said)
    if stage == 0:
        assert {name for name, *_ in said} == {"broadcast_"} and (moved, calls) == (2 * numbers, 14)
    elif stage == 3:
        assert {name for name, *_ in said} == {"alltoall_base_"} and calls == 2 * -(-14 // ranks)
        assert moved == pytest.approx(2 * 2 * numbers / ranks, rel=0.3), "the rank's share, there and back"
    else:
        assert calls <= 4 and moved <= 4 * 2 * (128 * 64) and bool(calls) == (ranks > 2), "two blocks: one a rank"


def test_further_settings_change_no_result(results):
    """Parts gathered within a node (hpz) too, whether all of the model learns or adapters beside what does not."""
    tried, tops = set(), {"zero_optimization"}
    for case in results(4)["found"]:
        rel = 0.01 if case["extra"].get("communication_data_type") == "bf16" else 1e-6
        assert case["losses"] == pytest.approx(results(4)["plain"][case["part"]], rel=rel), case
        tried |= set(case["extra"].get("zero_optimization", {}))
        tops |= set(case["extra"])
    assert tried == set(ZERO_KEYS) and tops == set(EXTRA_KEYS), "what is passed on is tried here"


def with_extra(extra, *overrides, accumulation=2, precision="fp32"):
    cfg = compose.compose("pretrain", ["run.name=x", f"++deepspeed.extra={extra}", *overrides]).deepspeed
    return deepspeed_config(cfg, 4 * accumulation, 2, accumulation, 1.0, precision)


def test_extra_settings_are_those_that_are_tried():
    settings = with_extra("{zero_optimization: {overlap_comm: false}}")["zero_optimization"]
    assert settings["stage"] == 1 and settings["overlap_comm"] is False and settings["reduce_bucket_size"] == 50_000_000
    for extra, said in (
        (
            "{zero_optimisation: {}}",
            "deepspeed.extra.zero_optimisation is not passed on to DeepSpeed; these are: zero_",
        ),
        ("{zero_optimization: {overlap_com: true}}", "zero_optimization.overlap_com is not passed on to DeepSpeed"),
        ("{zero_optimization: {round_robin_gradients: true}}", "nothing tests here what it does; these are: reduce_"),
        ("{data_types: {grad_accum_dtype: bf16}}", "deepspeed.extra.data_types is not passed on"),
        ("{zero_optimization: {stage: 3}}", "deepspeed=zero0"),
    ):
        with pytest.raises(ValueError, match=said):
            with_extra(extra)


def test_stage_0_adds_up_micro_batches_in_fp32_only():
    with pytest.raises(ValueError, match="add up the gradients of 2 micro-batches in bf16: take deepspeed=zero1"):
        with_extra("{}", "deepspeed=zero0", precision="bf16")
    assert with_extra("{}", "deepspeed=zero0", precision="bf16", accumulation=1)["bf16"]["enabled"]
    assert with_extra("{}", "deepspeed=zero0")["zero_optimization"]["stage"] == 0
    with pytest.raises(ValueError, match="deepspeed=zero0 does not scale the loss, .* take deepspeed=zero1"):
        with_extra("{}", "deepspeed=zero0", precision="fp16", accumulation=1)


def test_each_stage_is_set_up_for_speed_and_little_memory():
    """Stage 2 reduces while it computes; stage 1 in bf16 keeps no gradient twice."""
    assert with_extra("{}", "deepspeed=zero2")["zero_optimization"]["overlap_comm"] is True
    assert with_extra("{}", precision="bf16")["bf16"]["immediate_grad_update"] is True
