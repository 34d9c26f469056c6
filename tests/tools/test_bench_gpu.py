"""tools/bench.py gpu, tried out on a CPU: every piece has its rows, and what ends one leaves the others theirs."""

import json
import os
import subprocess
import sys

import pytest

from tests.forked import ENVIRONMENT, ROOT
from tools import bench_gpu

WHAT = {  # piece -> what its rows are about
    "device": ["chosen", "LOCAL_RANK=7", "two ranks on one GPU", "peak in bf16"],
    "collectives": ["process group", "sum over the ranks on cpu", "a step's small sum, read late",
                    "the background's group, and a time limit"],
    "attention": [f"{mask}, {kind}" for kind in ("fp32, heads of 124M", "bf16, heads of 124M", "bf16, heads of 8B")
                  for mask in ("causal", "documents", "window")],
    **{f"zero{stage}": ["a step in fp32 as on the CPU", "memory, 2 rows in bf16"] for stage in range(4)},
    "curve": ["24 steps in fp32 and bf16"], "resume": ["zero1 in bf16", "zero3 in bf16"],
    "124M": ["memory, 16 rows in bf16", "2 layers of 64, 32 tokens a row"],
    "1B": ["memory, 4 rows in bf16", "2 layers of 64, 32 tokens a row"],
    "8B": ["memory, 2 rows in bf16", "2 layers of 64, 32 tokens a row"],
}  # fmt: skip
MEASURED = ("memory", "2 layers of")  # no check on a CPU


def test_every_piece_has_its_rows_and_one_out_of_time_only_loses_its_own(tool, tmp_path):
    out = tmp_path / "new" / "gpu.json"
    done = tool("bench.py", "gpu", "--device", "cpu", "--limit", "zero2=0", "--output", out, check=False)
    assert done.returncode == 1, done.stderr
    rows = json.loads(out.read_text())["rows"]
    late = [row for row in rows if row["piece"] == "zero2"]
    assert [row["found"] for row in late] == ["not done within 0 s, and ended (--limit, --minutes)"]
    assert [(row["piece"], row["what"]) for row in rows if row not in late] == [
        (piece, what) for piece in bench_gpu.PIECES if piece != "zero2" for what in WHAT[piece]
    ]
    for row in rows:
        expected = row not in late and (None if row["what"].startswith(MEASURED) else True)
        assert row["passed"] is expected, row
    *table, last = done.stdout.splitlines()
    assert table == [bench_gpu.line_of(row) for row in rows] and last.startswith(f"{len(rows)} rows, 1 failed, ")
    facts = {(row["piece"], row["what"]): row["facts"] for row in rows}
    losses = facts["curve", WHAT["curve"][0]]
    assert len(losses["fp32"]) == len(losses["bf16"]) == 24 and losses["fp32"] != losses["bf16"]
    assert facts["attention", WHAT["attention"][0]]["kernels"] == ["flash_attention_for_cpu"]
    assert all(facts[size, WHAT[size][1]]["tokens_per_second"] > 0 for size in ("124M", "1B", "8B"))


def test_pieces_without_deepspeed_go_on_where_it_cannot_be_imported(tmp_path):
    """By a Python of its own: what is forked has imported it."""
    (tmp_path / "deepspeed.py").write_text("raise ImportError('built for another torch')")
    out, searched = tmp_path / "gpu.json", f"{tmp_path}{os.pathsep}{ROOT}"
    line = [
        sys.executable,
        ROOT / "tools" / "bench.py",
        "gpu",
        "zero1",
        "collectives",
        "--device",
        "cpu",
        "--output",
        out,
    ]
    subprocess.run(line, env=ENVIRONMENT | {"PYTHONPATH": searched}, capture_output=True, timeout=600)
    broken, *others = json.loads(out.read_text())["rows"]
    assert broken["piece"] == "zero1" and broken["passed"] is False
    assert broken["found"] == "ImportError: built for another torch" and "Traceback" in broken["facts"]["log"]
    assert [row["what"] for row in others] == WHAT["collectives"] and all(row["passed"] for row in others)


def test_what_ends_a_piece_is_told():
    command = [sys.executable, "-c", "import os; print('before', flush=True); os.kill(os.getpid(), 9)"]
    assert bench_gpu.run(command, "cpu", 60) == ("killed by SIGKILL", "before\n")
    assert bench_gpu.run([sys.executable, "-c", "raise SystemExit(3)"], "cpu", 60) == ("exit code 3", "")
    assert bench_gpu.run([sys.executable, "-c", "print('done')"], "cpu", 60) == (None, "done\n")


def test_without_a_gpu_each_piece_says_so(tool, tmp_path):
    out = tmp_path / "gpu.json"
    done = tool("bench.py", "gpu", "device", "1B", "--output", out, check=False)
    for row in json.loads(out.read_text())["rows"]:
        assert row["found"].startswith("ValueError: torch 2") and "sees no GPU: --device cpu tries" in row["found"]
    assert done.returncode == 1 and "2 rows, 2 failed" in done.stdout


def test_when_the_time_of_all_is_over_no_more_pieces_begin(tool, tmp_path):
    done = tool("bench.py", "gpu", "--device", "cpu", "--minutes", "0", "--output", tmp_path / "gpu.json", check=False)
    assert done.stdout.count("not begun: the time of all together is over (--minutes)") == len(bench_gpu.PIECES)


@pytest.mark.parametrize("arguments, said", [
    (["zero4"], "error: zero4 is no piece; these are: device, "),
    (["--limit", "zero4=3"], "error: --limit zero4=3: zero4 is no piece; these are: device, "),
    (["--limit", "8B=soon"], "error: --limit 8B=soon is no number of seconds: write 90, or 8B=120"),
])  # fmt: skip
def test_mistakes_are_explained(tool, arguments, said):
    done = tool("bench.py", "gpu", *arguments, check=False)
    assert done.returncode == 2 and done.stderr.startswith(said)
