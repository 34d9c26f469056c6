"""What further settings of DeepSpeed change, on 4 real ranks: speed and memory, never the results."""

import pytest

from pretrain.config import compose
from pretrain.engine.settings import EXTRA_KEYS, ZERO_KEYS, deepspeed_config


@pytest.fixture(scope="module")
def results(worker):
    return worker("scale_worker.py", ranks=4)


def test_further_settings_change_no_result(results):
    """Parts gathered within a node (hpz) too, whether all of the model learns or adapters beside what does not."""
    tried, tops = set(), {"zero_optimization"}
    for case in results["found"]:
        rel = 0.01 if case["extra"].get("communication_data_type") == "bf16" else 1e-6
        assert case["losses"] == pytest.approx(results["plain"][case["part"]], rel=rel), case
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_0_adds_up_micro_batches_in_fp32_only(precision):
    with pytest.raises(
        ValueError, match=f"add up the gradients of 2 micro-batches in {precision}: take deepspeed=zero1"
    ):
        with_extra("{}", "deepspeed=zero0", precision=precision)
    assert with_extra("{}", "deepspeed=zero0", precision=precision, accumulation=1)[precision]["enabled"]
    assert with_extra("{}", "deepspeed=zero0")["zero_optimization"]["stage"] == 0


def test_each_stage_is_set_up_for_speed_and_little_memory():
    """Stage 2 reduces while it computes; stage 1 in bf16 keeps no gradient twice."""
    assert with_extra("{}", "deepspeed=zero2")["zero_optimization"]["overlap_comm"] is True
    assert with_extra("{}", precision="bf16")["bf16"]["immediate_grad_update"] is True
