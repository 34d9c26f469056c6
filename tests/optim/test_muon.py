"""Muon: orthogonal updates, torch's own, and under ZeRO what the same algorithm does unsharded."""

import math
from dataclasses import replace

import pytest
import torch

from pretrain.config import compose
from pretrain.model.heads import LanguageModel
from pretrain.optim import optimizers
from pretrain.optim.matrices import Matrix, plan_of
from pretrain.optim.muon import orthogonalized

CONFIG = compose.compose("pretrain", ["run.name=x", "optim=muon"]).optim
STAGES = [f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)]
CLASSES = {"fp32-0": "Orthogonalizer", "bf16-0": "FP16_UnfusedOptimizer", "bf16-1": "BF16_Optimizer"} | {
    case: "DeepSpeedZeroOptimizer_Stage3" for case in ("fp32-3", "bf16-3", "fp32-3-sub")}  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_singular_values_come_to_lie_around_1_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.mT @ orthogonalized(1e-3 * matrix) @ v.mT
    assert (found - found.diagonal().diag()).abs().max() < 1e-4
    large = found.diagonal()[values > 0.1 * values[0]]
    assert large.min() > 0.6 and large.max() < 1.25
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_it_is_torchs_muon_to_the_last_bit(shape):
    """Which iterates in bf16; with decay, Nesterov's momentum and the scaling to AdamW's updates."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator)
    results = []
    for number in range(3):
        parameter = torch.nn.Parameter(first.clone())
        optimizer = optimizers.build(CONFIG, [("trunk.blocks.0.ffn.up.weight", parameter)])
        if number == 1:
            optimizer = torch.optim.Muon([parameter], CONFIG.lr, CONFIG.weight_decay, CONFIG.momentum,
                                         adjust_lr_fn="match_rms_adamw")  # fmt: skip
        elif number == 2:
            optimizer.arrange([], 0, 1, dtype=torch.bfloat16)
        gradients = torch.Generator().manual_seed(1)
        for _ in range(20):
            parameter.grad = torch.randn(shape, generator=gradients)
            optimizer.step()
        results.append(parameter.detach())
    in_fp32, torchs, in_bf16 = results
    assert torch.equal(in_bf16, torchs)
    moved = (torchs - first).norm()
    assert 0 < (in_fp32 - torchs).norm() < 0.02 * moved, "but for the rounding of bf16"


def model_of(*overrides):
    overrides = ["run.name=x", "model.layers=2", "model.width=48", "model.vocab_size=32", *overrides]
    return LanguageModel(compose.compose("pretrain", overrides).model)


def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = model_of("model=gpt2_124m")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = replace(CONFIG, adamw_lr_scale=0.5, weight_decay=0.3)
    optimizer = optimizers.build(config, model.named_parameters(), lambda name: 2.0 if ".1." in name else 1.0)
    assert "muon" not in type(optimizer).__name__.lower(), "or DeepSpeed switches on its own"
    found = {}
    for group in optimizer.param_groups:
        facts = group["algorithm"], group["weight_decay"], group["lr_scale"]
        assert facts not in found and "use_muon" not in group
        found[facts] = {names[id(parameter)] for parameter in group["params"]}
    assert set(found) == {("muon", 0.3, 1.0), ("muon", 0.3, 2.0), ("adamw", 0.3, 0.5), ("adamw", 0, 0.5),
                          ("adamw", 0, 1.0)}  # fmt: skip
    matrices = ("attention.q", "attention.k", "attention.v", "attention.out", "ffn.up", "ffn.down")
    assert found["muon", 0.3, 2.0] == {f"trunk.blocks.1.{name}.weight" for name in matrices}
    assert found["adamw", 0.3, 0.5] == {"trunk.embedding.weight"} and "trunk.positions.weight" in found["adamw", 0, 0.5]
    lora = model_of("model=llama_tiny", "model.heads=3", "model.kv_heads=3", "model.lora_rank=2").named_parameters()
    lora = dict(lora)
    assert {optimizers.algorithm_of("muon", name, lora[name].shape) for name in lora if ".lora_" in name} == {"adamw"}


def test_a_plan_puts_each_matrix_together_once_and_work_is_shared():
    """On stretches of a buffer (stages 1 and 2), on equal parts (3), and where all is everywhere (0)."""
    shapes = [(64, 64), (32, 64), (120, 64), (64, 120)] * 3
    starts = [sum(map(math.prod, shapes[:number])) for number in range(len(shapes) + 1)]
    for ranks in (1, 2, 3, 7, 500):
        width = -(-starts[-1] // ranks)
        for stage in (0, 1, 3):
            matrices = [
                Matrix(torch.empty(0), shape, **{0: {}, 1: {"start": start, "width": width},
                                                 3: {"width": -(-math.prod(shape) // ranks)}}[stage])
                for shape, start in zip(shapes, starts[:-1], strict=True)
            ]  # fmt: skip
            for matrix in matrices if stage else []:
                assert sum(map(matrix.size, range(ranks))) == matrix.numel
            plans = [plan_of(matrices, rank, ranks) for rank in range(min(ranks, 8))]
            assert all(plan.rounds == plans[0].rounds for plan in plans) and plans[0].is_everywhere == (stage == 0)
            together = [matrix for owned in plans[0].rounds for matrix in owned if matrix]
            alone = [matrix for plan in plans for matrix in plan.alone]
            if ranks <= 8:
                assert sorted(map(id, together + alone)) == sorted(map(id, matrices))
            assert stage == 1 or bool(together) == (ranks > 1)
            if stage == 1 and ranks in (2, 3):
                assert len(together) <= ranks - 1 < len(alone), "what lies with one rank stays there"
            work = [sum(owned[rank].cost for owned in plans[0].rounds if owned[rank]) for rank in range(ranks)]
            if stage != 1 and ranks in (2, 3):
                assert max(work) < 1.25 * min(work)
            for owned in plans[0].rounds:
                assert len(owned) == ranks
                for rank, matrix in enumerate(owned):
                    assert not matrix or matrix.size(rank) >= 0.9 * max(map(matrix.size, range(ranks)))


@pytest.fixture(scope="module")
def results(worker, tmp_path_factory):
    """{number of ranks: what muon_worker.py found}; the later launches load what the earlier ones saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {ranks: worker("muon_worker.py", folder, ranks=ranks) for ranks in (1, 2, 3)}


