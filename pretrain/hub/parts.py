"""What the architectures of Hugging Face are described with: rules for names, and a strict reader of their settings.

A `Reader` goes through a config.json and remembers what it was asked for: what nobody asked for may change what the
model computes, and is refused.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from pretrain.config.schema import ModelConfig
from pretrain.model.transformer import ffn_width, has_window, head_width, kv_heads

# What a model has that does not say otherwise: the values of conf/model/_base.yaml.
NEUTRAL = {
    "kv_heads": 0, "head_width": 0, "ffn_width": 0, "causal": True,
    "rope_theta": 10000.0, "rope_scaling": "none", "rope_factor": 1.0, "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0, "rope_original_positions": 0, "sliding_window": 0, "global_every": 0,
    "local_rope_theta": 0.0, "norm_position": "pre", "norm_bias": True, "embedding_norm": False,
    "scaled_embeddings": False, "segments": 0, "qk_norm": False, "attention_bias": False, "ffn_bias": False,
    "tied_embeddings": True, "labels": 0, "pooling": "first", "head_transform": False, "head_bias": False,
    "logit_softcap": 0.0, "value_embeddings": 0, "lora_rank": 0, "lora_alpha": 16.0, "lora_on": "all",
    "dropout": 0.0, "attention": "sdpa", "init": "scaled", "init_std": 0.02,
}  # fmt: skip
TRAINING_ONLY = ("dropout", "attention", "init", "init_std")  # these change no output of a trained model
LABELLED = ("sequence", "tokens")  # heads with an output for each label
MATRIX_HEADS = (*LABELLED, "span")  # heads with a matrix of their own
BARE = ("pooled", "none", "embedding")  # heads of the class that has no matrix behind the trunk
ROPE = ("rope_theta", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor",
        "rope_original_positions")  # fmt: skip
WINDOW = ("sliding_window", "global_every", "local_rope_theta")

PLAIN = {
    "gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "relu2": "relu2", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}  # fmt: skip
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"}
BLOCK = "trunk.blocks.{i}."
FULL, SLIDING = "full_attention", "sliding_attention"

# Keys that say nothing about the function: metadata, training, generation, heads that are refused by their class.
HARMLESS = """
    model_type architectures _name_or_path name_or_path _commit_hash transformers_version transformers.js_config dtype
    torch_dtype use_cache output_attentions output_hidden_states return_dict use_return_dict output_scores
    return_dict_in_generate torchscript use_bfloat16 chunk_size_feed_forward pretraining_tp gradient_checkpointing
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled initializer_range
    initializer_cutoff_factor id2label label2id num_labels problem_type finetuning_task task_specific_params
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens is_llama_config unsloth_version
    unsloth_fixed _model_name_or_path classifier_dropout
""".split()
REMEDIES = {
    "quantization_config": "its weights are quantized: take it as model.dequantize() of transformers saves it",
    "auto_map": "it has code of its own",
    "is_decoder": "a causal BERT has no counterpart here",
    "add_cross_attention": "cross-attention has no counterpart here",
}


class Reader:
    """A config.json (or a dictionary in it, `path` before its keys) without the keys that are to be ignored."""

    def __init__(self, values: dict[str, Any], ignore: Collection[str] = (), path: str = ""):
        self.path, self.ignore = path, ignore
        self.values = {key: value for key, value in values.items() if path + key not in ignore}
        self.asked: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`, which must be of the kind of `default` (None: anything; a number may be missing)."""
        self.asked.add(key)
        value = self.values.get(key, default)
        if default is None or value is None and not isinstance(default, (bool, str)):
            return value
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"config.json: {self.path}{key}={value!r} must be a {type(default).__name__}")
        return float(value) if isinstance(default, float) else value

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse any value but these; the first is the default."""
        self.asked.add(key)
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            self.refuse(key, value)

    def inner(self, key: str) -> "Reader":
        """The dictionary under `key`, empty where there is none."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"config.json: {self.path}{key}={value!r} must be a dictionary")
        return Reader(value or {}, self.ignore, f"{self.path}{key}.")

    def refuse(self, key: str, value: Any, reason: str = "") -> None:
        name = self.path + key
        reason = reason or REMEDIES.get(key, "this program does not know it")
        raise ValueError(
            f"config.json: {name}={value!r} may change what the model computes: {reason}. If you know that it does not "
            f"matter, `tools/import_hf.py --ignore {name}` leaves it out"
        )

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuse what was not asked for and says something."""
        for key, value in self.values.items():
            if key not in self.asked and key not in harmless and value not in (None, False, 0, "", [], {}):
                self.refuse(key, value)


@dataclass(frozen=True)
class Rule:
    """One of their layers (weight and bias) or tensors, and ours: several of them stand in it one below the other."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # GPT-2 stores its matrices [inputs, outputs]
    rows_in_front: int = 0  # that nobody reads
    only_with: str = ""  # a parameter of ours without which it is not there


