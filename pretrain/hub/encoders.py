"""Bidirectional models of Hugging Face that are this project's with other names: BERT, RoBERTa, ModernBERT."""

from dataclasses import replace
from typing import Any

from pretrain.config.schema import ModelConfig
from pretrain.hub.parts import (
    BARE,
    FULL,
    GATED,
    MATRIX_HEADS,
    PLAIN,
    ROPE,
    SLIDING,
    WINDOW,
    Family,
    Reader,
    Rule,
    block_rules,
    read_layers,
    read_rope,
    task_tops,
    write_layers,
    write_rope,
)

POOLINGS = {"first": "cls", "mean": "mean"}  # ours -> ModernBERT's
EMBEDDING_NORM = Rule("embeddings.LayerNorm", ("trunk.embedding_norm",))
POSITIONS = "embeddings.position_embeddings"
LAYERS = (
    *block_rules("encoder.layer.{i}.", attention__self__query="attention.q", attention__self__key="attention.k",
                 attention__self__value="attention.v", attention__output__dense="attention.out",
                 attention__output__LayerNorm="attention_norm", intermediate__dense="ffn.up",
                 output__dense="ffn.down", output__LayerNorm="ffn_norm"),
)  # fmt: skip
BERT_LEFTOVERS = (
    (r"embeddings\.(position|token_type)_ids", "numbers from 0 on"),
    (r"cls\.seq_relationship\..*", "next-sentence prediction is not part of this project"),
    (r"pooler\.dense\..*", "the pooler, which this head does not use"),
)

BERT = Family(
    model_type="bert", name="Bert", lm="ForMaskedLM", prefix="bert.", also={"BertForPreTraining": "lm"},
    has_pooler=True,
    keys={
        "vocab_size": ("vocab_size", 30522), "layers": ("num_hidden_layers", 12), "width": ("hidden_size", 768),
        "heads": ("num_attention_heads", 12), "ffn_width": ("intermediate_size", 3072),
        "max_positions": ("max_position_embeddings", 512), "segments": ("type_vocab_size", 2),
        "norm_eps": ("layer_norm_eps", 1e-12), "activation": ("hidden_act", "gelu"),
        "tied_embeddings": ("tie_word_embeddings", True), "dropout": ("hidden_dropout_prob", 0.1),
        "init_std": ("initializer_range", 0.02),
    },
    always={"causal": False, "positions": "learned", "norm": "layernorm", "norm_position": "post",
            "embedding_norm": True, "attention_bias": True, "ffn_bias": True},
    with_head={"lm": {"head_transform": True, "head_bias": True}, "tokens": {"head_bias": True},
               "span": {"head_bias": True}, "sequence": {"head_bias": True, "pooling": "pooler"}},
    activations=PLAIN, dropouts=("attention_probs_dropout_prob",),
    expects=(("position_embedding_type", "absolute", None), ("is_decoder", False), ("add_cross_attention", False)),
    output="cls.predictions.decoder.weight", embedding="bert.embeddings.word_embeddings.weight",
    biases=("cls.predictions.decoder.bias", "cls.predictions.bias"), leftovers=BERT_LEFTOVERS,
    misfits=lambda config: {} if config.segments else {"segments": "1 or more"},
    rules=(
        Rule("embeddings.word_embeddings", ("trunk.embedding",)),
        Rule(POSITIONS, ("trunk.positions",)),
        Rule("embeddings.token_type_embeddings", ("trunk.segments",)),
        EMBEDDING_NORM, *LAYERS,
    ),
    tops=task_tops("classifier", "classifier", "qa_outputs") | {
        "lm": (
            Rule("cls.predictions.bias", ("head.bias",)),
            Rule("cls.predictions.transform.dense", ("transform.dense",)),
            Rule("cls.predictions.transform.LayerNorm", ("transform.norm",)),
            Rule("cls.predictions.decoder.weight", ("head.weight",)),
            Rule("cls.predictions.decoder.bias", ("head.bias",), only_with="head.weight"),
        ),
        "sequence": (Rule("bert.pooler.dense", ("pooler",)), Rule("classifier", ("head",))),
        "pooled": (Rule("pooler.dense", ("pooler",)),),
    },
)  # fmt: skip

ROBERTA_PAD = 1  # RoBERTa counts its positions from the padding's id + 1, and passes padding over


