"""Our models and Hugging Face's: the same function both ways, settings and names that are known, the rest refused.

The other side are real models of `transformers`, small and with odd sizes, all of their numbers drawn at random.
"""

import json
import os
import random
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from pretrain.config import compose
from pretrain.config.checks import check_model
from pretrain.config.schema import ModelConfig
from pretrain.hub import families, parts
from pretrain.inference.generate import generate_batch
from pretrain.model.heads import build_model, parameter_shapes
from pretrain.model.losses import cross_entropy_rows
from tests.forked import ROOT
from tests.models import model_with

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DECODER = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=48, bos_token_id=3, eos_token_id=4,
)  # fmt: skip
ENCODER = dict(
    vocab_size=67, hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=40,
)  # fmt: skip
MODERN = ENCODER | dict(
    num_hidden_layers=5, local_attention=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
    sep_token_id=2,
)  # fmt: skip
GPT2 = dict(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_inner=56, n_positions=40, bos_token_id=3, eos_token_id=4)
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 900.0, "factor": 3.0, "original_max_position_embeddings": 16}
KINDS = ["sliding_attention", "full_attention"]
MODERN_ROPE = {"full_attention": LLAMA3, "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", GPT2 | dict(
        n_inner=None, tie_word_embeddings=False, activation_function="gelu")),
    "gpt2 bare": ("GPT2Model", GPT2 | dict(activation_function="relu", layer_norm_epsilon=0.1)),
    "llama": ("LlamaForCausalLM", DECODER),
    "llama biases": ("LlamaForCausalLM", DECODER | dict(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR)),
    "llama tied": ("LlamaForCausalLM", DECODER | dict(tie_word_embeddings=True, head_dim=None, rope_parameters=LLAMA3)),
    "llama bare": ("LlamaModel", DECODER | dict(hidden_act="gelu", rope_parameters=YARN, rms_norm_eps=0.1)),
    "mistral": ("MistralForCausalLM", DECODER | dict(sliding_window=5)),
    "mistral full": ("MistralForCausalLM", DECODER | dict(sliding_window=None, hidden_size=26, rope_parameters=YARN)),
    "qwen3": ("Qwen3ForCausalLM", DECODER | dict(num_key_value_heads=1, rope_parameters=LLAMA3, rms_norm_eps=0.05)),
    "qwen3 window": ("Qwen3ForCausalLM", DECODER | dict(
        attention_bias=True, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    "qwen3 layers": ("Qwen3ForCausalLM", DECODER | dict(
        use_sliding_window=True, sliding_window=4, num_hidden_layers=4, layer_types=KINDS[::-1] * 2)),
    "bert": ("BertForMaskedLM", ENCODER),
    "bert untied": ("BertForMaskedLM", ENCODER | dict(tie_word_embeddings=False, hidden_act="relu", type_vocab_size=3)),
    "bert pretraining": ("BertForPreTraining", ENCODER | dict(hidden_act="gelu_new", layer_norm_eps=0.1)),
    "bert pooled": ("BertModel", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER | dict(type_vocab_size=1)),
    "roberta untied": ("RobertaForMaskedLM", ENCODER | dict(type_vocab_size=2, tie_word_embeddings=False)),
    "roberta pooled": ("RobertaModel", ENCODER | dict(type_vocab_size=1, hidden_act="relu")),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "modernbert biases": ("ModernBertForMaskedLM", MODERN | dict(
        norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, tie_word_embeddings=False,
        rope_parameters=MODERN_ROPE, layer_types=[*KINDS[::-1] * 2, KINDS[1]], local_attention=5)),
    "modernbert bare": ("ModernBertModel", MODERN | dict(layer_types=KINDS[:1] * 5, hidden_activation="silu")),
    "modernbert full": ("ModernBertForMaskedLM", MODERN | dict(layer_types=KINDS[1:] * 5, decoder_bias=False)),
}  # fmt: skip
TUNED = {
    "gpt2": ("GPT2", GPT2 | dict(pad_token_id=1)),
    "llama": ("Llama", DECODER | dict(pad_token_id=1, attention_bias=True)),
    "mistral": ("Mistral", DECODER | dict(pad_token_id=1, sliding_window=5)),
    "qwen3": ("Qwen3", DECODER | dict(pad_token_id=1)),
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", ENCODER | dict(type_vocab_size=1)),
    "modernbert": ("ModernBert", MODERN | dict(classifier_pooling="mean")),
}  # fmt: skip
for family, (name, settings) in TUNED.items():
    CASES[f"{family} sequence"] = (f"{name}ForSequenceClassification", settings | dict(num_labels=5))
    CASES[f"{family} tokens"] = (f"{name}ForTokenClassification", settings | dict(num_labels=7))
    CASES[f"{family} span"] = (f"{name}ForQuestionAnswering", settings)
CASES["modernbert first"] = ("ModernBertForSequenceClassification", MODERN | dict(
    norm_bias=True, mlp_bias=True, classifier_bias=True, classifier_pooling="cls",
    id2label={0: "no", 1: "yes"}))  # fmt: skip
IN_FP32 = ("llama", "mistral", "qwen3", "modernbert")  # their norms or softmax are fp32 whatever the model is


def scramble(model):
    """Every number at random, the weights of norms around one: what is swapped shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() or "ln_" in name
            centre = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * torch.randn_like(parameter))
    return model.double().eval()


def their_model(case, **changed):
    name, settings = CASES[case]
    cls = getattr(transformers, name)
    config = cls.config_class(**settings | {"attn_implementation": "eager"} | changed)
    return scramble(cls(config))


def read_folder(folder):
    """config.json and tensors, as files have them."""
    return json.loads((folder / "config.json").read_text()), safetensors_torch.load_file(folder / "model.safetensors")


def into_ours(settings, tensors, ignore=()):
    """Our model with their numbers."""
    config = families.from_hf_config(settings, ignore, tensors.keys())
    check_model(config)
    found, _ = families.match_names(config, tensors.keys(), settings["model_type"])
    ours = {}
    for tensor in families.hf_tensors(config, settings["model_type"]):
        ours |= zip(tensor.ours, tensor.from_hf(tensors[found[tensor.name]]), strict=True)
    return filled(config, ours)


def filled(config, values):
    assert parameter_shapes(config).keys() == values.keys()
    return model_with(config, lambda name, shape: values[name], torch.float64).eval()


def batch(config, seed=2, length=17):
    """Tokens, padding behind the second row: 1 as RoBERTa wants it, and less than a window, which transformers' slow
    attention makes into NaN in fp64.
    """
    torch.manual_seed(seed)
    tokens, mask = torch.randint(5, config.vocab_size, (2, length)), torch.ones(2, length, dtype=torch.int64)
    mask[1, length - 2 :] = 0
    tokens[mask == 0] = 1
    segments = torch.randint(0, max(config.segments, 1), (2, length))
    return tokens, mask, segments


@torch.no_grad()
def compare(ours, theirs, config):
    """Logits or hidden states, and what is pooled, at the positions that are no padding."""
    tokens, mask, segments = batch(config)
    kinds = {"token_type_ids": segments} if config.segments else {}
    made = theirs(input_ids=tokens, attention_mask=mask, **kinds)
    if "start_logits" in made:
        made["logits"] = torch.stack((made.start_logits, made.end_logits), -1)
    expected = [made[key] for key in ("logits", "prediction_logits", "last_hidden_state", "pooler_output")
                if made.get(key) is not None]  # fmt: skip
    got = ours(tokens, documents=mask - 1, **({"segments": segments} if config.segments else {}))
    got = list(got) if isinstance(got, tuple) else [got]
    assert len(got) == len(expected)
    precision = 5e-6 if theirs.config.model_type in IN_FP32 else 1e-12
    for a, b in zip(got, expected, strict=True):
        at = mask.bool() if a.dim() == 3 else slice(None)
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
        a, b = a[at], b[at]
        assert torch.allclose(a, b, rtol=0, atol=precision * float(b.abs().max()))
        assert float(b.std()) > 0.1 and not torch.allclose(b[0], b[1], rtol=0.1)  # there is something to compare


@pytest.mark.parametrize("case", CASES)
def test_theirs_computes_the_same_as_ours(case, tmp_path):
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    settings, tensors = read_folder(tmp_path)
    ours = into_ours(settings, tensors)
    compare(ours, theirs, ours.config if hasattr(ours, "config") else ours.trunk.config)
    if case == "llama tied":
        assert "lm_head.weight" not in tensors and ours.head.weight is ours.trunk.embedding.weight


@pytest.mark.parametrize("case", CASES)
def test_ours_computes_the_same_as_theirs(case, tmp_path):
    name, settings = CASES[case]
    theirs = getattr(transformers, name).config_class(architectures=[name], **settings)
    imported = families.from_hf_config(theirs.to_dict())
    ours = scramble(build_model(imported))
    numbers, written = dict(ours.named_parameters()), families.to_hf_config(imported)
    tensors = {
        tensor.name: tensor.to_hf(*(numbers[name].detach() for name in tensor.ours)).clone()
        for tensor in families.hf_tensors(imported)
    }
    assert [(tensor.name, tensor.shape) for tensor in families.hf_tensors(imported)] == [
        (name, tuple(value.shape)) for name, value in tensors.items()
    ]
    (tmp_path / "config.json").write_text(json.dumps(written | {"pad_token_id": 1}))
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loader = getattr(transformers, families.auto_class(imported))
    theirs, loading = loader.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == written["architectures"][0]
    names = list(theirs.state_dict())
    tied = {"lm_head.weight", "cls.predictions.decoder.weight", "decoder.weight", "lm_head.decoder.weight",
            "cls.predictions.decoder.bias", "lm_head.decoder.bias"}  # fmt: skip
    assert [name for name in names if name in tensors or name not in tied] == list(tensors)
    compare(ours, theirs.eval(), imported)
    theirs.save_pretrained(tmp_path / "again")
    again, same = read_folder(tmp_path / "again")
    assert families.from_hf_config(again) == imported
    assert same.keys() == tensors.keys() and all(torch.equal(same[name], tensors[name]) for name in same)


def imported(case, **changed):
    """Our model of a case and theirs."""
    theirs = their_model(case, **changed)
    settings = theirs.config.to_dict() | {"architectures": [CASES[case][0]]}
    tied = set(theirs.all_tied_weights_keys)
    tensors = {name: value for name, value in theirs.state_dict().items() if name not in tied}
    return into_ours(settings, tensors), theirs


@pytest.mark.parametrize("case", ["gpt2", "llama", "mistral", "qwen3 layers", "bert", "roberta untied", "modernbert"])
def test_losses_are_theirs(case):
    ours, theirs = imported(case)
    config = ours.trunk.config
    tokens, _, segments = batch(config)
    tokens[tokens == 1] = 5  # RoBERTa would pass it over
    labels = torch.where(torch.rand(tokens.shape) < 0.3, tokens, -100)
    kinds = {"token_type_ids": segments} if config.segments else {}
    with torch.no_grad():
        expected = theirs(input_ids=tokens, labels=labels, **kinds).loss
        logits = ours(tokens, segments=segments if config.segments else None)
    if config.causal:
        logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    mean = cross_entropy_rows(logits, labels).sum() / (labels != -100).sum()
    assert float(mean) == pytest.approx(float(expected), rel=1e-5) and expected > 1


@pytest.mark.parametrize("case", ["gpt2 untied", "llama", "mistral", "qwen3 layers", "qwen3 window"])
def test_decoding_with_a_cache_gives_their_ids(case):
    ours, theirs = imported(case)
    prompt = batch(ours.trunk.config, length=9)[0][:1]
    made = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    (chosen,) = generate_batch(ours, prompt.tolist(), 20)
    assert chosen == made[0, 9:].tolist() and len(set(chosen)) > 3


# Settings

PUBLISHED = {
    "gpt2_124m": """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}""",
    "llama_8b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256}""",
    "bert_base": """{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": false, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2,
        "use_cache": true, "vocab_size": 30522}""",
    "roberta_base": """{"architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
        "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514,
        "model_type": "roberta", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "type_vocab_size": 1, "vocab_size": 50265}""",
    "modernbert_base": """{"architectures": ["ModernBertForMaskedLM"], "attention_bias": false, "attention_dropout":
        0.0, "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": false, "classifier_dropout":
        0.0, "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": true, "deterministic_flash_attn":
        false, "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0, "gradient_checkpointing": false, "hidden_activation": "gelu", "hidden_size":
        768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 1152,
        "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings":
        8192, "mlp_bias": false, "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": false, "norm_eps":
        1e-05, "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type":
        "absolute", "sep_token_id": 50282, "tie_word_embeddings": true, "torch_dtype": "float32",
        "transformers_version": "4.47.0.dev0", "vocab_size": 50368}""",
}


