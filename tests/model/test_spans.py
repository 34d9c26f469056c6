"""Documents and windows as spans: their bounds, the same attention as under masks, and where no mask is ever made.

The kernel is a GPU's. Here a few lines stand in for it, forward and backward, by its documentation in
torch.nn.attention.varlen: a position sees from `window[0]` before itself to `window[1]` after it, within its span.
`tools/bench.py gpu` compares the kernel itself.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import compose
from pretrain.model import attention
from pretrain.model.attention import Spans, bounds_of, in_spans, near, plain, same_document, sdpa, why_masks
from pretrain.model.losses import loss_rows
from pretrain.model.positions import begins_of_documents
from tests.models import filled_model
from tools.bench_gpu_pieces import masks, route_of

LENGTH = 40
SMALL = ["run.name=x", "model=llama_tiny", "model.vocab_size=97", f"train.seq_len={LENGTH}", "model.layers=3"]
WINDOWS = ["model.sliding_window=8", "model.global_every=3"]


def weights_of(q, k, reach):
    """Of a span, [heads, queries, keys], by the formula."""
    places = torch.arange(len(q))
    ahead = places - places[:, None]
    seen = ((reach[0] < 0) | (-ahead <= reach[0])) & ((reach[1] < 0) | (ahead <= reach[1]))
    scores = torch.einsum("ihc,jhc->hij", q, k) / q.shape[2] ** 0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def one_by_one(of_a_span, bounds, *parts):
    """What `of_a_span` makes of the parts [positions, heads, width] of each span."""
    places = zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
    made = [of_a_span(*(part[start:end] for part in parts)) for start, end in places]
    return tuple(torch.cat(each) for each in zip(*made, strict=True))


@pytest.fixture(scope="module")
def on_cpu():
    """torch's operator, with a kernel on this processor."""

    def forward(q, k, v, bounds, bounds_k, longest, longest_k, causal, scale, window, *rest):
        assert torch.equal(bounds, bounds_k) and bounds.dtype == torch.int32 and longest == int(bounds.diff().max())
        assert causal == (list(window) == [-1, 0])
        groups = q.shape[1] // k.shape[1]

        def of_a_span(q, k, v):
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return (torch.einsum("hij,jhc->ihc", weights_of(q, k, window), v),)

        (mixed,) = one_by_one(of_a_span, bounds, q, k, v)
        return mixed, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)

    def backward(gradient, q, k, v, out, lse, bounds, bounds_k, longest, longest_k, causal, state, scale, window):
        groups = q.shape[1] // k.shape[1]

        def of_a_span(gradient, q, k, v, out):
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            weights = weights_of(q, k, window)
            of_weights = torch.einsum("ihc,jhc->hij", gradient, v) - (gradient * out).sum(2).t()[:, :, None]
            of_scores = weights * of_weights / q.shape[2] ** 0.5
            of_k, of_v = (torch.einsum("hij,ihc->jhc", *each) for each in ((of_scores, q), (weights, gradient)))
            in_groups = (each.unflatten(1, (-1, groups)).sum(2) for each in (of_k, of_v))
            return torch.einsum("hij,jhc->ihc", of_scores, k), *in_groups

        return one_by_one(of_a_span, bounds, gradient, q, k, v, out)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def some_documents(seed, rows=3, length=LENGTH):
    """Of any length, many of one token, one row of a single one; padding at the end of another."""
    torch.manual_seed(seed)
    documents = (torch.rand(rows, length) < 0.25).int().cumsum(1)
    documents[0], documents[1, length - 7 :] = 0, -1
    return documents


