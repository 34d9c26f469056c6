"""A model's losses: against torch's in fp64, the z-loss, and logits of the labelled positions only."""

import pytest
import torch

from pretrain.config import compose
from pretrain.model.heads import LanguageModel
from pretrain.model.losses import cross_entropy_rows, loss_rows, score_rows
from tests.models import filled_model


def reference_rows(logits, labels, z_loss=0.0):
    """The same in plain torch and fp64."""
    flat = logits.double().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(flat, labels.flatten(), reduction="none")
    losses = losses + z_loss * torch.where(labels.flatten() == -100, 0.0, flat.logsumexp(1).square())
    return losses.view(labels.shape).sum(1)


def test_loss_sums_rows_and_leaves_ignored_labels_out():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [-100, -100, -100]])
    rows = cross_entropy_rows(logits, labels)
    expected = -(logits[0, 0].log_softmax(0)[1] + logits[0, 1].log_softmax(0)[2])
    assert rows[0] == pytest.approx(float(expected)) and rows[1] == 0


@pytest.fixture(scope="module")
def model():
    """A small masked model in fp64, its weights large enough that mistakes show."""
    changes = ["model.vocab_size=97", "model.causal=false", "model.head_transform=true", "model.head_bias=true"]
    cfg = compose.compose("pretrain", ["run.name=x", "model=llama_tiny", "objective=masked_lm", *changes]).model
    return filled_model(cfg, 5).double().eval()


def some_batch(share, rows=4, length=40):
    torch.manual_seed(1)
    tokens = torch.randint(0, 97, (rows, length))
    labels = torch.where(torch.rand(rows, length) < share, torch.randint(0, 97, (rows, length)), -100)
    labels[1] = -100  # a row with no target at all
    return tokens, labels


def gradients(model, rows, weights):
    model.zero_grad()
    (rows * weights).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("share", [0.15, 0.7])
def test_logits_of_the_targets_alone_give_the_same_loss_and_gradient(model, share, with_documents, z_loss):
    tokens, labels = some_batch(share)
    documents = (torch.arange(40) // 13).expand(4, 40) if with_documents else None
    weights = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
    found, expected = [], []
    for kept, rows in (
        (found, loss_rows(model, tokens, labels, documents, z_loss, sparse=True)),
        (expected, loss_rows(model, tokens, labels, documents, z_loss)),
        (expected, reference_rows(model(tokens, documents=documents), labels, z_loss)),
    ):
        kept.append((rows.detach(), gradients(model, rows, weights)))
    for rows, grads in expected:
        assert torch.allclose(found[0][0], rows, rtol=1e-12, atol=1e-12) and rows[1] == 0 != rows[0]
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found[0][1], grads, strict=True))
    assert expected[0][1][0].abs().max() > 0.1


def test_the_head_is_only_asked_about_the_targets(model):
    tokens, labels = some_batch(0.15)
    seen = []
    handle = model.head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[:-1])))
    loss_rows(model, tokens, labels, sparse=True)
    loss_rows(model, tokens, labels)
    score_rows(model, tokens, labels)
    handle.remove()
    targets = int((labels != -100).sum())
    assert seen == [(targets,), (4, 40), (targets,)] and 10 < targets < 40


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_target_at_all_is_a_loss_and_a_gradient_of_zero(model, sparse, dtype):
    tokens, labels = some_batch(0.0)
    copy = LanguageModel(model.trunk.config).to(dtype)
    rows = loss_rows(copy, tokens, labels, z_loss=0.1, sparse=sparse)
    assert rows.tolist() == [0.0] * 4
    rows.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in copy.parameters())
    assert score_rows(copy, tokens, labels).tolist() == [[0.0, 0.0]] * 4


def test_scores_are_the_loss_and_the_hits_of_each_row(model):
    tokens, labels = some_batch(0.15)
    logits = model(tokens).detach()
    labels[0] = torch.where(labels[0] == -100, -100, logits[0].argmax(1))  # all right here
    labels[2] = torch.where(labels[2] == -100, -100, logits[2].argmin(1))  # all wrong
    with torch.no_grad():
        scores = score_rows(model, tokens, labels)
    assert torch.allclose(scores[:, 0], reference_rows(logits, labels), rtol=1e-12)
    hits = (logits.argmax(2) == labels).sum(1)
    assert scores[:, 1].tolist() == hits.tolist() and hits[2] == 0 < hits[0] == (labels[0] != -100).sum()