def function_of(config):
    """A settled config without what changes no output."""
    return replace(parts.settled(config), **{key: parts.NEUTRAL[key] for key in parts.TRAINING_ONLY})


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_settings_are_our_presets(preset):
    """Settings of the models that our presets are called after, with the keys that files of their time have."""
    settings = json.loads(PUBLISHED[preset])
    config = families.from_hf_config(settings)
    ours = compose.compose("pretrain", ["run.name=x", f"model={preset}", "train.seq_len=8"]).model
    assert function_of(config) == function_of(ours)
    assert families.to_hf_config(config)["model_type"] == settings["model_type"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_config_json_leaves_out_has_their_default(family):
    cls = type(transformers.AutoConfig.for_model(family))
    spelled_out = cls().to_dict()
    assert families.from_hf_config({"model_type": family}) == families.from_hf_config(spelled_out)
    for key, (theirs, default) in families.FAMILIES[family].keys.items():
        assert getattr(cls, theirs) == default, key  # the default of the class, which may be None: to be derived
    for theirs in families.FAMILIES[family].dropouts:
        assert hasattr(cls(), theirs), theirs


def test_every_value_has_the_type_of_its_key():
    for case, (name, settings) in CASES.items():
        theirs = getattr(transformers, name).config_class(architectures=[name], **settings)
        config = families.from_hf_config(theirs.to_dict())
        for key, value in asdict(config).items():
            assert type(value).__name__ == ModelConfig.__annotations__[key].__name__, (case, key)


def test_neutral_values_are_those_of_the_base_preset():
    base = yaml.safe_load((ROOT / "conf/model/_base.yaml").read_text())
    assert {key: base[key] for key in parts.NEUTRAL} == parts.NEUTRAL


MUTATIONS = {
    "causal": (True, False), "positions": ("rope", "learned", "sinusoidal", "none"), "rope_theta": (100.0, 1e4),
    "rope_scaling": ("none", "linear", "llama3", "yarn"), "rope_factor": (2.0, 4.0), "rope_low_freq_factor": (1.0, 2.0),
    "rope_original_positions": (16, 64), "sliding_window": (0, 3, 8), "global_every": (0, 1, 2, 3, 9),
    "local_rope_theta": (0.0, 50.0, 100.0), "norm": ("rmsnorm", "layernorm"), "norm_position": ("pre", "post"),
    "norm_eps": (1e-5, 1e-3), "norm_bias": (True, False), "embedding_norm": (True, False),
    "scaled_embeddings": (True, False), "segments": (0, 1, 2), "qk_norm": (True, False),
    "activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2"), "attention_bias": (True, False),
    "ffn_bias": (True, False), "tied_embeddings": (True, False), "labels": (0, 2, 5),
    "head": ("lm", "pooled", "none", "sequence", "tokens", "span"), "pooling": ("first", "last", "mean", "pooler"),
    "head_transform": (True, False), "head_bias": (True, False), "logit_softcap": (0.0, 30.0),
    "value_embeddings": (0, 1), "kv_heads": (0, 1, 2), "head_width": (0, 6, 8),
    "ffn_width": (0, 40), "layers": (1, 3, 4), "max_positions": (32, 128), "width": (24, 30),
    "dropout": (0.0, 0.1),
}  # fmt: skip


