"""The README's commands work as written. Training ones run at a tiny size; the quickstart, in full, is a slow test."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, copy_checkout

README = (ROOT / "README.md").read_text()
TRAINERS = ("pretrain.train", "launch/finetune.sh", "launch/torchrun.sh", "launch/deepspeed.sh")
MODEL = "model=llama_tiny "
TINY = (MODEL + "train.steps=2 train.seq_len=32 train.global_batch_size=4 train.micro_batch_size=2 "
        "train.eval_samples=4 log.sample_tokens=4 log=none")  # fmt: skip


def commands() -> list[str]:
    """Every line of the README's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("clone"))


def test_every_command_works_as_written(clone, environment):
    text = clone / "my_text"
    text.mkdir()
    for file in Path(os.__file__).parent.glob("*.py"):
        shutil.copy(file, text)
    rows = [{"text": f"def {name}(self):\n    return {number}", "label": "odd" if number % 2 else "even"}
            for number, name in enumerate(("start", "stop", "read", "write", "close", "sort"))]  # fmt: skip
    for split in ("train", "val"):
        (clone / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    ran = 0
    for command in commands():
        trains = any(name in command for name in TRAINERS) and not re.search("--(help|cfg|check)", command)
        small = f"{command} {TINY.removeprefix(MODEL) if 'init=' in command else TINY}" if trains else command
        env = {**environment, "PYTHON": sys.executable, "PYTHONPATH": str(clone)}
        line = ["bash", "-c", f". .venv/bin/activate; {small}"]
        done = subprocess.run(line, cwd=clone, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 12
    for run in ("mine", "continued", "one", "two", "three", "four", "mood", "further"):
        rows = (clone / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_the_map_names_what_is_there():
    shown = README.partition("## The map of the house")[2].partition("```\n")[2].partition("```")[0]
    for name in re.findall(r"\b[a-z_]+\.(?:py|sh|sbatch)\b", shown):
        assert list(ROOT.glob(f"*/{name}")), name
    for tool in (ROOT / "tools").glob("*.py"):
        assert tool.stem in shown, f"tools/{tool.name} is not on the map"
    for module in (ROOT / "pretrain").glob("*.py"):
        assert module.name == "__init__.py" or module.name in shown, f"{module.name} is not on the map"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, environment):
    """A clone in which launch/quickstart.sh ran to its end; what it said, and how to run a command there."""
    env = {key: value for key, value in environment.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    clone = copy_checkout(tmp_path_factory.mktemp("quickstart"))

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return clone, run, run("env", "NPROC=4", "launch/quickstart.sh")  # as where there are four GPUs


@pytest.mark.slow
def test_the_quickstart_learns_to_write_python(quickstart):
    """Both ends of the promise: fewer bits than gzip, within 8 minutes' work, and a second start finds it all done."""
    clone, run, said = quickstart
    folder = clone / "runs" / "quickstart"
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["val_bits_per_byte"] < result["gzip_bits_per_byte"] < result["unigram_bits_per_byte"]
    for word in ("training on 2 ranks", "bits per byte", "tokens/s", "MFU", "report.html", "what to try next"):
        assert word in said
    text = (folder / "sample.txt").read_text()
    assert len(set(re.findall(r"\b(?:def|return|self|if|for|in|import|not|None|raise)\b", text))) >= 3, text
    again = run("launch/quickstart.sh")
    assert again.count("there already") == 2 and "is complete" in again
    run(".venv/bin/python", "tools/export_hf.py", "runs/quickstart", "--output", "quickstart-hf")
    assert (clone / "quickstart-hf" / "README.md").is_file()


@pytest.mark.slow
def test_a_masked_model_learns_from_the_quickstarts_text(quickstart):
    """Well below the unigram entropy of the masked tokens, on 2 ranks, in less than half of the experiment's steps."""
    clone, run, _ = quickstart
    shards = "runs/quickstart-data/shards"
    trainer = ("launch/torchrun.sh", "experiment=masked", f"data.train={shards}", f"data.val={shards}")
    run(*trainer, "run.name=masked", "train.steps=400")
    run(".venv/bin/python", "tools/evaluate.py", "runs/masked")
    result = json.loads((clone / "runs" / "masked" / "evaluation.json").read_text())
    assert result["val_loss"] < result["unigram_loss"] - 1
    run(".venv/bin/python", "tools/export_hf.py", "runs/masked", "--output", "masked-hf")
