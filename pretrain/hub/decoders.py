"""Causal models of Hugging Face that are this project's with other names: GPT-2, LLaMA, Mistral, Qwen3."""

from dataclasses import replace
from typing import Any

from pretrain.config.schema import ModelConfig
from pretrain.hub.parts import (
    BLOCK,
    FULL,
    GATED,
    PLAIN,
    ROPE,
    SLIDING,
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

# A text's labels are told from its last token, by a matrix without a bias.
HEADS = {"sequence": {"pooling": "last"}, "tokens": {"head_bias": True}, "span": {"head_bias": True}}

GPT2 = Family(
    model_type="gpt2", name="GPT2", lm="LMHeadModel", prefix="transformer.",
    keys={
        "vocab_size": ("vocab_size", 50257), "layers": ("n_layer", 12), "width": ("n_embd", 768),
        "heads": ("n_head", 12), "ffn_width": ("n_inner", None), "max_positions": ("n_positions", 1024),
        "norm_eps": ("layer_norm_epsilon", 1e-5), "activation": ("activation_function", "gelu_new"),
        "tied_embeddings": ("tie_word_embeddings", True), "dropout": ("resid_pdrop", 0.1),
        "init_std": ("initializer_range", 0.02),
    },
    always={"positions": "learned", "norm": "layernorm", "attention_bias": True, "ffn_bias": True},
    with_head=HEADS, activations=PLAIN, dropouts=("embd_pdrop", "attn_pdrop"),
    expects=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)),
    harmless=("n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
              "summary_proj_to_labels", "summary_first_dropout"),
    output="lm_head.weight", embedding="transformer.wte.weight",
    leftovers=((r"h\.\d+\.attn\.(masked_)?bias", "the causal mask, which is computed"),),
    rules=(
        Rule("wte", ("trunk.embedding",)), Rule("wpe", ("trunk.positions",)),
        *block_rules("h.{i}.", ln_1="attention_norm"),
        Rule("h.{i}.attn.c_attn", (BLOCK + "attention.q", BLOCK + "attention.k", BLOCK + "attention.v"), True),
        Rule("h.{i}.attn.c_proj", (BLOCK + "attention.out",), True),
        *block_rules("h.{i}.", ln_2="ffn_norm"),
        Rule("h.{i}.mlp.c_fc", (BLOCK + "ffn.up",), True), Rule("h.{i}.mlp.c_proj", (BLOCK + "ffn.down",), True),
        Rule("ln_f", ("trunk.norm",)),
    ),
    tops={"lm": (Rule("lm_head", ("head",)),)} | task_tops("score", "classifier", "qa_outputs"),
)  # fmt: skip


def _read_rope(hf: Reader, ours: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (since transformers 5), or `rope_theta` and `rope_scaling` beside it."""
    hf.expect("partial_rotary_factor", 1.0, None)
    theta, old, new = hf.take("rope_theta", 10000.0), hf.inner("rope_scaling"), hf.inner("rope_parameters")
    return read_rope(old if old.values else new, ours["max_positions"], theta)


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    theirs = {"rope_parameters": write_rope(config), "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        theirs["rope_scaling"] = write_rope(config)
    return theirs


def _llama_misfits(config: ModelConfig) -> dict[str, Any]:
    return {"width": f"a multiple of model.heads={config.heads}"} if config.width % config.heads else {}


LLAMA = Family(
    model_type="llama", name="Llama", lm="ForCausalLM", prefix="model.", span_prefix="transformer.",
    keys={
        "vocab_size": ("vocab_size", 32000), "layers": ("num_hidden_layers", 32), "width": ("hidden_size", 4096),
        "heads": ("num_attention_heads", 32), "kv_heads": ("num_key_value_heads", None),
        "head_width": ("head_dim", None), "ffn_width": ("intermediate_size", 11008),
        "max_positions": ("max_position_embeddings", 2048), "norm_eps": ("rms_norm_eps", 1e-6),
        "activation": ("hidden_act", "silu"), "attention_bias": ("attention_bias", False),
        "ffn_bias": ("mlp_bias", False), "tied_embeddings": ("tie_word_embeddings", False),
        "dropout": ("attention_dropout", 0.0), "init_std": ("initializer_range", 0.02),
    },
    always={"positions": "rope", "norm": "rmsnorm"}, with_head=HEADS, activations=GATED,
    output="lm_head.weight", embedding="model.embed_tokens.weight",
    leftovers=((r".*rotary_emb\.inv_freq", "rotary frequencies, which are computed"),),
    reads=_read_rope, writes=_write_rope, written=ROPE, misfits=_llama_misfits,
    rules=(
        Rule("embed_tokens", ("trunk.embedding",)),
        *block_rules("layers.{i}.self_attn.", q_proj="attention.q", k_proj="attention.k", v_proj="attention.v",
                 o_proj="attention.out", q_norm="attention.q_norm", k_norm="attention.k_norm"),
        *block_rules("layers.{i}.", mlp__gate_proj="ffn.gate", mlp__up_proj="ffn.up", mlp__down_proj="ffn.down",
                 input_layernorm="attention_norm", post_attention_layernorm="ffn_norm"),
        Rule("norm", ("trunk.norm",)),
    ),
    tops={"lm": (Rule("lm_head", ("head",)),)} | task_tops("score", "score", "qa_outputs"),
)  # fmt: skip


def _without(keys: dict[str, tuple[str, Any]], *names: str, **changed: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    return {key: value for key, value in keys.items() if key not in names} | changed


MISTRAL = replace(
    LLAMA, model_type="mistral", name="Mistral", span_prefix="",
    keys=_without(
        LLAMA.keys, "attention_bias", "ffn_bias", kv_heads=("num_key_value_heads", 8),
        ffn_width=("intermediate_size", 14336), max_positions=("max_position_embeddings", 131072),
        sliding_window=("sliding_window", 4096),
    ),
    misfits=lambda config: {},
)  # fmt: skip


def _read_qwen3(hf: Reader, ours: dict[str, Any]) -> dict[str, Any]:
    used, window = hf.take("use_sliding_window", False), hf.take("sliding_window", 4096)
    first, window = hf.take("max_window_layers", 28), window if used else None
    otherwise = [SLIDING if window and layer >= first else FULL for layer in range(ours["layers"])]
    has_windows, every = read_layers(hf, ours["layers"], otherwise, "use_sliding_window")
    if has_windows and not window:
        hf.refuse("layer_types", hf.values["layer_types"], "it calls for a window, and sliding_window is not in use")
    windows = {"sliding_window": window, "global_every": every} if has_windows else {}
    return _read_rope(hf, ours) | windows


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    kinds, window = write_layers(config), config.sliding_window
    windows = {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": kinds}
    return _write_rope(config) | windows | {"max_window_layers": kinds.count(FULL)}


QWEN3 = replace(
    LLAMA, model_type="qwen3", name="Qwen3",
    keys=_without(
        LLAMA.keys, "ffn_bias", vocab_size=("vocab_size", 151936), kv_heads=("num_key_value_heads", 32),
        head_width=("head_dim", 128), ffn_width=("intermediate_size", 22016),
        max_positions=("max_position_embeddings", 32768),
    ),
    always=LLAMA.always | {"qk_norm": True}, reads=_read_qwen3, writes=_write_qwen3,
    written=(*ROPE, "sliding_window", "global_every"), misfits=lambda config: {},
)  # fmt: skip
