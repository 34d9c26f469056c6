"""Learning-rate schedules against their formulas."""

import math
from dataclasses import replace

import pytest

from pretrain.config.schema import ScheduleConfig
from pretrain.optim.schedule import SCHEDULES, learning_rate

PEAK, STEPS = 2.0, 110


def schedule(name):
    return ScheduleConfig(name, warmup_steps=10, min_lr_ratio=0.1, decay_fraction=0.2)


def rates(name):
    return [learning_rate(step, STEPS, PEAK, schedule(name)) for step in range(STEPS)]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
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
    assert learning_rate(89, STEPS, PEAK, replace(schedule("wsd"), decay_fraction=0.0)) == PEAK


def test_a_run_shorter_than_its_warmup_still_has_a_rate():
    assert learning_rate(0, 1, PEAK, schedule("cosine")) == PEAK / 10
