"""Learning-rate schedules against their formulas, and which parameters decay."""

import math
from dataclasses import replace

import pytest
import torch

from pretrain import optim
from pretrain.config import compose
from pretrain.config.schema import ScheduleConfig
from pretrain.model.heads import LanguageModel

PEAK, STEPS = 2.0, 110


def schedule(name):
    return ScheduleConfig(name, warmup_steps=10, min_lr_ratio=0.1, decay_fraction=0.2)


def rates(name):
    return [optim.learning_rate(step, STEPS, PEAK, schedule(name)) for step in range(STEPS)]


@pytest.mark.parametrize("name", sorted(optim.SCHEDULES))
def test_warmup_is_linear_and_reaches_the_peak(name):
    assert rates(name)[:10] == [PEAK * (k + 1) / 10 for k in range(10)]


def test_cosine():
    found = rates("cosine")
    assert found[59] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert found[-1] == pytest.approx(PEAK * 0.1)


def test_linear():
    found = rates("linear")
    assert found[59] == pytest.approx(PEAK * (1 - 0.9 * 0.5)) and found[-1] == pytest.approx(PEAK * 0.1)


def test_constant():
    assert set(rates("constant")[10:]) == {PEAK}


def test_wsd_is_flat_then_falls_linearly_over_the_tail():
    found = rates("wsd")
    assert set(found[10:90]) == {PEAK}
    assert found[99] == pytest.approx(PEAK * (1 - 0.9 * 0.5)) and found[-1] == pytest.approx(PEAK * 0.1)
    assert optim.learning_rate(89, STEPS, PEAK, replace(schedule("wsd"), decay_fraction=0.0)) == PEAK


def test_a_run_shorter_than_its_warmup_still_has_a_rate():
    assert optim.learning_rate(0, 1, PEAK, schedule("cosine")) == PEAK / 10


def test_matrices_decay_and_vectors_and_position_tables_do_not():
    overrides = ["run.name=x", "model=gpt2_124m", "model.layers=1", "model.width=48", "model.vocab_size=32"]
    model = LanguageModel(compose.compose("pretrain", overrides).model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optim.parameter_groups(model.named_parameters(), 0.3)
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert "trunk.embedding.weight" in decayed and "trunk.blocks.0.attention.q.weight" in decayed
    others = {names[id(p)] for p in groups[1]["params"]}
    undecayed = ("bias", "norm.weight", "positions.weight")
    assert "trunk.positions.weight" in others and all(n.endswith(undecayed) for n in others)


def test_state_made_early_changes_nothing():
    """AdamW steps the same whether its state was made by us before the first step or by itself at it."""
    results = []
    for early in (False, True):
        parameter = torch.nn.Parameter(torch.arange(6.0))
        cfg = compose.compose("pretrain", ["run.name=x"]).optim
        optimizer = optim.build(cfg, [{"params": [parameter], "weight_decay": 0.1}])
        if early:
            optim.init_state(optimizer, cfg.name, parameter)
        for step in range(3):
            parameter.grad = torch.full((6,), 0.5 + step)
            optimizer.step()
        results.append(parameter.detach().clone())
        assert set(optimizer.state[parameter]) == {"step", *optim.STATE_KINDS[cfg.name]}
    assert torch.equal(*results)
