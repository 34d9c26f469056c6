"""The Transformer: attention against the formula, causality, the cache, shapes of every part, counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain import compose
from pretrain.model.attention import plain, sdpa
from pretrain.model.heads import LanguageModel
from pretrain.model.losses import cross_entropy_rows
from pretrain.model.transformer import flops_per_token, initial_value, sinusoids

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


def test_activation_checkpointing_changes_nothing():
    cfg = model_config()
    tokens = torch.randint(0, 97, (2, 12))
    gradients = []
    for checkpointing in (False, True):
        model = build(cfg)
        model.trunk.activation_checkpointing = checkpointing
        cross_entropy_rows(model(tokens), tokens).sum().backward()
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
