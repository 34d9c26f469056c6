"""tools/repeat_seeds.py through real runs: two seeds, judged on examples that no run has seen."""

import json
import statistics
import subprocess
import sys
import time

import pytest

from pretrain.cli import STOP_SIGNALS, STOPPED
from pretrain.config import compose
from pretrain.examples.tables import read_table
from pretrain.predict import Predictor
from tests import forked
from tests.conftest import TINY
from tests.forked import ROOT
from tests.journals import events, journal, wandb_history, wandb_records
from tests.task_data import functions
from tools import repeat_seeds

BAD = {"text": None, "label": "json"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Examples of two labels; those to learn from and those to be judged on have a row without a text."""
    rows = [{"text": row["text"], "label": row["module"]} for row in functions() if row["module"] in ("json", "email")]
    root = tmp_path_factory.mktemp("rows")
    for name, part in {"train": [*rows[:16], BAD], "val": rows[16:24], "test": [BAD, *rows[24:33]]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


@pytest.mark.parametrize("sent", STOP_SIGNALS)
def test_a_signal_is_passed_on_and_waited_for(tmp_path, environment, sent):
    """The command takes a second to save; only then does the tool end, also when more signals come, and starts no other
    seed.
    """
    script = (
        "import pathlib, signal, sys, time; root = pathlib.Path(sys.argv[1])\n"
        "def save(*_): time.sleep(1); (root / 'saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "(root / 'started').touch(); time.sleep(600)"
    )
    seeds = forked.program(ROOT / "tools" / "repeat_seeds.py")
    line = [*seeds, "--", sys.executable, "-c", script, str(tmp_path), "run.name=x"]
    with subprocess.Popen(line, env=environment, text=True, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        (tmp_path / "started").unlink()
        for _ in range(3):
            process.send_signal(sent)
            time.sleep(0.2)
        assert process.wait(600) == STOPPED and "interrupted" in process.stderr.read()
    assert (tmp_path / "saved").exists() and not (tmp_path / "started").exists()


def test_a_run_that_was_stopped_is_not_judged(tmp_path, capsys):
    """Its exit code says so; another one than 0 ends the seeds too."""
    for code in (STOPPED, 1):
        with pytest.raises(SystemExit) as ended:
            repeat_seeds.main(
                ["--seeds", "0", "1", "--", "bash", "-c", f"exit {code}", f"run.root={tmp_path}", "run.name=x"]
            )
        assert ended.value.code == code
        assert ("x-seed0 was stopped before its end" in capsys.readouterr().err) == (code == STOPPED)


def test_each_seed_is_a_run_and_the_figures_are_of_all(files, shards, tool, tmp_path):
    command = forked.program(
        "-m", "pretrain.finetune", "--drop-bad", "task=classification", *TINY, "train.steps=2",
        "log=offline", f"data.tokenizer={shards}", f"data.train={files}/train.jsonl", f"data.val={files}/val.jsonl",
        f"run.root={tmp_path}", "run.name=mood",
    )  # fmt: skip
    test = files / "test.jsonl"
    done = tool("repeat_seeds.py", "--seeds", 3, 4, "--test", test, "--drop-bad", "--", *command)
    said, runs = done.stdout, [tmp_path / f"mood-seed{seed}" for seed in (3, 4)]
    assert done.stderr.count("train.jsonl: 1 of 17 examples are left out, the first: ") == 2
    for run, seed in zip(runs, (3, 4), strict=True):
        assert compose.read(run / "config.yaml").seed == seed
        (source,) = events(run, "source")
        assert source["examples"] == 16 and source["dropped"] == 1
        (started,) = wandb_records(run)
        (step,) = [row for row in wandb_history(started) if "val_macro_f1" in row]
        assert step["step"] == 2 and step["val_loss"] == journal(run)[-1]["val_loss"]
        best = json.loads((run / "result.json").read_text())["figures"]["val_macro_f1"]
        assert (
            f"{run.name}: best macro_f1 at step 2 (loss " in said and f"macro_f1 {best:.4f}); {run}/result.json" in said
        )
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