def test_settings_come_back_from_a_round_trip_and_what_no_architecture_has_is_refused():
    """Real models with some parts exchanged: either the same function comes back, or the keys in the way are named."""
    draw, written = random.Random(0), dict.fromkeys(families.FAMILIES, 0)
    bases = [
        families.from_hf_config(getattr(transformers, name).config_class(architectures=[name], **settings).to_dict())
        for name, settings in CASES.values()
    ]
    refused = 0
    for _ in range(2000):
        base = draw.choice(bases)
        keys = draw.sample(list(MUTATIONS), draw.randint(0, 4))
        config = replace(base, **{key: draw.choice(MUTATIONS[key]) for key in keys})
        try:
            check_model(config)
        except ValueError:
            continue
        try:
            theirs = json.loads(json.dumps(families.to_hf_config(config)))
        except ValueError as error:
            assert str(error).startswith("no architecture of Hugging Face") and "model." in str(error)
            refused += 1
            continue
        written[theirs["model_type"]] += 1
        names = [tensor.name for tensor in families.hf_tensors(config)]
        again = families.from_hf_config(theirs, names=names)
        check_model(again)
        assert function_of(again) == function_of(config), config
        assert again.dropout == config.dropout and again == parts.settled(again)
        if sum(written.values()) % 8 == 0:  # their class reads it as we do
            cls = getattr(transformers, theirs["architectures"][0]).config_class
            assert families.from_hf_config(cls(**theirs).to_dict(), names=names) == again
            assert families.hf_tensors(again) == families.hf_tensors(config)
    assert min(written.values()) > 25 and refused > 300, (written, refused)