@dataclass(frozen=True)
class Family:
    """`keys`: our key -> theirs and its default. `always`: what these models are where they have no choice.
    `name`: what the names of its classes begin with; `lm`: the rest of the language model's; `also`: further classes
    that can be read. `rules` of the trunk, `tops` of what stands on it by our head.
    """

    model_type: str
    name: str
    lm: str
    prefix: str  # of the trunk's tensors where a head stands on it
    keys: dict[str, tuple[str, Any]]
    rules: tuple[Rule, ...]
    tops: dict[str, tuple[Rule, ...]]
    activations: dict[str, str]
    output: str  # the output matrix
    embedding: str
    also: dict[str, str] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    with_head: dict[str, dict[str, Any]] = field(default_factory=dict)  # what is so beside a head
    has_pooler: bool = False  # in the class that has no head
    span_prefix: str = ""  # the trunk's, where it is another one below a span head
    dropouts: tuple[str, ...] = ()  # rates besides the one in `keys`
    expects: tuple[tuple[Any, ...], ...] = ()  # (their key, the values that are ours; first the default)
    harmless: tuple[str, ...] = ()  # keys that the model does not read
    leftovers: tuple[tuple[str, str], ...] = ()  # (pattern of a tensor's name, why it can be left out)
    biases: tuple[str, str] | None = None  # two tensors for the bias of the output matrix: the one used untied, tied
    reads: Callable[[Reader, dict[str, Any]], dict[str, Any]] = lambda hf, ours: {}
    writes: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    written: tuple[str, ...] = ()  # our keys that `reads` and `writes` see to
    misfits: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}  # our key -> what it would have to be

    @property
    def heads(self) -> dict[str, str]:
        """Our heads -> the classes that are written for them."""
        classes = {"lm": self.lm, "sequence": "ForSequenceClassification", "tokens": "ForTokenClassification",
                   "span": "ForQuestionAnswering"}  # fmt: skip
        bare = dict.fromkeys(BARE if self.has_pooler else BARE[1:], "Model")
        return {head: self.name + rest for head, rest in (classes | bare).items()}

    def trunk_prefix(self, head: str) -> str:
        """Of the trunk's tensors in the class of a head."""
        return "" if head in BARE else self.span_prefix if head == "span" and self.span_prefix else self.prefix


def block_rules(theirs: str, **ours_by_theirs: str) -> tuple[Rule, ...]:
    """Rules of a block: their layer's name (a dot is two underscores) = ours, or several of ours."""
    return tuple(
        Rule(theirs + name.replace("__", "."), tuple(BLOCK + part for part in ours.split()))
        for name, ours in ours_by_theirs.items()
    )


def task_tops(sequence: str, tokens: str, span: str) -> dict[str, tuple[Rule, ...]]:
    """Rules of the heads that are one matrix, called so there."""
    return {head: (Rule(name, ("head",)),) for head, name in zip(MATRIX_HEADS, (sequence, tokens, span), strict=True)}


