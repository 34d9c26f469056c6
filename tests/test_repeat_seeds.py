"""tools/repeat_seeds.py through real runs: two seeds, judged on examples that no run has seen."""

import json
import statistics
import sys

import pytest

from pretrain import compose
from pretrain.data.tables import read_table
from pretrain.predict import Predictor
from tests.conftest import TINY
from tests.journals import events
from tests.task_data import functions

BAD = {"text": None, "label": "json"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Examples of two labels; those to learn from and those to be judged on have a row without a text."""
    rows = [{"text": row["text"], "label": row["module"]} for row in functions() if row["module"] in ("json", "email")]
    root = tmp_path_factory.mktemp("rows")
    for name, part in {"train": [*rows[:16], BAD], "val": rows[16:24], "test": [BAD, *rows[24:33]]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def test_each_seed_is_a_run_and_the_figures_are_of_all(files, shards, tool, tmp_path):
    command = [
        sys.executable, "-m", "pretrain.finetune", "--drop-bad", "task=classification", *TINY, "train.steps=2",
        f"data.tokenizer={shards}", f"data.train={files}/train.jsonl", f"data.val={files}/val.jsonl",
        f"run.root={tmp_path}", "run.name=mood",
    ]  # fmt: skip
    test = files / "test.jsonl"
    done = tool("repeat_seeds.py", "--seeds", 3, 4, "--test", test, "--drop-bad", "--", *command)
    said, runs = done.stdout, [tmp_path / f"mood-seed{seed}" for seed in (3, 4)]
    assert done.stderr.count("train.jsonl: 1 of 17 examples are left out, the first: ") == 2
    for run, seed in zip(runs, (3, 4), strict=True):
        assert compose.read(run / "config.yaml").seed == seed
        (source,) = events(run, "source")
        assert source["examples"] == 16 and source["dropped"] == 1
    losses = [json.loads((run / "result.json").read_text())["figures"]["val_loss"] for run in runs]
    kept = json.loads((tmp_path / "mood-seeds.json").read_text())
    assert kept["seeds"] == [3, 4] and kept["figures"]["val_loss"] == losses and losses[0] != losses[1]
    table = read_table(str(test), "--test")
    tested = [Predictor(run, overrides=["task.drop_bad=true"]).figures(table, batch_size=32) for run in runs]
    assert {name for name in kept["figures"] if name.startswith("test_")} == {f"test_{name}" for name in tested[0]}
    for name in tested[0]:
        assert kept["figures"][f"test_{name}"] == pytest.approx([figures[name] for figures in tested], rel=1e-3)
    line = next(line for line in said.splitlines() if line.strip().startswith("val_loss"))
    assert f"{statistics.mean(losses):.4f} +- {abs(losses[0] - losses[1]) / 2**0.5:.4f}" in line