@pytest.mark.parametrize("changes, named", [
    ({"positions": "sinusoidal"}, "has model.positions=sinusoidal with"),
    ({"logit_softcap": 30.0}, "has model.logit_softcap=30.0 with"),
    ({"value_embeddings": 1}, "has model.value_embeddings=1 with"),
    ({"scaled_embeddings": True}, "has model.scaled_embeddings=True with"),
    ({"activation": "relu2"}, "has model.activation=relu2 with"),
    ({"head": "pooled"}, "has model.head=pooled with"),
    ({"sliding_window": 8, "global_every": 2}, "has model.global_every=2 with"),
    ({"sliding_window": 8, "attention_bias": True}, "has model.sliding_window=8 with"),
    ({"norm_position": "post", "norm": "layernorm"}, "has model.norm=layernorm, model.norm_position=post with"),
    ({"qk_norm": True, "ffn_bias": True}, "has model.qk_norm=True with"),
])  # fmt: skip
def test_what_no_architecture_has_is_named(changes, named):
    llama = families.from_hf_config({"model_type": "llama", "vocab_size": 50})
    with pytest.raises(ValueError, match="no architecture of Hugging Face that this program knows " + named) as raised:
        families.to_hf_config(replace(llama, **changes))
    assert "the nearest is " in str(raised.value)


