"""LoRA: what learns, where it begins, the formula, and the plain model that it is merged into."""

import hashlib
from dataclasses import replace

import pytest
import torch

from pretrain.config import compose
from pretrain.hub import families
from pretrain.model.heads import parameter_shapes, trained_parameters
from pretrain.model.lora import LoRALinear, merged, without_lora
from tests.models import initial_value, model_with

SMALL = ["run.name=x", "train.seq_len=32", "model.layers=2", "model.width=24", "model.heads=4", "model.ffn_width=40",
         "model.vocab_size=97", "model.max_positions=64", "model.dropout=0"]  # fmt: skip


def small(preset, head, labels=0, **lora):
    base = compose.compose("pretrain", [*SMALL, f"model={preset}"]).model
    config = base if head == "lm" else families.fitting_head(base, head, labels)
    return replace(config, **{"lora_rank": 3, "lora_alpha": 5.0} | lora)


def drawn(name, shape):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def filled(config, read):
    return model_with(config, lambda name, shape: read(name), torch.float64).eval()


CASES = [("llama_tiny", "lm", "all"), ("gpt2_124m", "sequence", "all"), ("bert_base", "sequence", "attention"),
         ("modernbert_base", "tokens", "all"), ("llama_tiny", "embedding", "attention")]  # fmt: skip


@pytest.mark.parametrize("preset, head, where", CASES)
def test_the_merged_model_is_plain_and_computes_the_same(preset, head, where):
    config = small(preset, head, 3 if head in ("sequence", "tokens") else 0, lora_on=where)
    shapes = parameter_shapes(config)
    values = {name: drawn(name, shape) for name, shape in shapes.items()}
    plain = without_lora(config)
    ours, theirs = filled(config, values.get), filled(plain, lambda name: merged(config, name, values.get))
    assert not any(isinstance(module, LoRALinear) for module in theirs.modules())
    assert parameter_shapes(plain).items() <= shapes.items()
    tokens = torch.randint(0, 97, (2, 11))
    assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-12)
    unmerged = filled(plain, values.get)
    assert (ours(tokens) - unmerged(tokens)).abs().max() > 1e-3
    assert families.to_hf_config(plain)
    assert "lora_rank" in str(pytest.raises(ValueError, families.to_hf_config, config).value)


def test_the_product_counts_alpha_over_rank_times():
    config = small("llama_tiny", "lm")
    layer = LoRALinear(4, 2, True, config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(5, 4)
    expected = x @ layer.weight.T + layer.bias + 5 / 3 * (x @ layer.lora_a.T @ layer.lora_b.T)
    assert (
        torch.allclose(layer(x), expected, atol=1e-5) and layer.lora_a.shape == (3, 4) and layer.lora_b.shape == (2, 3)
    )


@pytest.mark.parametrize("preset, head, where", CASES)
def test_adapters_and_a_new_head_learn_and_nothing_else(preset, head, where):
    config = small(preset, head, 3 if head in ("sequence", "tokens") else 0, lora_on=where)
    names = trained_parameters(config)
    adapters = [name for name in names if "lora_" in name]
    matrices = 4 if where == "attention" else 6 if preset in ("gpt2_124m", "bert_base") else 7
    assert len(adapters) == 2 * config.layers * matrices
    tops = {"lm": set(), "embedding": set(), "sequence": {"head.weight"}, "tokens": {
        "transform.dense.weight", "transform.norm.weight", "head.weight", "head.bias"}}[head]  # fmt: skip
    if preset == "bert_base":
        tops = tops | {"head.bias", "pooler.weight", "pooler.bias"}
    assert set(names) - set(adapters) == tops
    assert trained_parameters(without_lora(config)) == list(parameter_shapes(without_lora(config)))
    model = model_with(config, drawn)
    made = model(torch.randint(0, 97, (2, 9)))
    (made * torch.randn_like(made)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(names)


def test_training_begins_with_the_model_as_it_was():
    config = small("llama_tiny", "lm")
    read = {name: initial_value(name, shape, config, 0).double() for name, shape in parameter_shapes(config).items()}
    tokens = torch.randint(0, 97, (2, 9))
    assert torch.equal(filled(config, read.get)(tokens), filled(without_lora(config), read.get)(tokens))
    name = "trunk.blocks.1.ffn.down.lora_a"
    first = initial_value(name, (64, 400), config, 0)
    assert torch.equal(first, initial_value(name, (64, 400), replace(config, init="zero_residual"), 0))
    assert not torch.equal(first, initial_value(name, (64, 400), config, 1))
    assert not torch.equal(first, initial_value(name.replace("1", "0"), (64, 400), config, 0))
    assert float(first.abs().max()) == pytest.approx(400**-0.5, rel=1e-3) and float(first.mean()) < 1e-3
    assert float(first.std()) == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)  # uniform
