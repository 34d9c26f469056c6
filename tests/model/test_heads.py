"""Heads of tasks: what they compute, and their losses and gradients, equal to transformers' on padded batches."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

from pretrain.config import compose  # noqa: E402
from pretrain.config.checks import check_model  # noqa: E402
from pretrain.hub import families, sentences  # noqa: E402
from pretrain.model.heads import HEADS, build_model, parameter_shapes, pooled  # noqa: E402
from pretrain.model.losses import cross_entropy_rows, label_rows, multi_label_rows, span_rows  # noqa: E402
from tests.hub.test_families import IN_FP32, TUNED, batch, into_ours, scramble  # noqa: E402

FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama")
PAD = 1


def both(family, rest, **changed):
    """Their model with random weights, and ours with the same; both in fp64, without dropout."""
    name, settings = TUNED[family]
    cls = getattr(transformers, name + rest)
    theirs = scramble(cls(cls.config_class(**settings | {"attn_implementation": "eager"} | changed)))
    tied = set(theirs.all_tied_weights_keys)
    tensors = {key: value for key, value in theirs.state_dict().items() if key not in tied}
    return into_ours(theirs.config.to_dict() | {"architectures": [name + rest]}, tensors), theirs


def the_same(ours, theirs, losses, labels, made, precision=1e-10):
    """The mean loss, and the gradient of every parameter."""
    family = theirs.config.model_type
    precision = 1e-5 if family in IN_FP32 else precision
    mean = losses.sum() / (labels != -100).sum()
    assert float(mean.detach()) == pytest.approx(float(made.loss.detach()), rel=precision)
    mean.backward()
    made.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for tensor in families.hf_tensors(ours.trunk.config, family):
        if tensor.name not in expected:  # the second name of a bias
            continue
        found, right = tensor.to_hf(*(gradients[name] for name in tensor.ours)), expected[tensor.name]
        assert torch.allclose(found, right, rtol=0, atol=precision * float(right.abs().max()) + 1e-12), tensor.name
        compared += right.abs().max() > 0
    assert compared >= len(expected) - 2, "nearly every parameter has a gradient to compare"


def inputs_of(config):
    """Ours and theirs of one padded batch."""
    tokens, mask, segments = batch(config)
    kinds = {"token_type_ids": segments} if config.segments else {}
    ours = {"documents": mask - 1, **({"segments": segments} if config.segments else {})}
    return tokens, mask, ours, {"input_ids": tokens, "attention_mask": mask, **kinds}


@pytest.mark.parametrize("multi_label", [False, True], ids=["one label", "any labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_texts_are_learnt_as_transformers_does(family, multi_label):
    kind = {"problem_type": "multi_label_classification"} if multi_label else {}
    ours, theirs = both(family, "ForSequenceClassification", num_labels=5, pad_token_id=PAD, **kind)
    tokens, _, mine, yours = inputs_of(ours.trunk.config)
    labels = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0]]) if multi_label else torch.tensor([3, 1])
    logits = ours(tokens, **mine)
    made = theirs(**yours, labels=labels.double() if multi_label else labels)
    assert logits.shape == (2, 5) and torch.allclose(logits, made.logits, atol=1e-5)
    the_same(ours, theirs, (multi_label_rows if multi_label else label_rows)(logits, labels), labels, made)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_tokens_are_learnt_as_transformers_does(family):
    ours, theirs = both(family, "ForTokenClassification", num_labels=7)
    tokens, mask, mine, yours = inputs_of(ours.trunk.config)
    labels = torch.randint(0, 7, tokens.shape).masked_fill(mask == 0, -100)
    labels[0, 3:6] = -100  # parts of words
    logits = ours(tokens, **mine)
    made = theirs(**yours, labels=labels)
    the_same(ours, theirs, cross_entropy_rows(logits * 1, labels), labels, made)
    assert torch.allclose(logits[mask == 1], made.logits[mask == 1], atol=1e-4) and logits.shape == (2, 17, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_learnt_as_transformers_does(family):
    ours, theirs = both(family, "ForQuestionAnswering")
    tokens, mask, mine, yours = inputs_of(ours.trunk.config)
    labels = torch.tensor([[2, 5], [0, 14]])
    logits, made = ours(tokens, **mine), theirs(**yours)
    theirs_stacked = torch.stack((made.start_logits, made.end_logits), -1)
    assert torch.allclose(logits[mask == 1], theirs_stacked[mask == 1], rtol=0, atol=1e-4)
    losses = [  # one at a time: in a batch, padding takes part in their softmax
        theirs(**{name: values[row : row + 1, : mask[row].sum()] for name, values in yours.items()},
               start_positions=labels[row : row + 1, 0], end_positions=labels[row : row + 1, 1]).loss
        for row in (0, 1)
    ]  # fmt: skip
    made = SimpleNamespace(loss=sum(losses) / 2)
    logits = logits.masked_fill(mask[:, :, None] == 0, -1e300)
    the_same(ours, theirs, span_rows(logits, labels), labels, made)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_answer_is_learnt_and_its_prompt_is_not(family):
    ours, theirs = both(family, "LMHeadModel" if family == "gpt2" else "ForCausalLM")
    tokens, mask, mine, yours = inputs_of(ours.trunk.config)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, :6] = labels[1, :9] = -100
    shifted = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), 1)
    losses = cross_entropy_rows(ours(tokens, **mine), shifted)
    the_same(ours, theirs, losses, shifted, theirs(**yours, labels=labels), 1e-6)  # their loss is computed in fp32


def test_losses_pass_over_what_has_no_label_and_weigh_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([2, -100, 0])
    weights = torch.tensor([0.5, 1.0, 3.0, 1.0])
    plain = -logits.log_softmax(1)
    assert torch.allclose(label_rows(logits, labels), torch.stack((plain[0, 2], plain[1, 0] * 0, plain[2, 0])))
    assert torch.allclose(label_rows(logits, labels, weights)[[0, 2]], torch.stack((3 * plain[0, 2], plain[2, 0] / 2)))
    many = torch.tensor([[1, 0, -100, 1], [-100] * 4, [0, 0, 0, 0]])
    chances = logits.sigmoid()
    expected = -(chances[0, 0].log() + (1 - chances[0, 1]).log() + chances[0, 3].log())
    rows = multi_label_rows(logits, many)
    assert torch.allclose(rows, torch.stack((expected, expected * 0, -(1 - chances[2]).log().sum())))
    spans, answers = torch.randn(2, 6, 2).bfloat16(), torch.tensor([[1, 4], [-100, -100]])
    right = -(spans.float().log_softmax(1)[0, 1, 0] + spans.float().log_softmax(1)[0, 4, 1])
    found = span_rows(spans, answers)
    assert found.dtype == torch.float32 and torch.allclose(found, torch.stack((right, right * 0)))
    (label_rows(logits, torch.full((3,), -100)).sum() + multi_label_rows(logits, many[[1, 1, 1]]).sum()).backward()
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def tiny(head, *overrides, labels=0):
    changes = ["run.name=x", "model=llama_tiny", "model.vocab_size=97", "train.seq_len=32", *overrides]
    return replace(families.fitting_head(compose.compose("pretrain", changes).model, head, labels), dropout=0.0)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("causal", ["true", "false"])
def test_padding_changes_no_embedding_and_all_have_length_one(pooling, causal):
    config = replace(tiny("embedding", f"model.causal={causal}"), pooling=pooling)
    model = scramble(build_model(config))
    tokens = torch.randint(0, 97, (3, 12))
    lengths = torch.tensor([12, 5, 1])
    documents = -(torch.arange(12) >= lengths[:, None]).int()
    vectors = model(tokens, documents=documents)
    assert vectors.shape == (3, 64) and torch.allclose(vectors.norm(dim=1), torch.ones(3, dtype=torch.float64))
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        assert torch.allclose(vectors[row], alone[0], atol=1e-12)
    hidden = model.trunk(tokens, None, documents)
    by_hand = {"first": hidden[1, 0], "last": hidden[1, 4], "mean": hidden[1, :5].mean(0)}[pooling]
    assert torch.allclose(vectors[1], by_hand / by_hand.norm())
    assert model.bfloat16()(tokens).dtype == torch.float32


def test_a_row_of_nothing_but_padding_is_no_nan():
    hidden, documents = torch.randn(2, 4, 3), torch.tensor([[0, 0, -1, -1], [-1] * 4])
    for pooling in ("first", "last", "mean"):
        assert pooled(hidden, documents, pooling).isfinite().all()


def test_poolings_of_sentence_transformers_are_known_or_left_alone():
    config = replace(tiny("embedding"), pooling="mean")
    files = sentences.sentence_files(config, 64)
    modules, settings = files["modules.json"], files["1_Pooling/config.json"]
    assert settings["word_embedding_dimension"] == 64
    for pooling in ("first", "last", "mean"):
        written = sentences.sentence_files(replace(config, pooling=pooling), 64)
        assert sentences.pooling_of(written["modules.json"], written["1_Pooling/config.json"]) == pooling
    assert sentences.pooling_of(modules, {"embedding_dimension": 64, "pooling_mode": "lasttoken"}) == "last"
    assert sentences.pooling_of(modules, {"pooling_mode": "max"}) is None
    assert sentences.pooling_of(modules, settings | {"pooling_mode_cls_token": True}) is None, "two side by side"
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    assert sentences.pooling_of([*modules[:2], dense, modules[2]], settings) is None


@pytest.mark.parametrize("preset, kinds", [
    ("bert_base", ("pooler", True, False)), ("roberta_base", ("pooler", True, False)),
    ("modernbert_base", ("mean", True, True)), ("gpt2_124m", ("last", False, False)),
    ("llama_135m", ("last", False, False)), ("sinusoidal_base", ("last", False, False)),
])  # fmt: skip
def test_a_pretrained_model_gets_the_head_of_its_architecture(preset, kinds):
    """Also one that no architecture has; and what the pretrained head shares with the new one keeps its name."""
    base = replace(compose.compose("pretrain", ["run.name=x", f"model={preset}", "train.seq_len=8"]).model, layers=1)
    config = families.fitting_head(base, "sequence", 3)
    assert (config.pooling, config.head_bias, config.head_transform) == kinds and config.labels == 3
    before, after = parameter_shapes(base), parameter_shapes(config)
    new = {name for name in after if before.get(name) != after[name]}
    expected = {"head.weight", *(["head.bias"] if kinds[1] else [])}
    assert new == expected | ({"pooler.weight", "pooler.bias"} if kinds[0] == "pooler" else set())
    for head, labels in (("tokens", 4), ("span", 0), ("embedding", 0)):
        other = families.fitting_head(config, head, labels)
        check_model(other)
        pooling = "first" if head != "embedding" else "last" if base.causal else "mean"
        assert (other.head_bias, other.pooling) == (head != "embedding", pooling)
        if preset != "sinusoidal_base":
            assert families.to_hf_config(other)["model_type"] == families.to_hf_config(base)["model_type"]
    assert families.fitting_head(config, "sequence", 9) == replace(config, labels=9)


def test_an_exotic_model_has_a_head_and_is_no_architecture_of_theirs():
    base = tiny("lm", "model.positions=none", "model.activation=relu2", "model.causal=false", "model.logit_softcap=9")
    for head, labels in (("sequence", 2), ("tokens", 3), ("span", 0), ("embedding", 0)):
        config = families.fitting_head(base, head, labels)
        check_model(config)
        made = scramble(build_model(config))(torch.randint(0, 97, (2, 6)))
        assert made.shape == {"sequence": (2, 2), "tokens": (2, 6, 3), "span": (2, 6, 2), "embedding": (2, 64)}[head]
        with pytest.raises(ValueError, match="no architecture of Hugging Face"):
            families.to_hf_config(config)


@pytest.mark.parametrize("changes, message", [
    ({"head": "sequence"}, "model.labels=0: model.head=sequence has one or more"),
    ({"labels": 2}, "model.labels=2: model.head=lm has 0"),
    ({"head": "span", "labels": 2}, "model.labels=2: model.head=span has 0"),
    ({"pooling": "mean"}, "model.pooling=mean is for model.head=sequence or embedding, not lm"),
    ({"head": "embedding", "pooling": "pooler"}, "model.pooling=pooler is for model.head=sequence"),
    ({"head": "embedding", "head_bias": True}, "model.head=embedding has no output matrix"),
    ({"head": "tokens", "labels": 2, "logit_softcap": 3.0}, "model.logit_softcap is for model.head=lm, not tokens"),
    ({"head": "words"}, "model.head=words: choose one of"),
])  # fmt: skip
def test_heads_that_make_no_sense_are_named(changes, message):
    base = compose.compose("pretrain", ["run.name=x", "model=llama_tiny", "model.vocab_size=97", "train.seq_len=8"])
    with pytest.raises(ValueError, match=message):
        check_model(replace(base.model, **changes))


@pytest.mark.parametrize("head", HEADS)
def test_torch_draws_nothing_while_a_model_is_made(head):
    before = torch.get_rng_state()
    build_model(tiny(head, labels=3))
    assert torch.equal(before, torch.get_rng_state())
