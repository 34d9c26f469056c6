"""The presets are the published models: as many parameters as Hugging Face's own, on the meta device."""

import pytest
import torch
import transformers

from pretrain.config import compose
from pretrain.model.heads import parameter_shapes

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def gpt2(layers: int, width: int, heads: int):
    return transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def llama(vocab: int, layers: int, width: int, heads: int, kv_heads: int, ffn: int, tied: bool):
    return transformers.LlamaConfig(
        vocab_size=vocab, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=ffn, tie_word_embeddings=tied, rope_parameters=LLAMA3,
    )  # fmt: skip


def bert(kind, layers: int, width: int, heads: int, **more):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return kind(**sizes, intermediate_size=4 * width, **more)


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
PUBLISHED = {
    "gpt2_124m": gpt2(12, 768, 12), "gpt2_350m": gpt2(24, 1024, 16), "gpt2_774m": gpt2(36, 1280, 20),
    "gpt2_1558m": gpt2(48, 1600, 25),
    "llama_135m": llama(49152, 30, 576, 9, 3, 1536, True), "llama_1b": llama(128256, 16, 2048, 32, 8, 8192, True),
    "llama_3b": llama(128256, 28, 3072, 24, 8, 8192, True), "llama_8b": llama(128256, 32, 4096, 32, 8, 14336, False),
    "llama_70b": llama(128256, 80, 8192, 64, 8, 28672, False),
    "bert_base": bert(transformers.BertConfig, 12, 768, 12), "bert_large": bert(transformers.BertConfig, 24, 1024, 16),
    "roberta_base": bert(transformers.RobertaConfig, 12, 768, 12, **ROBERTA),
    "roberta_large": bert(transformers.RobertaConfig, 24, 1024, 16, **ROBERTA),
    "modernbert_base": transformers.ModernBertConfig(),
    # no architecture of Hugging Face is a decoder with sinusoids: DistilBERT has the same blocks
    "sinusoidal_base": transformers.DistilBertConfig(
        vocab_size=37000, n_layers=6, dim=512, n_heads=8, hidden_dim=2048, sinusoidal_pos_embds=True
    ),
}  # fmt: skip
MILLIONS = {  # as their publications say
    "gpt2_124m": 124, "gpt2_350m": 355, "gpt2_774m": 774, "gpt2_1558m": 1558, "llama_135m": 135, "llama_1b": 1236,
    "llama_3b": 3213, "llama_8b": 8030, "llama_70b": 70554, "bert_base": 110, "bert_large": 336, "roberta_base": 125,
    "roberta_large": 355, "modernbert_base": 149.6,
}  # fmt: skip


def preset(name: str):
    return compose.compose("pretrain", ["run.name=x", f"model={name}", "train.seq_len=1"]).model


def theirs(config) -> dict[str, int]:
    masked = ("bert", "roberta", "modernbert", "distilbert")
    kind = transformers.AutoModelForMaskedLM if config.model_type in masked else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return {name: parameter.numel() for name, parameter in kind.from_config(config).named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_hugging_faces_model(name):
    counts = theirs(PUBLISHED[name])
    if name.startswith("roberta"):
        counts["padding"] = -2 * preset(name).width  # two rows of its position table are never used
    if name == "sinusoidal_base":  # DistilBERT has a table, a norm on embeddings and a head besides
        kept = ("transformer.layer", "word_embeddings")
        counts = {key: count for key, count in counts.items() if any(part in key for part in kept)}
    ours = sum(torch.Size(shape).numel() for shape in parameter_shapes(preset(name)).values())
    assert ours == sum(counts.values())
    assert ours / 1e6 == pytest.approx(MILLIONS.get(name, ours / 1e6), rel=0.01)


@pytest.mark.parametrize("name", ["llama_1b", "llama_8b", "bert_base", "roberta_base", "modernbert_base", "gpt2_124m"])
def test_lengths_and_rotations_are_the_published_ones(name):
    cfg = preset(name)
    expected = {"llama_1b": (131072, 5e5, "llama3", 32.0), "llama_8b": (131072, 5e5, "llama3", 8.0),
                "bert_base": (512,), "roberta_base": (512,), "gpt2_124m": (1024,),
                "modernbert_base": (8192, 160000.0, "none")}[name]  # fmt: skip
    assert (cfg.max_positions, cfg.rope_theta, cfg.rope_scaling, cfg.rope_factor)[: len(expected)] == expected


def test_every_preset_is_compared():
    shipped = {path.stem for path in (compose.conf_folder() / "model").glob("[!_]*.yaml")}
    assert shipped == set(PUBLISHED) | {"llama_14m", "llama_tiny", "modernbert_10m"}