def settled(config: ModelConfig) -> ModelConfig:
    """The same function with nothing left to derive, and everything that has no effect at its neutral value."""
    still = ["lora_alpha", "lora_on"]
    if config.norm == "rmsnorm":
        still.append("norm_bias")
    if config.head != "lm":
        still += ["tied_embeddings", "logit_softcap"]
    if config.head in BARE:
        still += ["head_transform", "head_bias"]
    if config.head not in LABELLED:
        still.append("labels")
    if config.head not in ("sequence", "embedding"):
        still.append("pooling")
    windows = [has_window(config, layer) for layer in range(config.layers)]
    if not any(windows):
        still += WINDOW
    elif all(windows) and config.local_rope_theta:  # nobody uses the other theta
        still += ROPE
    if config.positions != "rope":
        still += [*ROPE, "local_rope_theta"]
    elif config.rope_scaling == "none":
        still += ROPE[2:]
        if config.local_rope_theta == config.rope_theta:
            still.append("local_rope_theta")
    elif config.rope_scaling in ("linear", "yarn"):
        still += ROPE[3:5] if config.rope_scaling == "yarn" else ROPE[3:]
    values = {"kv_heads": kv_heads(config), "head_width": head_width(config), "ffn_width": ffn_width(config)}
    values |= {"global_every": min(config.global_every, config.layers)} | {key: NEUTRAL[key] for key in still}
    if all(windows) and config.local_rope_theta and config.positions == "rope":
        values |= {"rope_theta": config.local_rope_theta, "local_rope_theta": 0.0}
    return replace(config, **values)


def read_rope(hf: Reader, max_positions: int, theta: float) -> dict[str, Any]:
    """Our rope keys of one dictionary of rope parameters; `theta` where it has none of its own."""
    kind = hf.take("rope_type", None) or hf.take("type", None) or "default"
    hf.asked.add("type")
    ours = {key: NEUTRAL[key] for key in ROPE} | {"rope_theta": hf.take("rope_theta", theta)}
    if not ours["rope_theta"]:
        raise ValueError(f"config.json: {hf.path}rope_theta={ours['rope_theta']}: give its number")
    hf.expect("partial_rotary_factor", 1.0, None)
    if kind not in ("default", "linear", "llama3", "yarn"):
        hf.refuse("rope_type", kind, "the kinds known here are default, linear, llama3 and yarn")
    if kind == "default":
        hf.finish()
        return ours
    original = max_positions if kind == "linear" else hf.take("original_max_position_embeddings", max_positions)
    factor = hf.take("factor", 0.0) or (max_positions / original if kind == "yarn" else None)
    if factor is None:
        raise ValueError(f"config.json: {hf.path}factor is missing")
    ours |= {"rope_scaling": kind, "rope_factor": factor}
    if kind != "linear":
        ours["rope_original_positions"] = original
    if kind == "llama3":
        ours["rope_low_freq_factor"] = hf.take("low_freq_factor", 1.0)
        ours["rope_high_freq_factor"] = hf.take("high_freq_factor", 4.0)
    if kind == "yarn":
        _only_plain_yarn(hf, factor)
    hf.finish()
    return ours


def _only_plain_yarn(hf: Reader, factor: float) -> None:
    hf.expect("beta_fast", 32, None)
    hf.expect("beta_slow", 1, None)
    hf.expect("mscale", None)
    hf.expect("mscale_all_dim", None)
    hf.expect("truncate", True, None)
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    given = hf.take("attention_factor", usual)
    if given is not None and not math.isclose(given, usual, rel_tol=1e-6):
        hf.refuse("attention_factor", given)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The dictionary of rope parameters that says the same."""
    kind = config.rope_scaling
    theirs: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind, "rope_theta": config.rope_theta}
    if kind != "none":
        theirs["factor"] = config.rope_factor
    if kind in ("llama3", "yarn"):
        theirs["original_max_position_embeddings"] = config.rope_original_positions
    if kind == "llama3":
        theirs["low_freq_factor"] = config.rope_low_freq_factor
        theirs["high_freq_factor"] = config.rope_high_freq_factor
    return theirs


def read_layers(hf: Reader, layers: int, otherwise: list[str], because: str = "") -> tuple[bool, int]:
    """Whether there are windows, and our `global_every`, of `layer_types`; `otherwise`, and `because` of this key."""
    kinds, key = hf.take("layer_types", None) or otherwise, "layer_types" if hf.values.get("layer_types") else because
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    every = 0 if not full else full[1] if len(full) > 1 else layers
    if len(full) == layers:
        return False, 0
    if kinds != [FULL if every and layer % every == 0 else SLIDING for layer in range(layers)]:
        hf.refuse(key, hf.values[key], "windows are on all layers here, or on all but 0, n, 2n, ...")
    return True, every


def write_layers(config: ModelConfig) -> list[str]:
    """The kind of attention of each layer."""
    return [SLIDING if has_window(config, layer) else FULL for layer in range(config.layers)]