def test_heads_that_do_not_fill_the_width_are_refused_where_they_must():
    """30 = 4 x 7 + 2: only the classes with a head_dim of their own, and not LLaMA's, take that."""
    gpt2 = replace(families.from_hf_config({"model_type": "gpt2"} | GPT2), width=30, heads=4, kv_heads=4, head_width=7)
    with pytest.raises(ValueError, match="has model.head_width=7 with"):
        families.to_hf_config(gpt2)
    llama = replace(families.from_hf_config({"model_type": "llama"} | DECODER), width=30, head_width=7)
    assert families.to_hf_config(llama)["model_type"] == "mistral"
    with pytest.raises(ValueError, match="has model.width=30 with .* the nearest is llama"):
        families.to_hf_config(replace(llama, attention_bias=True))


LM = {"architectures": ["BertForMaskedLM"]}


@pytest.mark.parametrize("settings, key", [
    ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True"),
    ({"model_type": "gpt2", "activation_function": "tanh"}, "activation_function='tanh'"),
    ({"model_type": "gpt2", "pruned_heads": {"1": [0]}}, "pruned_heads={'1'"),
    ({"model_type": "llama", "hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
    ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic'"),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope'"),
    ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}},
     "rope_parameters.partial_rotary_factor=0.5"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"model_type": "llama", "rope_parameters": YARN | {"beta_fast": 16}}, "rope_parameters.beta_fast=16"),
    ({"model_type": "llama", "rope_parameters": YARN | {"attention_factor": 1.5}},
     "rope_parameters.attention_factor=1.5"),
    ({"model_type": "llama", "rope_parameters": YARN | {"mscale": 0.7}}, "rope_parameters.mscale=0.7"),
    ({"model_type": "llama", "rope_parameters": YARN | {"truncate": False}}, "rope_parameters.truncate=False"),
    ({"model_type": "llama", "rope_parameters": LINEAR | {"new_kind": 3}}, "rope_parameters.new_kind=3"),
    ({"model_type": "llama", "sliding_window": 64}, "sliding_window=64"),
    ({"model_type": "llama", "num_experts": 8}, "num_experts=8"),
    ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}, "auto_map={'AutoModel': 'x.Y'}"),
    ({"model_type": "llama", "is_encoder_decoder": True}, "is_encoder_decoder=True"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True"),
    ({"model_type": "mistral", "layer_types": [*KINDS]}, "layer_types=['sliding"),
    ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=True"),
    ({"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": KINDS[:1] * 2}, "layer_types=['sliding"),
    ({"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["chunked_attention"] * 2}, "layer_types=['chunk"),
    ({"model_type": "bert", "is_decoder": True}, "is_decoder=True"),
    ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"model_type": "roberta", "pad_token_id": 0}, "pad_token_id=0"),
    ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id=None"),
    ({"model_type": "roberta", "hidden_act": "relu"}, "hidden_act="),
    ({"model_type": "modernbert", "classifier_bias": True}, "classifier_bias=True"),
    ({"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"],
      "classifier_pooling": "max"}, "classifier_pooling='max'"),
    ({"model_type": "modernbert", "classifier_activation": "relu"}, "classifier_activation='relu'"),
    ({"model_type": "modernbert", "num_hidden_layers": 2, "layer_types": KINDS}, "layer_types=['sliding"),
    ({"model_type": "modernbert", "rope_parameters": {KINDS[0]: LINEAR}}, "rope_parameters="),
])  # fmt: skip
def test_settings_that_change_the_function_are_refused_or_ignored_on_demand(settings, key):
    with pytest.raises(ValueError) as raised:
        families.from_hf_config(settings)
    name = key.split("=")[0]
    assert f"config.json: {key}" in str(raised.value) and "may change what the model computes" in str(raised.value)
    assert f"`tools/import_hf.py --ignore {name}`" in str(raised.value)
    without = {inner: value for inner, value in settings.items() if inner != name.split(".")[0]}
    if "." not in name:
        assert families.from_hf_config(settings, [name]) == families.from_hf_config(without)
    elif name != "rope_scaling.rope_type":
        families.from_hf_config(settings, [name])
    if "quantization" in name:
        assert "dequantize" in str(raised.value)


