"""The benchmarks run and print a ratio; how fast anything is decides no test."""

import re

import pytest


@pytest.mark.parametrize("what", ["loss", "attention", "step"])
def test_each_prints_a_ratio(tool, what):
    said = tool("bench.py", what).stdout.splitlines()
    lines = [line for line in said if "ratio" in line]  # DeepSpeed prints a line of its own
    assert lines
    for line in lines:
        found = re.search(r": \S.* ([\d.]+) ms, \S.* ([\d.]+) ms, ratio ([\d.]+)$", line)
        ours, theirs, ratio = (float(value) for value in found.groups())
        assert ratio == pytest.approx(ours / theirs, rel=0.02, abs=0.01)


def test_an_unknown_one_is_refused(tool):
    done = tool("bench.py", "lost", check=False)
    assert done.returncode == 2 and "invalid choice: 'lost'" in done.stderr
