"""Our models <-> Hugging Face's: settings to settings and names to names, without files and without `transformers`.

What a config.json says that is not known here is refused, and so is a model of ours that no architecture of theirs has:
a conversion either computes the same function or does not happen.
"""

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pretrain.config.schema import ModelConfig
from pretrain.hub.decoders import GPT2, LLAMA, MISTRAL, QWEN3
from pretrain.hub.encoders import BERT, MODERNBERT, ROBERTA, ROBERTA_PAD
from pretrain.hub.parts import HARMLESS, LABELLED, MATRIX_HEADS, NEUTRAL, TRAINING_ONLY, Family, Reader, Rule, settled
from pretrain.model.heads import parameter_shapes

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN3, ROBERTA, BERT, MODERNBERT)}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
SIZES = ("vocab_size", "layers", "width", "heads")
MAY_BE_NULL = ("kv_heads", "head_width", "sliding_window", "dropout")
AUTO_CLASSES = {"sequence": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification",
                "span": "AutoModelForQuestionAnswering"}  # fmt: skip
OLD_ENDS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True)
class HFTensor:
    """A tensor of theirs and the parameters of ours that stand in it, one below the other, `rows` of each."""

    name: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool
    rows_in_front: int

    def to_hf(self, *ours: torch.Tensor) -> torch.Tensor:
        whole = torch.cat(ours) if len(ours) > 1 else ours[0]
        if self.rows_in_front:
            whole = torch.cat((whole.new_zeros(self.rows_in_front, *whole.shape[1:]), whole))
        return whole.t().contiguous() if self.transposed else whole

    def from_hf(self, theirs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if tuple(theirs.shape) != self.shape:
            raise ValueError(
                f"{self.name} has the shape {list(theirs.shape)}, and config.json calls for {list(self.shape)}: "
                "the two do not belong together"
            )
        whole = theirs.t() if self.transposed else theirs
        return whole[self.rows_in_front :].split(self.rows)


@dataclass(frozen=True)
class Leftover:
    """A tensor in a file that is not needed, and why. If it is a `copy_of` another, the two must be equal."""

    name: str
    reason: str
    copy_of: str = ""


def from_hf_config(hf: dict[str, Any], ignore: Collection[str] = (), names: Collection[str] = ()) -> ModelConfig:
    """The model that a config.json describes, with transformers' defaults for what it does not say.

    `ignore`: keys to be left out. `names`: the tensors of the model's files, where they are known: BertModel has a
    pooler or not, and the file shows which. `ValueError` names what is not supported.
    """
    family = _family_of(hf)
    hf_keys = Reader(hf, ignore)
    head = _head(family, hf)
    ours = NEUTRAL | family.always | {"head": head} | family.with_head.get(head, {})
    if head in LABELLED:
        ours["labels"] = len(label_names(hf))
    for key, (theirs, default) in family.keys.items():
        zero = 0 if default is None else type(default)()
        value = hf_keys.take(theirs, zero if default is None else default)
        if value is None and default is not None and key not in MAY_BE_NULL or key in SIZES and value < 1:
            raise ValueError(f"config.json: {theirs}={value} is no {family.model_type}: give its number")
        ours[key] = zero if value is None else value
    if ours["activation"] not in family.activations:
        known = ", ".join(family.activations)
        hf_keys.refuse(family.keys["activation"][0], ours["activation"], f"the activations known here are {known}")
    ours["activation"] = family.activations[ours["activation"]]
    for key, *allowed in family.expects:
        hf_keys.expect(key, *allowed)
    ours |= family.reads(hf_keys, ours)
    hf_keys.finish({*HARMLESS, *family.harmless, *family.dropouts})
    if ours["head"] == "pooled" and names and not any("pooler.dense" in name for name in names):
        ours["head"] = "none"
    return settled(ModelConfig(**ours))


def _family_of(hf: dict[str, Any]) -> Family:
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported; these are: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _head(family: Family, hf: dict[str, Any]) -> str:
    """Our head for the class that was saved; the language model where no class is named."""
    known = {name: head for head, name in reversed(family.heads.items())} | family.also
    name = (hf.get("architectures") or [family.heads["lm"]])[0]
    if name not in known:
        raise ValueError(
            f"config.json: architectures={name} is not supported (its head has no counterpart here); of "
            f"{family.model_type} these are: {', '.join(dict.fromkeys([*family.heads.values(), *family.also]))}"
        )
    return known[name]


def label_names(hf: dict[str, Any]) -> list[str]:
    """The names of a classifier's outputs in a config.json; two where it says nothing, as transformers has it."""
    names = {str(number): name for number, name in (hf.get("id2label") or {}).items()}
    count = hf.get("num_labels") or len(names) or 2
    if len(names) != count:
        return [f"LABEL_{number}" for number in range(count)]
    if names.keys() != set(map(str, range(count))):
        raise ValueError(f"config.json: id2label={names!r} must name the labels 0 to {count - 1}")
    found = [str(names[str(number)]) for number in range(count)]
    if twice := [name for name in found if found.count(name) > 1]:
        raise ValueError(f"config.json: id2label has the name {twice[0]!r} for several labels: give each its own")
    return found


def label_settings(names: Collection[str], multi_label: bool = False) -> dict[str, Any]:
    """The keys of a config.json that say so."""
    theirs: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return theirs | ({"problem_type": "multi_label_classification"} if multi_label else {})


def fitting_head(config: ModelConfig, head: str, labels: int = 0) -> ModelConfig:
    """`config` with another head, as the class of Hugging Face has it that the result exports to; one that has this
    head already keeps its kind. A trunk that no architecture has gets LLaMA's heads, or BERT's if it looks ahead.

    `labels`: outputs of a `sequence` or `tokens` head. An embedding is the mean of all tokens, or the last one's in a
    causal model, which alone has seen the whole text.
    """
    if head == config.head:
        return replace(config, labels=labels)
    without = {key: NEUTRAL[key] for key in ("pooling", "head_transform", "head_bias", "logit_softcap")}
    trunk = settled(replace(config, head="none", lora_rank=0, **without))
    fits = [family for family in FAMILIES.values() if not _misfits(family, trunk)]
    family = fits[0] if fits else LLAMA if config.causal else BERT
    kind = {"pooling": "last" if config.causal else "mean"} if head == "embedding" else family.with_head.get(head, {})
    return replace(config, head=head, labels=labels, **without | kind)


def to_hf_config(config: ModelConfig, pad_token_id: int | None = ROBERTA_PAD) -> dict[str, Any]:
    """The config.json of the architecture that computes the same as `config`; the ids of special tokens are left open.

    `pad_token_id`: the tokenizer's padding. RoBERTa counts its positions by it: with any other than 1 a model of its
    kind is written as a BERT with one kind of segment, which is the same function. `ValueError` names our keys that no
    architecture has.
    """
    config = settled(config)
    family = _fitting(config, pad_token_id)
    theirs: dict[str, Any] = {"architectures": [family.heads[config.head]], "model_type": family.model_type}
    theirs |= {"dtype": "float32"} | dict.fromkeys(SPECIAL_IDS)  # their defaults may lie outside of the vocabulary
    for key, (name, _) in family.keys.items():
        theirs[name] = getattr(config, key)
    name = family.keys["activation"][0]
    theirs[name] = next(theirs_ for theirs_, ours in family.activations.items() if ours == config.activation)
    if "sliding_window" in family.keys and not config.sliding_window:
        theirs["sliding_window"] = None
    if config.head in MATRIX_HEADS:
        theirs["classifier_dropout"] = config.dropout
    if config.head in LABELLED:
        theirs |= label_settings([f"LABEL_{number}" for number in range(config.labels)])
    return theirs | dict.fromkeys(family.dropouts, config.dropout) | family.writes(config)


def _fitting(config: ModelConfig, pad_token_id: int | None = ROBERTA_PAD) -> Family:
    """The architecture that has all the parts of a (settled) config."""
    misfits = {family.model_type: _misfits(family, config) for family in FAMILIES.values()}
    if pad_token_id != ROBERTA_PAD:
        del misfits["roberta"]
    fits = [name for name, keys in misfits.items() if not keys]
    if fits:
        return FAMILIES[fits[0]]
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    wrong = ", ".join(f"model.{key}={getattr(config, key)}" for key in misfits[nearest])
    needed = ", ".join(f"model.{key}={value}" for key, value in misfits[nearest].items())
    raise ValueError(
        f"no architecture of Hugging Face that this program knows has {wrong} with the rest of this model; the nearest "
        f"is {nearest}, with {needed}"
    )


def _misfits(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Our keys in which a config differs from all models of a family -> what they have there."""
    free = {*family.keys, *family.written, *TRAINING_ONLY, "head", "activation", "labels"}
    if config.head == "embedding":
        free.add("pooling")
    whole = config.width // config.heads
    needed = NEUTRAL | {"kv_heads": config.heads, "head_width": whole} | family.always
    needed |= family.with_head.get(config.head, {})
    names = [field.name for field in fields(config) if field.name not in free]
    misfits = {name: needed[name] for name in names if getattr(config, name) != needed[name]}
    if config.head not in family.heads:
        misfits["head"] = " or ".join(family.heads)
    if config.activation not in family.activations.values():
        misfits["activation"] = " or ".join(dict.fromkeys(family.activations.values()))
    if "head_width" not in family.keys and whole * config.heads != config.width:
        misfits["head_width"] = "model.width / model.heads, a whole number"
    return misfits | family.misfits(config)


def auto_class(config: ModelConfig) -> str:
    """transformers' Auto class that loads the exported model."""
    if config.head == "lm":
        return "AutoModelForCausalLM" if config.causal else "AutoModelForMaskedLM"
    return AUTO_CLASSES.get(config.head, "AutoModel")


def hf_tensors(config: ModelConfig, model_type: str | None = None) -> list[HFTensor]:
    """The tensors of their model, in its order; what is tied is not there twice.

    `model_type`: of the model that is read. Two of theirs can be one of ours (a RoBERTa with two kinds of segment is a
    BERT): without it, the architecture that `to_hf_config` writes.
    """
    family = FAMILIES[model_type] if model_type else _fitting(settled(config))
    shapes = parameter_shapes(config)
    prefix, rules = family.trunk_prefix(config.head), (*family.rules, *family.tops.get(config.head, ()))
    tensors = [tensor for rule in _expanded(rules, config.layers) for tensor in _apply(rule, prefix, shapes)]
    left = shapes.keys() - {name for tensor in tensors for name in tensor.ours}
    assert not left, f"{family.model_type} has no place for {sorted(left)}"
    return tensors


def head_tensors(config: ModelConfig, model_type: str, head: str, names: Collection[str]) -> dict[str, HFTensor]:
    """Of a file of the class with another `head`: its tensors that the class of `config` has for its own head, by the
    same names, as transformers loads them.
    """
    family, shapes = FAMILIES[model_type], parameter_shapes(config)
    there = {_bare(name, family.trunk_prefix(head) or family.prefix): name for name in names}
    wanted = (tensor for rule in family.tops.get(config.head, ()) for tensor in _apply(rule, "", shapes))
    bare = ((_bare(tensor.name, family.prefix), tensor) for tensor in wanted)
    return {there[name]: tensor for name, tensor in bare if name in there}


def _expanded(rules: Collection[Rule], layers: int) -> Iterator[Rule]:
    """The rules with the number of each layer filled in, layer by layer."""
    for each_layer, group in itertools.groupby(rules, lambda rule: "{i}" in rule.theirs):
        listed = list(group)
        for i in range(layers if each_layer else 1):
            for rule in listed:
                ours = tuple(name.replace("{i}", str(i)) for name in rule.ours)
                theirs = rule.theirs.replace("{i}", str(i))
                yield Rule(theirs, ours, rule.transposed, rule.rows_in_front, rule.only_with)


def _apply(rule: Rule, prefix: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[HFTensor]:
    """The tensors of one rule: of a layer its weight and its bias, as far as our model has them."""
    if rule.only_with and rule.only_with not in shapes:
        return
    is_tensor = rule.ours[0].endswith((".weight", ".bias"))
    for kind in [""] if is_tensor else [".weight", ".bias"]:
        ours = tuple(name + kind for name in rule.ours)
        if ours[0] not in shapes:
            continue
        rows = tuple(shapes[name][0] for name in ours)
        shape = (rule.rows_in_front + sum(rows), *shapes[ours[0]][1:])
        transposed = rule.transposed and len(shape) == 2
        name = (prefix if ours[0].startswith("trunk.") else "") + rule.theirs + kind
        yield HFTensor(name, shape[::-1] if transposed else shape, ours, rows, transposed, rule.rows_in_front)


def match_names(
    config: ModelConfig, names: Collection[str], model_type: str | None = None
) -> tuple[dict[str, str], list[Leftover]]:
    """Where each tensor of `hf_tensors` is found in a file: its name there; and what of the file is not needed.

    Files of other times and classes lack the trunk's prefix, or have one too many, or old names of norms. `ValueError`
    for what is missing, and for what is there and means something.
    """
    family = FAMILIES[model_type] if model_type else _fitting(settled(config))
    prefix = family.trunk_prefix(config.head) or family.prefix
    needed = {tensor.name: _bare(tensor.name, prefix) for tensor in hf_tensors(config, family.model_type)}
    there = {_bare(name, prefix): name for name in names}
    if len(there) < len(names):
        raise ValueError(f"tensors are there under two names: {_listed(set(names) - set(there.values()))}")
    leftovers = []
    for copy, original, is_equal in _copies(family, config):
        if copy in there and original in there:
            reason = f"a copy of {there[original]}" if is_equal else f"{there[original]} is used in its place"
            leftovers.append(Leftover(there.pop(copy), reason, there[original] if is_equal else ""))
        elif copy in there:
            there[original] = there.pop(copy)
        if copy in needed.values() and original in there:
            there[copy] = there[original]
    for bare in there.keys() - needed.values():
        reasons = [reason for pattern, reason in family.leftovers if re.fullmatch(pattern, bare)]
        if reasons:
            leftovers.append(Leftover(there.pop(bare), reasons[0]))
    missing = [name for name, bare in needed.items() if bare not in there]
    _refuse_differences(family, config, missing, [there[bare] for bare in there.keys() - needed.values()])
    return {name: there[bare] for name, bare in needed.items()}, sorted(leftovers, key=lambda left: left.name)


def _bare(name: str, prefix: str) -> str:
    """A tensor's name without the trunk's prefix, which some files lack, and with today's names of norms."""
    name = name.removeprefix(prefix)
    for old, new in OLD_ENDS:
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _copies(family: Family, config: ModelConfig) -> list[tuple[str, str, bool]]:
    """(a tensor that repeats another or is not used, the other one, whether they must be equal)."""
    if config.head != "lm":
        return []
    if not config.tied_embeddings:
        return [(family.biases[1], family.biases[0], False)] if family.biases else []
    copies = [(family.output, _bare(family.embedding, family.prefix), True)]
    return copies + ([(*family.biases, True)] if family.biases else [])


def _refuse_differences(family: Family, config: ModelConfig, missing: list[str], unknown: list[str]) -> None:
    if missing:
        hint = ""
        if missing == [family.output]:
            hint = ": if the output matrix is the embedding, say tie_word_embeddings=true in config.json"
        if all("pooler" in name for name in missing):
            hint = ": it is a model without a pooler, of model.head=none"
        raise ValueError(f"the file lacks tensors that config.json calls for: {_listed(missing)}{hint}")
    if unknown:
        raise ValueError(
            f"the file has tensors that have no place in {family.heads[config.head]} as config.json describes it: "
            f"{_listed(unknown)}"
        )


def _listed(names: Collection[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more
