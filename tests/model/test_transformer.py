"""The Transformer: attention against the formula, causality, the cache, shapes of every part, counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pretrain.config import compose
from pretrain.model.attention import plain, same_document, sdpa
from pretrain.model.heads import build_model, parameter_shapes
from pretrain.model.losses import cross_entropy_rows
from pretrain.model.positions import places_in_documents, rotations, sinusoids
from pretrain.model.transformer import flops_per_token, has_window, recomputed_flops_per_token
from tests.models import filled_model, initial_value

SMALL = ["run.name=x", "model=llama_tiny", "model.vocab_size=97", "train.seq_len=32"]


def model_config(*overrides):
    return compose.compose("pretrain", [*SMALL, *overrides]).model


def build(cfg, dtype=torch.float32):
    return filled_model(cfg, 5).to(dtype).eval()


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
    ["model.positions=learned", "model.norm=layernorm", "model.activation=gelu_tanh", "model.attention_bias=true",
     "model.ffn_bias=true"],
    ["model.positions=sinusoidal", "model.norm_position=post", "model.activation=relu2"],
    ["model.positions=none", "model.activation=gelu", "model.tied_embeddings=false"],
    ["model.activation=geglu", "model.qk_norm=true", "model.attention=plain"],
    ["model.causal=false", "model.segments=2", "model.embedding_norm=true", "model.head_transform=true",
     "model.head_bias=true", "model.norm=layernorm", "model.norm_position=post", "model.ffn_bias=true"],
    ["model.norm=layernorm", "model.norm_bias=false", "model.embedding_norm=true", "model.activation=relu",
     "model.sliding_window=4", "model.global_every=2", "model.local_rope_theta=100", "model.head_width=12"],
    ["model.rope_scaling=yarn", "model.rope_factor=4", "model.rope_original_positions=16", "model.logit_softcap=3",
     "model.scaled_embeddings=true", "model.sliding_window=5"],
    ["model.value_embeddings=1", "model.qk_norm=true", "model.tied_embeddings=false"],
    [],
]  # fmt: skip


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
    segments = torch.randint(0, 2, (2, 12)) if cfg.segments else None
    cross_entropy_rows(model(tokens, segments=segments), tokens).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("parts", [*PARTS[:4], *PARTS[5:]], ids=" ".join)
def test_the_cache_gives_the_logits_of_the_whole_sequence(parts):
    model = build(model_config(*parts), torch.float64)
    tokens = torch.randint(0, 97, (2, 10))
    cache = model.trunk.new_cache(2, 10)
    pieces = [model(tokens[:, part], cache) for part in (slice(0, 4), slice(4, 5), slice(5, 8), slice(8, 10))]
    assert torch.allclose(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)


POSITIONS = [
    ["model.positions=rope"], ["model.positions=learned"], ["model.positions=sinusoidal", "model.norm_position=post"],
    ["model.positions=none"], ["model.kv_heads=1", "model.qk_norm=true"], ["model.kv_heads=0"],
    ["model.sliding_window=6", "model.global_every=2", "model.local_rope_theta=100"],
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


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [True, False])
def test_a_window_hides_what_is_far(attention, causal, with_documents):
    """One layer: the logits of a position depend on exactly the positions within its reach."""
    cfg = model_config(f"model.attention={attention}", f"model.causal={str(causal).lower()}", "model.layers=1",
                       "model.sliding_window=6")  # fmt: skip
    model, tokens = build(cfg, torch.float64), torch.randint(0, 97, (3, 16))
    documents = DOCUMENTS if with_documents else torch.zeros(3, 16, dtype=torch.int32)
    before = model(tokens, documents=documents if with_documents else None)
    for changed in range(16):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 97
        moved = (model(other, documents=documents if with_documents else None) != before).any(-1)
        back = torch.arange(16) - changed
        near = (back >= 0) & (back < 6) if causal else back.abs() <= 3
        assert torch.equal(moved, near & (documents == documents[:, changed : changed + 1]))


def test_layers_with_and_without_a_window_alternate():
    parts = ["model.layers=7", "model.sliding_window=4", "model.global_every=3"]
    assert [has_window(model_config(*parts), i) for i in range(7)] == [False, True, True, False, True, True, False]
    assert all(has_window(model_config(*parts[:2]), i) for i in range(7))
    assert not any(has_window(model_config(), i) for i in range(7))


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_scaled_rotations_turn_as_transformers_ones_do(scaling):
    parameters = {"rope_type": scaling, "rope_theta": 5e5, "factor": 8.0}
    parts = [f"model.rope_scaling={scaling}", "model.rope_theta=5e5", "model.rope_factor=8"]
    if scaling != "linear":
        parameters["original_max_position_embeddings"] = 512
        parts.append("model.rope_original_positions=512")
    if scaling == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=4096, rope_parameters=parameters
    ))  # fmt: skip
    place = torch.arange(4096)
    expected = torch.stack([part[0] for part in theirs(torch.zeros(1, 1, 1), place[None])])
    assert torch.allclose(rotations(place, 64, model_config(*parts)), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(rotations(place, 64, model_config(*parts[1:])), expected, rtol=0, atol=0.1)


def test_logits_of_chosen_positions_and_within_the_cap():
    model, tokens = build(model_config("model.logit_softcap=0.5")), torch.randint(0, 97, (2, 9))
    at = torch.rand(2, 9) < 0.4
    logits = model(tokens)
    assert torch.allclose(model(tokens, at=at), logits[at], atol=1e-6)
    assert model(tokens, at=torch.zeros_like(at)).shape == (0, 97)
    plain_logits = build(model_config())(tokens)
    assert torch.allclose(logits, 0.5 * torch.tanh(plain_logits / 0.5)) and plain_logits.abs().max() > 0.5


def test_heads_give_hidden_states_and_the_pooled_first_token():
    tokens, segments = torch.randint(0, 97, (2, 9)), torch.randint(0, 2, (2, 9))
    parts = ["model.causal=false", "model.segments=2"]
    pooled_config, bare_config = (model_config(*parts, f"model.head={head}") for head in ("pooled", "none"))
    hidden, pooled = build(pooled_config)(tokens, segments=segments)
    assert torch.equal(hidden, build(bare_config)(tokens, segments=segments))
    pooler = initial_value("pooler.weight", (64, 64), pooled_config, 0) * 5
    assert torch.allclose(pooled, torch.tanh(hidden[:, 0] @ pooler.T), atol=1e-6)
    assert set(parameter_shapes(pooled_config)) - set(parameter_shapes(bare_config)) == {"pooler.weight", "pooler.bias"}


def test_the_last_blocks_have_what_each_token_adds_to_their_values():
    plain_shapes = parameter_shapes(model_config())
    cfg = model_config("model.value_embeddings=1")
    inner = cfg.width // cfg.heads * cfg.kv_heads
    added = {"trunk.values.1.weight": (97, inner)}
    assert cfg.layers == 2 and parameter_shapes(cfg) == plain_shapes | added
    model, tokens = build(cfg), torch.randint(0, 97, (2, 9))
    value = model.trunk.blocks[1].attention.v
    seen = []
    hook = value.register_forward_hook(lambda module, given, found: seen.append(found))
    expected = model(tokens)
    of_tokens = model.trunk.values["1"].weight[tokens]
    model.trunk.values["1"].weight.data.zero_()
    hook.remove()
    assert not torch.allclose(model(tokens), expected)
    value.register_forward_hook(lambda module, given, found: found + of_tokens)
    assert torch.allclose(model(tokens), expected, atol=1e-6) and len(seen) == 1


def test_places_start_again_with_each_document():
    expected = [[*range(5), 0, *range(9), 0], [*range(12), *range(3), 0], [0, 0, *range(7), *range(7)]]
    assert places_in_documents(DOCUMENTS).tolist() == expected


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS[:2, :12]], ids=["one document", "several documents"])
def test_activation_checkpointing_changes_nothing_but_what_is_computed_twice(documents, norm_position):
    cfg = model_config("model.attention=plain", "model.dropout=0.1", f"model.norm_position={norm_position}")
    tokens = torch.randint(0, 97, (2, 12))
    gradients = []
    for checkpointing in ("none", "ffn", "full"):
        model = build_model(cfg, checkpointing)
        model.load_state_dict(build(cfg).state_dict())
        torch.manual_seed(0)
        rows = cross_entropy_rows(model(tokens, documents=documents), tokens)
        with FlopCounterMode(display=False) as counter:
            rows.sum().backward()
        again = counter.get_total_flops() - 2 * (flops_per_token(cfg, 12) / 3) * tokens.numel()
        assert again == recomputed_flops_per_token(cfg, 12, checkpointing) * tokens.numel()
        gradients.append([rows.detach(), *(p.grad for p in model.parameters())])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


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
    for init, residual in (("normal", 0.02), ("zero_residual", 0.0), ("xavier", 1 / 8)):
        other = model_config(f"model.init={init}")
        assert initial_value(name.replace("q.", "out."), shape, other, 0).std() == pytest.approx(residual, rel=0.05)
    assert initial_value("trunk.embedding.weight", (97, 64), other, 0).std() == pytest.approx(1 / 8, rel=0.05)
    with_tables = model_config("model.value_embeddings=1", "model.init=fan_in")
    assert initial_value("trunk.values.1.weight", (97, 32), with_tables, 0).std() == pytest.approx(0.02, rel=0.05)
    by_inputs = model_config("model.init=fan_in")
    for part, wide, std in (("attention.q", (64, 256), 1 / 16), ("ffn.down", (64, 256), 0.0)):
        assert initial_value(f"trunk.blocks.0.{part}.weight", wide, by_inputs, 0).std() == pytest.approx(std, rel=0.05)
    assert initial_value("trunk.embedding.weight", (97, 64), by_inputs, 0).std() == pytest.approx(0.02, rel=0.05)
    assert not initial_value("head.weight", (97, 64), by_inputs, 0).any()
    assert torch.equal(initial_value("trunk.norm.weight", (5,), cfg, 0), torch.ones(5))
    assert torch.equal(initial_value("trunk.blocks.0.ffn.up.bias", (5,), cfg, 0), torch.zeros(5))


@pytest.mark.parametrize("parts", [[], ["model.kv_heads=0", "model.activation=gelu"]], ids=["gated", "plain"])
def test_flops_are_those_that_torch_counts(parts):
    cfg = model_config("model.attention=plain", *parts)
    model, tokens = build(cfg), torch.randint(0, 97, (2, 64))
    with FlopCounterMode(display=False) as counter:
        cross_entropy_rows(model(tokens), tokens).sum().backward()
    assert flops_per_token(cfg, 64) * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("frozen", [1, 2])
def test_flops_without_a_backward_pass_of_the_lowest_layers(frozen):
    cfg = model_config("model.attention=plain", "model.tied_embeddings=false")
    model, tokens = build(cfg), torch.randint(0, 97, (2, 64))
    for part in (model.trunk.embedding, *model.trunk.blocks[:frozen]):
        part.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        cross_entropy_rows(model(tokens), tokens).sum().backward()
    found = flops_per_token(cfg, 64, frozen=frozen) * tokens.numel()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)
