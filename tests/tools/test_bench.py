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


def test_both_ways_of_saving_are_measured(tool):
    said = tool("bench_checkpoint.py", "--model", "tiny", "--threads", "1").stdout.splitlines()
    assert re.search(r"checkpoint: tiny \([\d.]+ MB\), 1 threads; a step without a save [\d.]+ ms", "\n".join(said))
    for way in ("ours", "safetensors.save"):
        (line,) = [line for line in said if line.startswith(f"checkpoint: {way}: ")]
        found = dict(
            re.findall(r"([a-z][^,]*(?:, \w+)?) (-?[\d.]+)(?:, |$)", line.removeprefix(f"checkpoint: {way}: "))
        )
        assert len(found) == 8 and all(float(value) > -1e3 for value in found.values()), line
    assert re.fullmatch(r"checkpoint: another process: step / without [\d.]+", said[-1])


def test_an_unknown_one_is_refused(tool):
    done = tool("bench.py", "lost", check=False)
    assert done.returncode == 2 and "invalid choice: 'lost'" in done.stderr