@pytest.mark.parametrize("settings, message", [
    ({}, "model_type=None is not supported; these are: gpt2, llama, mistral"),
    ({"model_type": "t5"}, "model_type='t5' is not supported"),
    ({"model_type": "bert", "architectures": ["BertForMultipleChoice"]},
     "architectures=BertForMultipleChoice is not supported .*: BertForMaskedLM, BertForSequenceClassification, "),
    ({"model_type": "bert", "architectures": ["BertForTokenClassification"], "id2label": {"0": "a", "2": "b"}},
     "id2label=.*must name the labels 0 to 1"),
    ({"model_type": "bert", "architectures": ["BertForTokenClassification"], "id2label": {"0": "a", "1": "a"}},
     "id2label has the name 'a' for several labels"),
    ({"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]}, "architectures=GPT2DoubleHeadsModel is not"),
    ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, "architectures=RobertaForCausalLM is not"),
    ({"model_type": "llama", "hidden_size": "64"}, "hidden_size='64' must be a"),
    ({"model_type": "llama", "head_dim": 2.5}, "head_dim=2.5 must be a"),
    ({"model_type": "llama", "hidden_size": None}, "hidden_size=None is no llama: give its number"),
    ({"model_type": "llama", "intermediate_size": None}, "intermediate_size=None is no llama"),
    ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads=0 is no llama"),
    ({"model_type": "llama", "rope_theta": None}, "rope_parameters.rope_theta=None: give its number"),
    ({"model_type": "llama", "attention_bias": 1}, "attention_bias=1 must be a"),
    ({"model_type": "llama", "rope_scaling": [1]}, r"rope_scaling=\[1\] must be a dictionary"),
    ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
])  # fmt: skip
def test_impossible_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        families.from_hf_config(settings)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, YARN, YARN | {"attention_factor": 1.10986122886681098}])
def test_both_spellings_of_rotary_positions_are_read(scaling):
    inner = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type")}
    old = {"rope_theta": scaling["rope_theta"], "rope_scaling": inner | {"type": scaling["rope_type"]}}
    new = families.from_hf_config({"model_type": "llama", "rope_parameters": scaling})
    assert families.from_hf_config({"model_type": "llama"} | old) == new
    assert new.rope_scaling == scaling["rope_type"] and new.rope_factor == scaling["factor"]
    assert new.rope_theta == scaling["rope_theta"]


def test_transformers_4_finds_its_own_spelling_in_what_is_exported():
    for name, settings in CASES.values():
        cls = getattr(transformers, name).config_class
        config = families.from_hf_config(cls(architectures=[name], **settings).to_dict())
        written = families.to_hf_config(config)
        if written.pop("rope_parameters", None) and config.causal:
            assert families.from_hf_config(written) == config, name


def test_the_old_spelling_goes_first_where_both_are_given():
    both = {"rope_scaling": LINEAR | {"rope_theta": 77.0}, "rope_parameters": YARN}
    theirs = transformers.LlamaConfig(**both).rope_parameters
    ours = families.from_hf_config({"model_type": "llama"} | both)
    assert (ours.rope_scaling, ours.rope_theta) == (theirs["rope_type"], theirs["rope_theta"]) == ("linear", 77.0)


def test_positions_that_no_layer_uses_do_not_count():
    """All layers have a window and a theta of their own: the other theta and its scaling are nobody's."""
    every = families.from_hf_config({"model_type": "modernbert", "layer_types": KINDS[:1] * 5} | MODERN)
    assert (every.global_every, every.rope_theta, every.local_rope_theta) == (0, 10000.0, 0.0)
    unused = {"rope_scaling": "linear", "rope_factor": 3.0, "rope_theta": 5.0, "local_rope_theta": 10000.0}
    assert parts.settled(replace(every, **unused)) == every
    assert families.from_hf_config(families.to_hf_config(replace(every, **unused))) == every


