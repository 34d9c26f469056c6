"""Initial values: a function of seed, name and position, of which a rank draws what it owns."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import compose
from pretrain.model.initial import BLOCK, fill_initial
from tests.models import SMALL, initial_value

NAME, SHAPE = "trunk.blocks.0.attention.q.weight", (700, 601)  # some blocks and a part of one


class Drawn(TorchDispatchMode):
    """Counts the random numbers that are drawn."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def config():
    return compose.compose("pretrain", SMALL).model


@pytest.mark.parametrize("name", [NAME, NAME.replace("weight", "lora_a"), "trunk.norm.weight"])
def test_any_range_is_that_of_the_whole_and_little_more_is_drawn(config, name):
    whole = initial_value(name, SHAPE, config, 3).view(-1)
    generator = torch.Generator().manual_seed(0)
    ends = [torch.randint(0, len(whole) + 1, (2,), generator=generator).sort()[0].tolist() for _ in range(20)]
    small = [(place, place + size) for place in (0, 7, BLOCK - 1, BLOCK, len(whole) - 17) for size in (0, 1, 15, 17)]
    for start, end in [*ends, *small]:
        part = torch.empty(end - start)
        with Drawn() as drawn:
            fill_initial(part, start, name, SHAPE, config, 3)
        assert torch.equal(part, whole[start:end])
        assert drawn.count <= end - start + 2 * BLOCK


def test_values_are_normal_and_no_block_is_like_another(config):
    whole = initial_value(NAME, SHAPE, config, 3).view(-1)
    assert abs(whole.mean().item()) < 4 * 0.02 / len(whole) ** 0.5
    assert whole.std().item() == pytest.approx(0.02, rel=0.01)
    within = [(whole.abs() < sigmas * 0.02).double().mean().item() for sigmas in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=3e-3)
    blocks = whole.split(BLOCK)
    assert len({block[0].item() for block in blocks}) == len(blocks) == 7
    assert abs(torch.corrcoef(torch.stack(blocks[:6])).fill_diagonal_(0)).max() < 0.03


def test_values_do_not_depend_on_the_type_that_they_are_kept_in(config):
    whole = initial_value(NAME, SHAPE, config, 3).view(-1)
    low = torch.empty(1000, dtype=torch.bfloat16)
    fill_initial(low, BLOCK - 500, NAME, SHAPE, config, 3)
    assert torch.equal(low, whole[BLOCK - 500 : BLOCK + 500].bfloat16())