def _read_roberta(hf: Reader, ours: dict[str, Any]) -> dict[str, Any]:
    pad = hf.take("pad_token_id", ROBERTA_PAD)
    if pad != ROBERTA_PAD:
        hf.refuse("pad_token_id", pad, f"RoBERTa's positions begin after it, and only {ROBERTA_PAD} is known here")
    if ours["head"] == "lm" and ours["activation"] != "gelu":
        hf.refuse("hidden_act", ours["activation"], "RoBERTa's head has gelu whatever the trunk has, ours does not")
    return {"max_positions": ours["max_positions"] - ROBERTA_PAD - 1}


def _write_roberta(config: ModelConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.max_positions + ROBERTA_PAD + 1, "pad_token_id": ROBERTA_PAD}


def _roberta_misfits(config: ModelConfig) -> dict[str, Any]:
    misfits = {"segments": 1} if config.segments != 1 else {}
    return misfits | ({"activation": "gelu"} if config.head == "lm" and config.activation != "gelu" else {})


ROBERTA = replace(
    BERT, model_type="roberta", name="Roberta", prefix="roberta.", also={},
    keys=BERT.keys | {"vocab_size": ("vocab_size", 50265)}, harmless=("pad_token_id",),
    output="lm_head.decoder.weight", embedding="roberta.embeddings.word_embeddings.weight",
    biases=("lm_head.decoder.bias", "lm_head.bias"),
    reads=_read_roberta, writes=_write_roberta, misfits=_roberta_misfits,
    rules=(
        Rule("embeddings.word_embeddings", ("trunk.embedding",)),
        Rule("embeddings.token_type_embeddings", ("trunk.segments",)), EMBEDDING_NORM,
        Rule(POSITIONS, ("trunk.positions",), rows_in_front=ROBERTA_PAD + 1), *LAYERS,
    ),
    tops=BERT.tops | {
        "lm": (
            Rule("lm_head.bias", ("head.bias",)), Rule("lm_head.dense", ("transform.dense",)),
            Rule("lm_head.layer_norm", ("transform.norm",)),
            Rule("lm_head.decoder.weight", ("head.weight",)),
            Rule("lm_head.decoder.bias", ("head.bias",), only_with="head.weight"),
        ),
        "sequence": (Rule("classifier.dense", ("pooler",)), Rule("classifier.out_proj", ("head",))),
    },
)  # fmt: skip


def _read_modernbert_head(hf: Reader, ours: dict[str, Any]) -> dict[str, Any]:
    if ours["head"] in BARE:
        return {}
    bias = hf.take("classifier_bias", False)
    if bias != ours["ffn_bias"]:
        hf.refuse("classifier_bias", bias, "here the head's dense layer has a bias where mlp_bias says so")
    hf.expect("classifier_activation", "gelu", "gelu_python")
    if ours["head"] == "lm":
        return {"head_bias": hf.take("decoder_bias", True)}
    pooling = hf.take("classifier_pooling", "cls")
    if pooling not in POOLINGS.values():
        hf.refuse("classifier_pooling", pooling)
    return {"pooling": next(ours for ours, theirs in POOLINGS.items() if theirs == pooling)}


def _modernbert_misfits(config: ModelConfig) -> dict[str, Any]:
    misfits = {} if config.head in ("lm", *BARE) or config.head_bias else {"head_bias": True}
    right = config.head != "sequence" or config.pooling in POOLINGS
    return misfits if right else misfits | {"pooling": " or ".join(POOLINGS)}


def _read_modernbert(hf: Reader, ours: dict[str, Any]) -> dict[str, Any]:
    ours = ours | _read_modernbert_head(hf, ours)
    every = hf.take("global_attn_every_n_layers", 3)
    if every < 1:
        hf.refuse("global_attn_every_n_layers", every)
    otherwise = [SLIDING if layer % every else FULL for layer in range(ours["layers"])]
    has_windows, every = read_layers(hf, ours["layers"], otherwise)
    window, nested = hf.take("local_attention", 128), hf.inner("rope_parameters")
    hf.expect("rope_scaling", None)
    theta = hf.take("global_rope_theta", 160000.0)
    thetas = {FULL: theta, SLIDING: hf.take("local_rope_theta", 10000.0) or theta}  # null in transformers 4
    ropes = {kind: read_rope(nested.inner(kind), ours["max_positions"], thetas[kind]) for kind in thetas}
    nested.finish()
    if not has_windows or not every or ropes[FULL] == ropes[SLIDING]:
        ours |= ropes[SLIDING if has_windows and not every else FULL]
    else:
        if ropes[SLIDING]["rope_scaling"] != "none":
            hf.refuse("rope_parameters", nested.values, "only the layers that see all can have scaled positions")
        ours |= ropes[FULL] | {"local_rope_theta": ropes[SLIDING]["rope_theta"]}
    return ours | ({"sliding_window": window, "global_every": every} if has_windows else {})


