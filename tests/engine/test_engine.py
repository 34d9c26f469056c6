"""DeepSpeed ZeRO through the engine, on 2 real ranks: equal losses, gradients and checkpoints at every stage."""

import math
from collections import defaultdict

import pytest


@pytest.fixture(scope="module")
def results(worker):
    """{number of ranks: what engine_worker.py found}."""
    return {ranks: worker("engine_worker.py", ranks=ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fp32_losses_are_the_same_at_every_stage(results, ranks, stage):
    reference = results[1]["stages"]["fp32-0"]
    found = results[ranks]["stages"][f"fp32-{stage}"]
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert reference["losses"][5] < reference["losses"][1] - 0.1, "two batches seen thrice are learnt"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_follows_fp32_at_every_stage(results, ranks, stage):
    found = results[ranks]["stages"][f"bf16-{stage}"]["losses"]
    reference = results[1]["stages"]["fp32-0"]["losses"]
    assert found == pytest.approx(reference, rel=0.02)
    assert found != pytest.approx(reference, rel=1e-6), "bf16 must be bf16"


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_of_gradients_are_those_of_deepspeed(results, ranks):
    """To the last bit, of weights too that have no gradient in a micro-batch, on a rank, or in a step."""
    ours, theirs = (results[ranks]["sums"][whose] for whose in ("ours", "theirs"))
    assert ours == theirs and len(ours[0]) == 5


def test_the_gradient_does_not_depend_on_the_split(results):
    """Ranks, micro-batches and accumulation steps of one global batch, whose rows differ in their number of targets."""
    reference = results[1]["splits"]["8"]
    scale = max(abs(value) for value in reference["gradient"])
    checked = 0
    for ranks in (1, 2):
        for found in results[ranks]["splits"].values():
            assert found["loss"] == pytest.approx(reference["loss"], rel=1e-6)
            assert found["norm"] == pytest.approx(reference["norm"], rel=1e-5)
            worst = max(abs(a - b) for a, b in zip(found["gradient"], reference["gradient"], strict=True))
            assert worst < 1e-5 * scale
            checked += 1
    assert checked == 7 and scale > 1e-3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_takes_any_number_of_micro_batches(results, ranks, stage):
    """4, then 2, then 8 of them, with the documents of the rows: what torch computes in one go."""
    found = results[ranks]["counts"][f"fp32-{stage}"]
    assert found["steps"] == 3
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    assert found["worst"] < 1e-5
    evaluated, expected = found["rows"]
    assert evaluated == pytest.approx(expected, rel=1e-5)
    assert sum(expected) != pytest.approx(found["unmasked"], rel=1e-3), "the documents must matter"
    low = results[ranks]["counts"][f"bf16-{stage}"]
    assert low["steps"] == 3
    assert low["losses"] == pytest.approx(low["expected"], rel=0.02)


@pytest.mark.parametrize("case", [f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_or_a_whole_batch_may_have_no_target(results, ranks, case):
    found, rel = results[ranks]["few"][case], 1e-5 if "fp32" in case else 0.02
    first, none, after = found["losses"]
    assert first == pytest.approx(found["expected"], rel=rel) and none == 0 and after < first - 0.1
    assert found["norms"][0] > 0.1 and found["norms"][1] == 0 and math.isfinite(found["norms"][2])


@pytest.mark.parametrize("case", [f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)])
def test_gradients_are_averaged_in_fp32_and_nothing_waits_for_the_device(results, case):
    """And logits are computed once: 4 steps of this rank's 4 rows, of which 2 have 2 pieces."""
    found = results[2]["watched"][case]
    assert found["logits"] == 16
    assert set(found["reduced"]) <= {"torch.float32", "torch.float64", "torch.int64"}
    assert "torch.float32" in found["reduced"] and found["waits"] == 0


@pytest.mark.parametrize("case", [f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)])
def test_a_model_is_made_where_it_lives_and_torch_draws_nothing(results, case):
    """In the precision that it computes in; at stage 3 a module at a time, of which this rank keeps its part."""
    found, size = results[2]["made"][case], 4 if "fp32" in case else 2
    assert not found["drew"] and not found["fading"], "denormal numbers are 0"
    assert found["types"] == ["torch.float32" if "fp32" in case else "torch.bfloat16"]
    if case[-1] == "3":  # DeepSpeed turns a tensor of fp32 into one of the precision, and partitions it
        assert found["most"] <= size * found["elements"] / 2 + (4 + 2 * size) * found["largest"] + 4096, (
            "and small ones"
        )
    else:  # the output matrix is made before it is tied to the embedding
        assert found["most"] <= size * (found["elements"] + found["largest"])


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_fp16_scales_the_loss_resumes_bitwise_and_skips_what_overflows(results, stage):
    found, reference = results[2]["half"][stage], results[1]["stages"]["fp32-0"]
    assert found["losses"] == pytest.approx(reference["losses"], rel=0.02)
    assert found["norms"] == pytest.approx(reference["norms"], rel=0.05), "of the loss itself, not of the scaled one"
    assert found["again"] == found["rest"] and found["scale"] == found["loaded"] and found["scale"]["cur_scale"] == 1024
    assert found["skipped"] and found["same"] and found["steps"] == 6 and math.isfinite(found["loss"])
    assert found["after"] == 2.0**59
    assert found["least"] == [False, False, 1], "at the least scale it is for the guard"


def written_once(found: dict, kind: str) -> set[str]:
    """The parameters of which every element of a kind is written, and by one rank."""
    pieces = defaultdict(list)
    for name, owned_kind, offset, numel in found["owned"]:
        if owned_kind == kind:
            pieces[name].append((offset, offset + numel))
    for name, parts in pieces.items():
        ends = [0] + [end for _, end in sorted(parts)]
        assert [start for start, _ in sorted(parts)] == ends[:-1] and ends[-1] == math.prod(found["shapes"][name])
    return set(pieces)


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("case", [f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)])
def test_every_element_is_written_exactly_once(results, case, kind):
    found = results[2]["stages"][case]
    assert written_once(found, kind) == set(found["shapes"])


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 0), (0, 1)])
def test_a_checkpoint_moves_between_stages(results, before, after):
    found = results[2]["moves"][f"{before}-{after}"]
    assert found["losses"] == pytest.approx(results[1]["stages"]["fp32-0"]["losses"], rel=1e-5)
    assert found["events"] == ["saved"] and found["steps"] == 6


LEARNING = {  # by the part that learns
    "lora": {f"trunk.blocks.0.{name}.lora_{ab}" for ab in "ab" for name in (
        "attention.q", "attention.k", "attention.v", "attention.out", "ffn.up", "ffn.gate", "ffn.down")},
    "head": {"head.weight"},
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("part", LEARNING)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_does_not_learn_stays_and_moves_between_stages(results, ranks, part, stage):
    """Three steps at a stage, a checkpoint, three at the next one: what a run of one rank and no ZeRO does."""
    reference = results[1]["parts"][f"{part}-fp32-0"]["losses"]
    for precision, rel in (("fp32", 1e-5), ("bf16", 0.02)) if part == "lora" else (("fp32", 1e-5),):
        found = results[ranks]["parts"][f"{part}-{precision}-{stage}"]
        assert found["events"] == ["saved"] and found["steps"] == 6
        assert found["losses"] == pytest.approx(reference, rel=rel) and found["losses"][5] < found["losses"][1] - 0.05
        assert set(found["changed"]) == LEARNING[part], "the rest is what it was to the last bit"
        assert written_once(found, "weight") == set(found["shapes"]) > LEARNING[part]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert written_once(found, kind) == LEARNING[part]
