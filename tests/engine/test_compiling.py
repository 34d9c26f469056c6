"""Compiled blocks: they compute what plain ones do, few graphs serve all lengths, and what fails leaves them plain.

Most are compiled by a backend that only traces and counts; inductor, which takes many seconds, has a test of its own
here and a run in tests/test_train.py.
"""

import math
import os
import stat

import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pretrain.config import compose
from pretrain.engine import compiling
from pretrain.engine.compiling import CACHE, CompiledBlocks, is_chosen, prepare
from pretrain.model import attention
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows
from tests.model.test_spans import WINDOWS, on_cpu, some_documents  # noqa: F401 (a fixture)
from tests.models import SMALL, initial_values

LENGTHS = [(16, 16), (2, 32), (4, 32), (4, 17), (3, 5), (2, 9), (7, 31), (2, 32)]

ELSEWHERE = [  # what torch would read from, or write to, other places
    (torch._inductor.config, "fx_graph_remote_cache"), (torch._inductor.config, "autotune_remote_cache"),
    (torch._inductor.config, "bundled_autotune_remote_cache"), (torch._inductor.config, "cpp_cache_precompile_headers"),
    (torch._functorch.config, "enable_remote_autograd_cache"), (torch._dynamo.config, "automatic_dynamic_remote_pgo"),
    (torch._dynamo.config, "automatic_dynamic_local_pgo"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before counts, and nothing is kept."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    torch._dynamo.reset()
    counters.clear()


def graphs():
    """How many were compiled."""
    return counters["stats"]["unique_graphs"]


def model_of(*overrides, checkpointing="none", dtype=torch.float32, scale=5):
    config = compose.compose("pretrain", [*SMALL, "model.layers=4", *overrides]).model
    model, read = build_model(config, checkpointing).to(dtype), initial_values(config, scale)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name, tuple(parameter.shape)))
    return model.train()


def learnt(model, tokens, documents=None):
    """The loss of each row, and all gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    rows = loss_rows(model, tokens, tokens, documents)
    rows.sum().backward()
    return [rows.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def some_tokens(shape):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def worst(found, expected):
    """The largest difference, as a share of the largest number of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("overrides, checkpointing", [
    ([], "none"), ([], "ffn"), ([], "full"), (["model.dropout=0.2"], "ffn"), (["model.dropout=0.2"], "full"),
    (["model.lora_rank=2"], "none"),
    (["model=gpt2_124m", "model.width=32", "model.heads=4", "model.value_embeddings=4"], "ffn"),
    (["model=modernbert_10m", "model.width=32", "model.heads=4", "model.sliding_window=8"], "none"),
    (["model.attention=plain", "model.norm_position=post"], "full"),
])  # fmt: skip
def test_gradients_are_those_of_plain_blocks(overrides, checkpointing):
    model = model_of(*overrides, "model.vocab_size=97", "model.layers=4", checkpointing=checkpointing)
    names, batches = list(model.state_dict()), [(some_tokens((3, 32)), some_documents(seed, 3, 32)) for seed in (1, 2)]
    plain = [learnt(model, *batch) for batch in batches]
    blocks = CompiledBlocks(model.trunk.blocks, varies=False, backend="aot_eager")
    for batch, expected in zip(batches, plain, strict=True):
        assert worst(learnt(model, *batch), expected) < 1e-6
    assert blocks.problem is None and list(model.state_dict()) == names
    has_kinds = "model=modernbert_10m" in overrides or "model.lora_rank=2" in overrides
    assert graphs() == (2 if has_kinds else 1), "the first of 4 layers is another"


def test_inductor_computes_the_same_with_documents_dropout_and_any_length():
    batches = [(some_tokens(shape), some_documents(sum(shape), *shape)) for shape in ((3, 32), (5, 20), (2, 48))]
    model = model_of("model.dropout=0.1", scale=1)
    plain = [learnt(model, *batch) for batch in batches]
    blocks = CompiledBlocks(model.trunk.blocks, varies=True)
    found = [learnt(model, *batch) for batch in batches]
    assert blocks.problem is None and max(map(worst, found, plain)) < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(found[0], plain[0], strict=True)), "inductor it was"


@pytest.mark.slow
def test_inductor_in_bf16_is_as_near_to_fp32_as_plain_blocks_are():
    tokens, dropout = some_tokens((4, 32)), ("model.layers=2", "model.dropout=0.1")
    low = model_of(*dropout, dtype=torch.bfloat16, checkpointing="full")
    exact, plain = learnt(model_of(*dropout), tokens), learnt(low, tokens)
    blocks = CompiledBlocks(low.trunk.blocks, varies=False)
    found = learnt(low, tokens)
    assert blocks.problem is None and 0 < worst(found, exact) < 1.5 * worst(plain, exact)


@pytest.mark.parametrize("settings, most", [([], 2), (WINDOWS, 6)])
def test_one_graph_serves_all_lengths_and_all_blocks_of_a_kind(settings, most):
    """And one more micro-batches of one row. A window hides nothing of short rows: their layers are all alike."""
    model = model_of(*settings)
    CompiledBlocks(model.trunk.blocks, varies=True, backend="eager")
    for shape in LENGTHS:
        model(some_tokens(shape))
    model(some_tokens((1, 32)))
    before = graphs()
    for shape in ((1, 13), (5, 8), (16, 44), (1, 20), (2, 3)):
        model(some_tokens(shape))
    assert 0 < graphs() == before <= most
    model.eval()(some_tokens((6, 6)))
    with torch.no_grad():
        model(some_tokens((6, 7)))
    assert graphs() == before, "in evaluation they are plain"