@pytest.mark.parametrize("case", [*STAGES, "fp32-3-sub"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_stage_does_what_the_algorithm_does_unsharded(results, ranks, case):
    """20 steps, with groups of their own learning rates, of matrices that lie across ranks, and with sub-groups."""
    found = results[ranks]["stages"][case]
    assert found["class"] == CLASSES.get(case, "DeepSpeedZeroOptimizer") and found["steps"] == len(found["expected"])
    if "fp32" in case:
        assert found["worst"] < 1e-5 and found["losses"] == pytest.approx(found["expected"], abs=1e-5)
    else:
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-3)
        assert found["losses"] != pytest.approx(found["expected"], rel=1e-6), "bf16 must be bf16"
    kinds = {kind.partition(":")[2] for kind in found["kinds"] if ".ffn.up.weight:" in kind}
    assert kinds == {"weight", "momentum"}
    assert {kind.partition(":")[2] for kind in found["kinds"] if "norm" in kind} == {"weight", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_in_bf16_the_stages_that_add_up_alike_do_the_same(results, ranks, stage):
    found = results[ranks]["stages"]
    assert found[f"bf16-{stage}"]["losses"] == pytest.approx(found["bf16-1"]["losses"], rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_pieces_of_matrices_are_where_the_layout_has_them_and_few_travel(results, ranks):
    for stage, found in results[ranks]["plans"].items():
        assert found["same"] and found["matrices"] == 14
        most = {"0": 14, "3": 14}.get(stage, 2 * (ranks - 1)) if ranks > 1 else 0
        assert 0 < found["cut"] <= most or ranks == 1 and not found["cut"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_moves_between_stages_and_numbers_of_ranks(results, ranks):
    seen = set()
    for case, found in results[ranks]["moves"].items():
        written_by, before, after = case.split("-")
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5), case
        assert found["steps"] == 6
        if int(written_by) == ranks and before == after:
            assert found["losses"] == found["expected"], "at the same shape to the last bit"
            seen.add("same")
        seen.add((written_by, before))
    assert len(seen) == 1 + 4 * ranks


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_fp16_scales_the_loss_resumes_bitwise_and_skips_what_overflows(results, stage):
    found = results[2]["half"][stage]
    assert found["losses"] == pytest.approx(results[2]["half"]["1"]["losses"], rel=1e-3)
    assert found["losses"][5] < found["losses"][1] - 0.5, "two batches seen thrice are learnt"
    assert found["again"] == found["rest"] and found["skipped"] and found["same"] and found["steps"] == 6