@pytest.mark.parametrize("seed", range(5))
def test_bounds_are_where_documents_begin_and_rows_do(seed):
    documents = some_documents(seed)
    bounds, longest = bounds_of(begins_of_documents(documents))
    pairs = [(row, number) for row, numbers in enumerate(documents.tolist()) for number in numbers]
    expected = [place for place, pair in enumerate(pairs) if place == 0 or pair != pairs[place - 1]]
    assert bounds.tolist() == [*expected, len(pairs)] and bounds.dtype == torch.int32
    assert longest == LENGTH, "the row of one document"
    assert (
        bounds_of(begins_of_documents(documents[1:]))[1]
        == bounds_of(begins_of_documents(documents))[0].diff()[1:].max()
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 1, 6, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_spans_are_what_the_masks_are(on_cpu, causal, window, kv_heads):
    documents = some_documents(0)
    mask = same_document(documents, causal)
    reach = (-1, 0 if causal else -1)
    if window:
        mask = mask & near(LENGTH, LENGTH, window, causal, documents.device)
        reach = (window - 1, 0) if causal else (window // 2, window // 2)
    shapes = [(3, heads, LENGTH, 8) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    found = in_spans(q, k, v, Spans(*bounds_of(begins_of_documents(documents)), reach))
    expected = plain(q, k, v, causal, 0.0, mask)
    gradient = torch.randn_like(expected)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    for mine, other in zip(
        *(torch.autograd.grad(each, (q, k, v), gradient) for each in (found, expected)), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)


class Squares(TorchDispatchMode):
    """Counts the kernel's calls, and notes tensors with a number for each pair of positions."""

    def __init__(self):
        super().__init__()
        self.calls, self.squares = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.torch_attn._varlen_attn.default
        result = func(*args, **(kwargs or {}))
        self.squares += sum(tuple(leaf.shape[-2:]) == (LENGTH, LENGTH)
                            for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))  # fmt: skip
        return result


CASES = [(causal, windows, has_documents) for causal in ("true", "false")
         for windows, has_documents in ((WINDOWS, True), (WINDOWS, False), ([], True), ([], False))]  # fmt: skip


@pytest.mark.parametrize("causal, windows, has_documents", CASES)
def test_a_model_computes_the_same_and_makes_no_mask(on_cpu, monkeypatch, causal, windows, has_documents):
    cfg = compose.compose("pretrain", [*SMALL, f"model.causal={causal}", "model.kv_heads=2", *windows]).model
    model, tokens = filled_model(cfg, 5).double(), torch.randint(0, 97, (3, LENGTH))
    documents = some_documents(1) if has_documents else None
    labels = tokens if documents is None else torch.where(documents < 0, -100, tokens)
    found = []
    for takes_spans in (False, True):
        if takes_spans:
            monkeypatch.setitem(attention.SPANS_ON, "cpu", (torch.float64,))
        model.zero_grad()
        with Squares() as seen:
            rows = loss_rows(model, tokens, labels, documents)
            rows.sum().backward()
        has_masks = bool(windows) or has_documents
        assert bool(seen.squares) == (has_masks and not takes_spans)
        expected_calls = 3 if has_documents else 2 if windows else 0  # of layers: the first one sees all
        assert seen.calls == (expected_calls if takes_spans else 0)
        found.append([rows.detach(), *(parameter.grad for parameter in model.parameters())])
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-10) and mine.abs().max() > 0


@pytest.mark.parametrize("other", ["", "model.attention=plain", "model.head_width=12", "model.dropout=0.1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_are_masks_where_the_kernel_takes_no_spans(on_cpu, monkeypatch, dtype, other):
    monkeypatch.setitem(attention.SPANS_ON, "cpu", attention.SPANS_ON["cuda"])
    model = filled_model(compose.compose("pretrain", [*SMALL, *WINDOWS, *other.split()]).model).to(dtype)
    tokens, takes_spans = torch.randint(0, 97, (3, LENGTH)), dtype == torch.bfloat16 and not other
    with Squares() as seen, torch.no_grad():
        model(tokens, documents=some_documents(1))
        assert (seen.calls, bool(seen.squares)) == ((3, False) if takes_spans else (0, True))
        model.eval()(tokens, documents=some_documents(1))
    assert seen.calls == (6 if takes_spans else 3 if "dropout" in other and dtype == torch.bfloat16 else 0)


def test_on_a_gpu_it_is_torchs_operator_with_no_more_than_the_bounds():
    with FakeTensorMode():
        q, k = (torch.empty(2, heads, LENGTH, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        bounds = torch.empty(6, dtype=torch.int32, device="cuda")
        with Squares() as seen:
            mixed = sdpa(q, k, k, True, 0.0, Spans(bounds, 30, (-1, 0)))
    assert mixed.shape == q.shape and mixed.device.type == "cuda" and (seen.calls, seen.squares) == (1, 0)


def test_the_bench_gives_the_kernel_what_it_compares_with(on_cpu, monkeypatch):
    monkeypatch.setitem(attention.SPANS_ON, "cpu", (torch.float32,))
    qkvg = [torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2, 4)]
    given, dense = (masks(LENGTH, torch.device("cpu"), q) for q in (qkvg[0], None))
    assert {name: type(each) for name, each in given.items() if each is not None} == {
        "documents": Spans,
        "window": Spans,
    }
    for name in given:
        found, expected = route_of(sdpa, qkvg, given[name]), route_of(plain, qkvg, dense[name])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_with_a_cache_there_are_masks(monkeypatch):
    """The queries are of the last positions only."""
    monkeypatch.setitem(attention.SPANS_ON, "cpu", (torch.float32,))
    model = filled_model(compose.compose("pretrain", [*SMALL, *WINDOWS]).model).eval()
    tokens = torch.randint(0, 97, (1, LENGTH))
    with Squares() as seen, torch.no_grad():
        model(tokens, cache=model.trunk.new_cache(1, LENGTH))
    assert seen.calls == 0 and seen.squares


def test_why_there_are_masks_is_said():
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert why_masks(gpu, half, 64, 0.0) is None
    assert why_masks(torch.device("cpu"), half, 64, 0.0) == "cpu has no kernel without them for bfloat16"
    assert why_masks(gpu, torch.float32, 64, 0.0) == "cuda has no kernel without them for float32"
    assert why_masks(gpu, half, 12, 0.0) == "the kernel without them takes heads of 8, 16, ... 256 numbers, not of 12"
    assert why_masks(gpu, half, 264, 0.0).endswith("not of 264")
    assert why_masks(gpu, half, 64, 0.1) == "the kernel without them knows no dropout"