def test_a_length_that_stays_has_a_graph_of_its_own():
    model, count = model_of(), CompileCounterWithBackend("eager")
    CompiledBlocks(model.trunk.blocks, varies=False, backend=count)
    for shape in ((2, 32), (2, 32), (4, 16), (2, 32), (4, 16)):
        model(some_tokens(shape))
    assert count.frame_count == 2
    sizes = [node.meta["example_value"].shape for graph in count.graphs for node in graph.graph.nodes
             if node.op == "placeholder" and isinstance(node.meta["example_value"], torch.Tensor)]  # fmt: skip
    assert all(type(size) is int for shape in sizes for size in shape)


@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.usefixtures("on_cpu")
def test_spans_of_any_documents_are_one_graph_for_each_reach(monkeypatch, varies):
    monkeypatch.setitem(attention.SPANS_ON, "cpu", (torch.float32,))
    model = model_of(*WINDOWS)
    batches = [(some_tokens((3, 32)), some_documents(seed, 3, 32)) for seed in range(6)]
    plain = [learnt(model, *batch) for batch in batches]
    blocks = CompiledBlocks(model.trunk.blocks, varies, backend="aot_eager")
    found = [learnt(model, *batch) for batch in batches]
    assert max(map(worst, found, plain)) < 1e-6
    assert blocks.problem is None and graphs() == 2


def test_what_fails_later_leaves_plain_blocks_and_is_told_once(monkeypatch):
    """Here one graph is the most that is allowed; torch would end the run."""
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    model, told = model_of(), []
    batches = [some_tokens(shape) for shape in ((2, 32), (4, 16), (2, 32))]
    plain = [learnt(model, tokens) for tokens in batches]
    blocks = CompiledBlocks(model.trunk.blocks, varies=False, backend="aot_eager")
    blocks.tell = told.append
    assert worst(learnt(model, batches[0]), plain[0]) < 1e-6 and blocks.problem is None
    for tokens, expected in zip(batches[1:], plain[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(learnt(model, tokens), expected, strict=True))
    assert (
        len(told) == 1 and "more than 1 graphs" in told[0] and "train.compile=none" in told[0] and "\n" not in told[0]
    )


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_the_forward_pass():
    def refuses(graph, inputs):
        raise RuntimeError("no backward pass\nof any kind")

    model, tokens = model_of(), some_tokens((2, 32))
    plain = learnt(model, tokens)
    backend = aot_autograd(fw_compiler=nop, bw_compiler=refuses)
    blocks = CompiledBlocks(model.trunk.blocks, varies=False, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(learnt(model, tokens), plain, strict=True))
    assert "no backward pass" in blocks.problem and "\n" not in blocks.problem


def test_what_is_made_is_kept_where_nobody_else_may_write(monkeypatch, tmp_path):
    for config, name in ELSEWHERE:
        monkeypatch.setattr(config, name, True)
    prepare()
    assert os.environ[CACHE] == str(tmp_path), "as the user says"
    monkeypatch.setenv(CACHE, compiling.default_cache_dir())  # torch says so itself, when it is imported
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare()
    folder = tmp_path / "home/.cache/pretrain/inductor"
    assert os.environ[CACHE] == str(folder) and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any(getattr(config, name) for config, name in ELSEWHERE)


def test_without_such_a_place_blocks_stay_plain(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(CACHE)
    model = model_of()
    blocks = CompiledBlocks(model.trunk.blocks, varies=False, backend="eager")
    model(some_tokens((2, 32)))
    assert graphs() == 0 and "home/.cache" in blocks.problem and CACHE in blocks.problem


@pytest.fixture(scope="module")
def results(worker):
    """{number of ranks: what compile_worker.py found}."""
    return {ranks: worker("compile_worker.py", ranks=ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_at_every_stage_a_step_is_that_of_plain_blocks(results, ranks):
    """With Muon, LoRA, and blocks that are computed again."""
    cases = results[ranks]["cases"]
    assert len(cases) == {1: 2, 2: 12}[ranks]
    for name, (plain, compiled) in cases.items():
        assert compiled["graphs"] and not plain["graphs"] and compiled["problem"] is None, name
        for figure in ("losses", "norms"):
            assert compiled[figure] == pytest.approx(plain[figure], rel=1e-5 if "fp32" in name else 5e-3), name


def test_where_one_rank_cannot_compile_none_does(results):
    assert results[2]["one"]["graphs"] == [0, 0]
    assert all("not a folder of this user's own" in problem for problem in results[2]["one"]["problems"])


def test_auto_is_for_a_gpu_and_what_would_fail_is_refused():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for stage, is_whole in ((0, True), (1, False), (2, False), (3, True)):
        assert is_chosen("auto", gpu, stage, is_whole) and is_chosen("blocks", cpu, stage, is_whole)
        assert not is_chosen("auto", cpu, stage, is_whole) and not is_chosen("none", gpu, stage, is_whole)
    assert not is_chosen("auto", gpu, 3, False)
    with pytest.raises(ValueError, match="train.compile=blocks at deepspeed=zero3"):
        is_chosen("blocks", gpu, 3, False)