def test_a_local_theta_of_null_is_the_global_one():
    null = families.from_hf_config({"model_type": "modernbert", "global_rope_theta": 500.0, "local_rope_theta": None})
    assert (null.rope_theta, null.local_rope_theta, null.sliding_window) == (500.0, 0.0, 128)


def test_exported_settings_load_without_a_complaint(caplog):
    transformers.logging.enable_propagation()
    try:
        for name, settings in CASES.values():
            cls = getattr(transformers, name).config_class
            config = families.from_hf_config(cls(architectures=[name], **settings).to_dict())
            caplog.clear()
            written = families.to_hf_config(config)
            cls.from_dict(written)
            assert not caplog.records, (name, caplog.text)
    finally:
        transformers.logging.disable_propagation()


def test_a_roberta_whose_padding_is_not_1_is_written_as_a_bert(tmp_path):
    """RoBERTa passes over the token 1 when it counts positions, whatever it means."""
    config = families.from_hf_config({"model_type": "roberta"} | ENCODER | {"type_vocab_size": 1})
    assert families.to_hf_config(config)["pad_token_id"] == 1
    written = families.to_hf_config(config, pad_token_id=None)
    assert (written["model_type"], written["type_vocab_size"]) == ("bert", 1)
    assert families.from_hf_config(written) == config
    ours = scramble(build_model(config))
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**written)).double().eval()
    numbers, tensors = dict(ours.named_parameters()), families.hf_tensors(config, "bert")
    state = {tensor.name: tensor.to_hf(*(numbers[name].detach() for name in tensor.ours)) for tensor in tensors}
    assert set(theirs.load_state_dict(state, strict=False).missing_keys) == set(theirs.all_tied_weights_keys)
    theirs.tie_weights()
    compare(ours, theirs, config)


# Names


def names_of(case):
    theirs = their_model(case)
    settings = theirs.config.to_dict() | {"architectures": [CASES[case][0]]}
    return list(theirs.state_dict()), families.from_hf_config(settings)


def tensor_names(config, model_type):
    return [tensor.name for tensor in families.hf_tensors(config, model_type)]


def test_files_without_the_prefix_and_with_old_norms_are_understood():
    config = families.from_hf_config({"model_type": "gpt2"} | GPT2)
    bare = [name.removeprefix("transformer.") for name in tensor_names(config, "gpt2")]
    masks = ["h.0.attn.bias", "h.0.attn.masked_bias", "transformer.h.1.attn.bias"]
    found, leftovers = families.match_names(config, [*bare, *masks])
    assert found["transformer.h.2.ln_1.bias"] == "h.2.ln_1.bias" and list(found.values()) == bare
    assert {left.name: left.reason for left in leftovers} == dict.fromkeys(masks, "the causal mask, which is computed")

    config = families.from_hf_config({"model_type": "bert"} | ENCODER)
    names = tensor_names(config, "bert")
    old = [name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
           for name in names]  # fmt: skip
    found, leftovers = families.match_names(config, old)
    assert found == dict(zip(names, old, strict=True)) and not leftovers and old != names

    bare_model = replace(config, head="pooled", head_transform=False, head_bias=False)
    names = tensor_names(bare_model, "bert")
    found, _ = families.match_names(bare_model, ["bert." + name for name in names], "bert")
    assert found == {name: "bert." + name for name in names}


