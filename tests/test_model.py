"""The Transformer: attention against the formula, causality, the cache, shapes of every part, counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain import compose
from pretrain.model.attention import plain, same_document, sdpa
from pretrain.model.heads import LanguageModel
from pretrain.model.losses import cross_entropy_rows
from pretrain.model.transformer import flops_per_token, initial_value, places_in_documents, sinusoids

SMALL = ["run.name=x", "model=llama_tiny", "model.vocab_size=97", "train.seq_len=32"]


def model_config(*overrides):
    return compose.compose("pretrain", [*SMALL, *overrides]).model


def build(cfg, dtype=torch.float32):
    model = LanguageModel(cfg).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), cfg, 0))
            parameter.mul_(5)  # far from the uniform distribution, so that mistakes show
    return model


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries, keys", [(7, 7), (1, 7), (3, 7)])
def test_both_attention_routes_equal_the_formula(causal, kv_heads, queries, keys):
    torch.manual_seed(0)
    q = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, keys, 8, dtype=torch.float64)
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(4):
            for i in range(queries):
                seen = keys - queries + i + 1 if causal else keys
                group = h // (4 // kv_heads)
                scores = [float(q[b, h, i] @ k[b, group, j]) / math.sqrt(8) for j in range(seen)]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                expected[b, h, i] = weights @ v[b, group, :seen]
    for route in (plain, sdpa):
        assert torch.allclose(route(q, k, v, causal, 0.0), expected, rtol=1e-10, atol=1e-12), route


PARTS = [
    ["model.positions=learned", "model.norm=layernorm", "model.activation=gelu_tanh", "model.bias=true"],
    ["model.positions=sinusoidal", "model.norm_position=post", "model.activation=relu2"],
    ["model.positions=none", "model.activation=gelu", "model.tied_embeddings=false"],
    ["model.activation=geglu", "model.qk_norm=true", "model.attention=plain"],
    ["model.causal=false"],
    [],
]


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_every_part_learns_and_the_causal_ones_look_back_only(parts):
    cfg = model_config(*parts)
    model = build(cfg)
    tokens = torch.randint(0, 97, (2, 12))
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 97
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 97)
    assert torch.equal(before[:, :8], after[:, :8]) == cfg.causal
    assert not torch.equal(before[:, 8:], after[:, 8:])
    cross_entropy_rows(before, tokens).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("parts", [PARTS[0], PARTS[1], PARTS[3], PARTS[5]], ids=" ".join)
def test_the_cache_gives_the_logits_of_the_whole_sequence(parts):
    model = build(model_config(*parts), torch.float64)
    tokens = torch.randint(0, 97, (2, 10))
    cache = model.trunk.new_cache(2, 10)
    pieces = [model(tokens[:, part], cache) for part in (slice(0, 4), slice(4, 5), slice(5, 8), slice(8, 10))]
    assert torch.allclose(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)


POSITIONS = [
    ["model.positions=rope"], ["model.positions=learned"], ["model.positions=sinusoidal", "model.norm_position=post"],
    ["model.positions=none"], ["model.kv_heads=1", "model.qk_norm=true"], ["model.kv_heads=0"],
]  # fmt: skip
LENGTHS = ((5, 1, 9), (12, 3), (1, 1, 7))  # of the documents of three rows of 16 places
DOCUMENTS = torch.stack([
    torch.cat([torch.full((n,), i) for i, n in enumerate(row)] + [torch.full((16 - sum(row),), -1)]) for row in LENGTHS
])  # fmt: skip


def weighted_sum(logits, weights):
    return (logits.log_softmax(-1) * weights).sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("parts", POSITIONS, ids=" ".join)
def test_documents_packed_in_rows_are_computed_as_if_each_stood_alone(parts, attention, causal):
    cfg = model_config(*parts, f"model.attention={attention}", f"model.causal={str(causal).lower()}")
    packed, alone = build(cfg, torch.float64), build(cfg, torch.float64)
    torch.manual_seed(0)
    tokens, weights = torch.randint(0, 97, (3, 16)), torch.randn(3, 16, 97, dtype=torch.float64)
    weights[DOCUMENTS < 0] = 0  # padding is nobody's target
    logits = packed(tokens, documents=DOCUMENTS)
    weighted_sum(logits, weights).backward()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            expected = alone(tokens[row : row + 1, here])
            assert torch.allclose(logits[row, here], expected[0], rtol=1e-6, atol=1e-9)
            weighted_sum(expected, weights[row : row + 1, here]).backward()
            start += length
    for a, b in zip(packed.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-8)
    unmasked = packed(tokens)
    assert not torch.allclose(unmasked[0, 6:15], logits[0, 6:15], rtol=1e-2), "the boundaries must matter"


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("causal", ["true", "false"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_has_no_influence_and_is_finite(attention, causal, dtype):
    model = build(model_config(f"model.attention={attention}", f"model.causal={causal}"), dtype)
    tokens = torch.randint(0, 97, (3, 16))
    documents = torch.cat([DOCUMENTS, torch.full((1, 16), -1)])  # and a row of nothing else
    tokens = torch.cat([tokens, tokens[:1]])
    others = torch.where(documents < 0, (tokens + 1) % 97, tokens)
    before, after = model(tokens, documents=documents), model(others, documents=documents)
    assert torch.equal(before[documents >= 0], after[documents >= 0])
    assert not torch.equal(before, after)
    cross_entropy_rows(before, torch.where(documents < 0, -100, tokens)).sum().backward()
    assert before.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_both_attention_routes_agree_under_a_mask(causal, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(3, 4, 16, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, kv_heads, 16, 8, dtype=torch.float64)
    mask = same_document(DOCUMENTS, causal)
    for b in range(3):
        for i in range(16):
            seen = [DOCUMENTS[b, j] == DOCUMENTS[b, i] and (j <= i or not causal) for j in range(16)]
            assert mask[b, 0, i].tolist() == seen
    expected, found = (route(q, k, v, causal, 0.0, mask) for route in (plain, sdpa))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [*POSITIONS[:4], ["model.causal=false"]], ids=" ".join)
def test_one_document_a_row_is_the_same_as_none_given(parts):
    model = build(model_config(*parts, "model.attention=plain"))
    tokens = torch.randint(0, 97, (2, 12))
    assert torch.equal(model(tokens), model(tokens, documents=torch.zeros(2, 12, dtype=torch.int32)))


def test_places_start_again_with_each_document():
    expected = [[*range(5), 0, *range(9), 0], [*range(12), *range(3), 0], [0, 0, *range(7), *range(7)]]
    assert places_in_documents(DOCUMENTS).tolist() == expected


@pytest.mark.parametrize("documents", [None, DOCUMENTS[:2, :12]], ids=["one document", "several documents"])
def test_activation_checkpointing_changes_nothing(documents):
    cfg = model_config()
    tokens = torch.randint(0, 97, (2, 12))
    gradients = []
    for checkpointing in (False, True):
        model = build(cfg)
        model.trunk.activation_checkpointing = checkpointing
        cross_entropy_rows(model(tokens, documents=documents), tokens).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sinusoids_are_the_papers_formula():
    table = sinusoids(torch.arange(50), 8)
    for place in (0, 1, 49):
        for i in range(4):
            angle = place / 10000 ** (2 * i / 8)
            assert table[place, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[place, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


def test_initial_values_depend_on_seed_and_name_alone():
    cfg = model_config()
    shape = (64, 64)
    name = "trunk.blocks.0.attention.q.weight"
    first = initial_value(name, shape, cfg, 0)
    assert torch.equal(first, initial_value(name, shape, cfg, 0))
    assert not torch.equal(first, initial_value(name, shape, cfg, 1))
    assert not torch.equal(first, initial_value(name.replace("q", "k"), shape, cfg, 0))
    assert first.std() == pytest.approx(0.02, rel=0.05)
    assert initial_value(name.replace("q.", "out."), shape, cfg, 0).std() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(initial_value("trunk.norm.weight", (5,), cfg, 0), torch.ones(5))
    assert torch.equal(initial_value("trunk.blocks.0.ffn.up.bias", (5,), cfg, 0), torch.zeros(5))


def test_presets_have_their_published_sizes():
    counts = {"llama_14m": (24576, 13.9e6), "llama_135m": (49152, 134.5e6), "gpt2_124m": (50257, 124.4e6)}
    for name, (vocab_size, expected) in counts.items():
        cfg = compose.compose("pretrain", ["run.name=x", f"model={name}", f"model.vocab_size={vocab_size}"]).model
        with torch.device("meta"):
            model = LanguageModel(cfg)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.01), name


@pytest.mark.parametrize("parts", [[], ["model.kv_heads=0", "model.activation=gelu"]], ids=["gated", "plain"])
def test_flops_are_those_that_torch_counts(parts):
    cfg = model_config("model.attention=plain", *parts)
    model, tokens = build(cfg), torch.randint(0, 97, (2, 64))
    with FlopCounterMode(display=False) as counter:
        cross_entropy_rows(model(tokens), tokens).sum().backward()
    assert flops_per_token(cfg, 64) * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_loss_sums_rows_and_leaves_ignored_labels_out():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [-100, -100, -100]])
    rows = cross_entropy_rows(logits, labels)
    expected = -(logits[0, 0].log_softmax(0)[1] + logits[0, 1].log_softmax(0)[2])
    assert rows[0] == pytest.approx(float(expected)) and rows[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_torchs(dtype):
    """More positions than are computed at once, some of them ignored, each row weighted differently."""
    torch.manual_seed(0)
    logits = (torch.randn(3, 301, 17) * 3).to(dtype)
    labels = torch.randint(0, 17, (3, 301))
    labels[torch.rand(3, 301) < 0.2] = -100
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    rows = cross_entropy_rows(ours * 1, labels)
    (rows * weights).sum().backward()
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="none")
    expected = expected.view(3, 301).sum(1)
    (expected * weights).sum().backward()
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(rows.double(), expected, rtol=1e-10 if dtype == torch.float64 else 1e-5)
    precision = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=precision, atol=precision)
    assert torch.equal(ours.grad[labels == -100], torch.zeros_like(ours.grad[labels == -100]))


def test_logits_that_something_else_needs_are_not_overwritten_in_silence():
    leaf = torch.randn(1, 4, 5).requires_grad_()
    logits = leaf * 1
    loss = cross_entropy_rows(logits, torch.zeros(1, 4, dtype=torch.int64)).sum()
    other = logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