def _write_modernbert(config: ModelConfig) -> dict[str, Any]:
    kinds, full = write_layers(config), write_rope(config)
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta} if config.local_rope_theta else full
    theirs = {
        "layer_types": kinds, "local_attention": config.sliding_window or 128,
        "rope_parameters": {FULL: dict(full), SLIDING: dict(local)},
        "global_rope_theta": full["rope_theta"], "local_rope_theta": local["rope_theta"],
    }  # fmt: skip
    if FULL in kinds:  # transformers 4 has no layer_types
        theirs["global_attn_every_n_layers"] = config.global_every or 1
    if config.head not in BARE:
        theirs |= {"classifier_bias": config.ffn_bias, "classifier_activation": "gelu"}
    if config.head == "lm":
        theirs["decoder_bias"] = config.head_bias
    if config.head == "sequence":
        theirs["classifier_pooling"] = POOLINGS[config.pooling]
    return theirs


MODERNBERT_TRANSFORM = (Rule("head.dense", ("transform.dense",)), Rule("head.norm", ("transform.norm",)))
# A task's head has the dense layer of the masked language model before it, and a bias.
MODERNBERT_TASK = {"head_transform": True, "head_bias": True}


MODERNBERT = Family(
    model_type="modernbert", name="ModernBert", lm="ForMaskedLM", prefix="model.",
    keys={
        "vocab_size": ("vocab_size", 50368), "layers": ("num_hidden_layers", 22), "width": ("hidden_size", 768),
        "heads": ("num_attention_heads", 12), "ffn_width": ("intermediate_size", 1152),
        "max_positions": ("max_position_embeddings", 8192), "norm_eps": ("norm_eps", 1e-5),
        "norm_bias": ("norm_bias", False), "activation": ("hidden_activation", "gelu"),
        "attention_bias": ("attention_bias", False), "ffn_bias": ("mlp_bias", False),
        "tied_embeddings": ("tie_word_embeddings", True), "dropout": ("mlp_dropout", 0.0),
        "init_std": ("initializer_range", 0.02),
    },
    always={"causal": False, "positions": "rope", "norm": "layernorm", "embedding_norm": True},
    with_head={"lm": {"head_transform": True}, "sequence": MODERNBERT_TASK | {"pooling": "mean"},
               "tokens": MODERNBERT_TASK, "span": MODERNBERT_TASK},
    activations=GATED, dropouts=("attention_dropout", "embedding_dropout"),
    harmless=("decoder_bias", "classifier_pooling", "classifier_bias", "classifier_activation",
              "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "reference_compile",
              "repad_logits_with_grad", "position_embedding_type", "layer_norm_eps"),
    output="decoder.weight", embedding="model.embeddings.tok_embeddings.weight",
    reads=_read_modernbert, writes=_write_modernbert, written=(*ROPE, *WINDOW, "head_bias", "pooling"),
    misfits=_modernbert_misfits,
    rules=(
        Rule("embeddings.tok_embeddings", ("trunk.embedding",)), Rule("embeddings.norm", ("trunk.embedding_norm",)),
        *block_rules("layers.{i}.", attn_norm="attention_norm", attn__Wqkv="attention.q attention.k attention.v",
                 attn__Wo="attention.out", mlp_norm="ffn_norm", mlp__Wi="ffn.gate ffn.up", mlp__Wo="ffn.down"),
        Rule("final_norm", ("trunk.norm",)),
    ),
    tops={"lm": (*MODERNBERT_TRANSFORM, Rule("decoder", ("head",)))}
    | dict.fromkeys(MATRIX_HEADS, (*MODERNBERT_TRANSFORM, Rule("classifier", ("head",)))),
)  # fmt: skip