def test_leftovers_are_explained():
    names, config = names_of("bert pretraining")
    found, leftovers = families.match_names(config, [*names, "bert.embeddings.position_ids"], "bert")
    reasons = {left.name: left.reason for left in leftovers}
    assert reasons.pop("cls.seq_relationship.weight") == "next-sentence prediction is not part of this project"
    assert reasons.pop("cls.seq_relationship.bias") and reasons.pop("bert.embeddings.position_ids")
    assert "pooler" in reasons.pop("bert.pooler.dense.weight") and reasons.pop("bert.pooler.dense.bias")
    assert {left.name: left.copy_of for left in leftovers if left.copy_of} == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert set(reasons) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert not any(left.copy_of for left in leftovers if left.name not in reasons)

    config = families.from_hf_config({"model_type": "llama"} | DECODER)
    names = [*tensor_names(config, "llama"), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert [left.name for left in families.match_names(config, names)[1]] == names[-1:]


def test_tied_and_free_output_matrices_follow_the_settings():
    tied = families.from_hf_config({"model_type": "llama", "tie_word_embeddings": True} | DECODER)
    free = replace(tied, tied_embeddings=False)
    names = tensor_names(free, "llama")
    found, leftovers = families.match_names(tied, names)
    assert "lm_head.weight" not in found
    embedding = "model.embed_tokens.weight"
    assert leftovers == [families.Leftover("lm_head.weight", f"a copy of {embedding}", embedding)]
    found, leftovers = families.match_names(tied, [name for name in names if name != embedding])
    assert found[embedding] == "lm_head.weight" and not leftovers  # as transformers does
    found, leftovers = families.match_names(free, names)
    assert found["lm_head.weight"] == "lm_head.weight" and not leftovers
    with pytest.raises(ValueError, match="lacks .* lm_head.weight: if .* say tie_word_embeddings=true in config.json"):
        families.match_names(free, tensor_names(tied, "llama"))


def test_the_bias_of_a_free_bert_is_the_one_that_it_uses():
    """transformers 5 uses decoder.bias and writes both; older versions wrote the other one only, then the same."""
    names, config = names_of("bert untied")
    used, other = "cls.predictions.decoder.bias", "cls.predictions.bias"
    found, leftovers = families.match_names(config, names, "bert")
    assert found[used] == found[other] == used
    assert [(left.name, left.copy_of) for left in leftovers] == [(other, "")]
    found, leftovers = families.match_names(config, [name for name in names if name != used], "bert")
    assert found[used] == found[other] == other and not leftovers


def test_missing_and_unknown_tensors_are_refused():
    config = families.from_hf_config({"model_type": "llama"} | DECODER)
    names = tensor_names(config, "llama")
    lost = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"lacks tensors that config.json calls for: {lost}$"):
        families.match_names(config, [name for name in names if name != lost])
    with pytest.raises(ValueError, match="no place in LlamaForCausalLM .*: model.layers.0.self_attn.q_norm.weight"):
        families.match_names(config, [*names, "model.layers.0.self_attn.q_norm.weight"])
    with pytest.raises(ValueError, match="no place in LlamaModel .*: lm_head.weight"):
        families.match_names(replace(config, head="none"), names)
    with pytest.raises(ValueError, match="under two names: "):
        families.match_names(config, [*names, "norm.weight"])
    with pytest.raises(ValueError, match="and [0-9]+ more"):
        families.match_names(config, names[:3])
    pooled = families.from_hf_config({"model_type": "bert", "architectures": ["BertModel"]} | ENCODER)
    names = tensor_names(pooled, "bert")
    with pytest.raises(ValueError, match="pooler.dense.weight: it is a model without a pooler, of model.head=none"):
        families.match_names(pooled, [name for name in names if "pooler" not in name])


def test_a_bert_without_a_pooler(tmp_path):
    theirs = scramble(transformers.BertModel(transformers.BertConfig(**ENCODER), add_pooling_layer=False))
    theirs.save_pretrained(tmp_path)
    ours = into_ours(*read_folder(tmp_path))
    config = ours.trunk.config
    assert config.head == "none"
    compare(ours, theirs, config)
    written = families.to_hf_config(config)
    names = [tensor.name for tensor in families.hf_tensors(config)]
    assert written["architectures"] == ["BertModel"] and families.from_hf_config(written, names=names) == config
    assert families.auto_class(config) == "AutoModel"
    assert tensor_names(config, None) == list(theirs.state_dict())


def test_a_tensor_of_another_shape_is_refused():
    config = families.from_hf_config({"model_type": "gpt2"} | GPT2)
    tensor = next(tensor for tensor in families.hf_tensors(config) if "c_attn.weight" in tensor.name)
    assert tensor.shape == (24, 72) and tensor.ours == tuple(f"trunk.blocks.0.attention.{x}.weight" for x in "qkv")
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn.weight has the shape \[72, 24\], .*\[24, 72\]"):
        tensor.from_hf(torch.zeros(72, 24))


def test_rows_in_front_of_robertas_positions_are_zero():
    config = families.from_hf_config({"model_type": "roberta"} | ENCODER | {"type_vocab_size": 1})
    tensor = next(tensor for tensor in families.hf_tensors(config) if tensor.ours == ("trunk.positions.weight",))
    ours = torch.randn(parameter_shapes(config)["trunk.positions.weight"])
    theirs = tensor.to_hf(ours)
    assert theirs.shape == (40, 24) and torch.equal(theirs[:2], torch.zeros(2, 24))
    assert torch.equal(tensor.from_hf(theirs)[0], ours)
