"""The loss in pieces: beside whole logits in fp64, in every precision; what lives meanwhile; what is computed twice."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.engine.memory import Live
from pretrain.model import output
from pretrain.model.losses import IGNORED
from pretrain.model.output import Output, Sizes

ROWS, LENGTH, WIDTH, VOCAB = 3, 101, 16, 97
PIECES = Sizes(37 * VOCAB, 5 * VOCAB)  # several of each, the last ones shorter
WEIGHTS = torch.tensor([1.0, 2.0, -0.5])


def made(dtype, bias=False, softcap=0.0, sizes=PIECES):
    """An output matrix, hidden states, and labels of which a fifth, and a whole row, are ignored."""
    torch.manual_seed(0)
    head = Output(WIDTH, VOCAB, bias, softcap)
    torch.nn.init.normal_(head.weight)
    head.sizes = sizes
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH))
    labels[torch.rand(ROWS, LENGTH) < 0.2] = IGNORED
    return head.to(dtype), torch.randn(ROWS, LENGTH, WIDTH).to(dtype).requires_grad_(), labels


def plain_rows(head, hidden, labels, z_loss=0.0):
    """Whole logits in the precision of the model, their loss by torch in fp32 or better."""
    logits = F.linear(hidden, head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses = losses + z_loss * torch.where(labels.flatten() == IGNORED, 0.0, logits.flatten(0, 1).logsumexp(1).square())
    return losses.view(labels.shape).sum(1)


def found_by(rows_of, head, hidden, labels, weights, z_loss=0.0):
    """The rows' losses and the gradients of hidden states, matrix and bias, in fp64."""
    inputs = [hidden, *head.parameters()]
    rows = rows_of(head, hidden, labels, z_loss)
    total = rows.sum() * 0.25 if weights is None else (rows * weights).sum()
    return [rows.detach().double(), *(each.double() for each in torch.autograd.grad(total, inputs))]


def in_pieces(head, hidden, labels, z_loss=0.0):
    return head(hidden, labels, z_loss)


def at_targets(head, hidden, labels, z_loss=0.0):
    return head(hidden[labels != IGNORED], labels, z_loss)


def in_fp64(head, hidden):
    copy = Output(WIDTH, VOCAB, head.bias is not None, head.softcap).double()
    copy.load_state_dict(head.state_dict())
    return copy, hidden.detach().double().requires_grad_()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["the same of each row", "another of each row"])
@pytest.mark.parametrize("bias, softcap, z_loss", [(False, 0.0, 0.0), (True, 0.0, 0.3), (True, 4.0, 0.01)])
@pytest.mark.parametrize("rows_of", [in_pieces, at_targets])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, rows_of, bias, softcap, z_loss, weights):
    head, hidden, labels = made(dtype, bias, softcap)
    labels[1, 50:] = IGNORED
    found = found_by(rows_of, head, hidden, labels, weights, z_loss)
    plain = found_by(plain_rows, head, hidden, labels, weights, z_loss)
    exact = found_by(plain_rows, *in_fp64(head, hidden), labels, weights, z_loss)
    for mine, other, right in zip(found, plain, exact, strict=True):
        error, rounding = ((each - right).norm() / right.norm() for each in (mine, other))
        assert error <= {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1.5 * rounding)
    assert not found[1][labels == IGNORED].any()


def test_losses_are_in_fp32_or_better_and_a_confident_model_loses_next_to_nothing():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        head, hidden, labels = made(dtype)
        assert head(hidden, labels).dtype == torch.promote_types(dtype, torch.float32)
    sure = Output(2, 3, True, 0.0)
    torch.nn.init.zeros_(sure.weight)
    sure.bias.data = torch.tensor([0.0, 200.0, -200.0])
    rows = sure(torch.zeros(2, 1, 2), torch.tensor([[1], [2]]))
    assert rows.tolist() == [0.0, 400.0]


class Numbers(TorchDispatchMode):
    """The most numbers of any tensor that an operation gives or takes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor))
        self.most = max(self.most, *sizes, 0)
        return result


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["the same of each row", "another of each row"])
@pytest.mark.parametrize("ask", [in_pieces, at_targets, lambda head, *given: head(*given, with_hits=True)])
def test_no_tensor_has_the_logits_of_all_positions(ask, weights):
    torch.manual_seed(0)
    rows, length, vocab = 3, 256, 2048
    head, labels = Output(8, vocab, False, 0.0).bfloat16(), torch.randint(0, vocab, (rows, length))
    head.sizes = Sizes(32 * vocab, 4 * vocab)
    hidden = torch.randn(rows, length, 8).bfloat16().requires_grad_()
    with Live([hidden, *head.parameters()]) as live, Numbers() as numbers:
        found = ask(head, hidden, labels)
        if found.requires_grad:
            (found.sum() if weights is None else (found * weights).sum()).backward()
    assert numbers.most == 32 * vocab, "a piece"
    whole = rows * length * vocab * 2
    assert live.most < 0.2 * whole, "a piece, two parts in fp32, the matrix's gradient in bf16 and twice in fp32"


def products(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / (2 * ROWS * LENGTH * WIDTH * VOCAB)


def test_the_gradient_of_a_sum_costs_two_products_and_any_other_the_loss_again():
    head, hidden, labels = made(torch.float32)
    scale = torch.tensor(0.125, dtype=torch.float64)
    assert products(lambda: (head(hidden, labels).sum() * scale).backward()) == 3
    assert products(lambda: (head(hidden, labels) * WEIGHTS).sum().backward()) == 6
    with torch.no_grad():
        assert products(lambda: head(hidden, labels)) == 1
    frozen = head.requires_grad_(False)
    assert products(lambda: frozen(hidden, labels).sum().backward()) == 2, "no gradient of the matrix"


def test_a_second_backward_pass_finds_the_same():
    head, hidden, labels = made(torch.float32)
    total = head(hidden, labels).sum() * 3
    inputs = [hidden, head.weight]
    first, second = ([each.clone() for each in torch.autograd.grad(total, inputs, retain_graph=True)] for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        assert mine.abs().max() > 0 and torch.allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_pieces_are_never_of_less_than_a_position_and_a_gpus_are_larger():
    head, hidden, labels = made(torch.float32, sizes=Sizes(1, 1))
    rows = head(hidden, labels)
    head.sizes = None
    assert torch.allclose(rows, head(hidden, labels)) and min(output.ON_GPU) > max(output.ON_CPU)


def test_hits_are_the_likeliest_tokens_that_are_labels():
    head, hidden, labels = made(torch.float32, bias=True, softcap=4.0)
    likeliest = head(hidden).argmax(2)
    labels[0] = torch.where(labels[0] == IGNORED, IGNORED, likeliest[0])
    for given in (hidden, hidden[labels != IGNORED]):
        scores = head(given, labels, with_hits=True)
        assert torch.allclose(scores[:, 0], plain_rows(head, hidden, labels)) and not scores.requires_grad
        assert scores[:, 1].tolist() == (likeliest == labels).sum(1).tolist()
    assert scores[0, 1] == (labels[0] != IGNORED).sum()
