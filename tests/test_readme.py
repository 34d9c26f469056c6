"""The READMEs: their commands work as written, their links lead somewhere, and nothing that is there goes unnamed.

Training commands run at a tiny size; the quickstart, in full, is a slow test.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import copy_checkout
from tests.forked import ROOT

# In the order in which their commands run: later ones use what earlier ones made.
READMES = ("README.md", "tools/README.md", "conf/README.md", "launch/README.md", "pretrain/README.md",
           "pretrain/engine/README.md", "tests/README.md")  # fmt: skip
TRAINERS = ("pretrain.train", "pretrain.finetune", "launch/finetune.sh", "launch/torchrun.sh", "launch/deepspeed.sh")
MODEL = "model=llama_tiny model.tied_embeddings=false "
TINY = (MODEL + "train.steps=2 train.seq_len=32 train.global_batch_size=4 train.micro_batch_size=2 "
        "train.eval_samples=4 log.sample_tokens=4 log=none")  # fmt: skip


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def commands() -> list[str]:
    """Every line of the bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", "\n".join(map(text_of, READMES)), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone with some text, some examples, and a `python` that forks (the code it is a copy of)."""
    clone = copy_checkout(tmp_path_factory.mktemp("clone"))
    (clone / "my_text").mkdir()
    for file in Path(os.__file__).parent.glob("*.py"):
        shutil.copy(file, clone / "my_text")
    rows = [{"text": f"def {name}(self):\n    return {number}", "label": "odd" if number % 2 else "even"}
            for number, name in enumerate(("start", "stop", "read", "write", "close", "sort"))]  # fmt: skip
    for split in ("train", "val"):
        (clone / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    programs = clone / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(forked.python())
    for name, module in (("torchrun", "torch.distributed.run"), ("deepspeed", "deepspeed.launcher.runner")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{programs}/python" -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    return clone


def test_every_command_works_as_written(clone, environment):
    """`python`, `torchrun`, `deepspeed` and what they and the launch scripts start are forked."""
    python = str(clone / ".venv" / "bin" / "python")
    env = {**environment, "PYTHON": python, "PYTHON_EXEC": python, "PYTHONPATH": str(clone)}
    ran = 0
    for command in commands():
        trains = any(name in command for name in TRAINERS) and not re.search("--(help|cfg|check)", command)
        small = f"{command} {TINY.removeprefix(MODEL) if 'init=' in command else TINY}" if trains else command
        line = ["bash", "-c", f". .venv/bin/activate; {small}"]
        done = subprocess.run(line, cwd=clone, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 40
    for run in ("mine", "continued", "one", "two", "three", "four", "mood", "further"):
        rows = (clone / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_the_first_one_is_read_in_one_sitting():
    assert text_of("README.md").count("\n") <= 180


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(name)):
        assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize(
    ("name", "things"),
    [
        ("pretrain/README.md", "pretrain/**/*.py"), ("tools/README.md", "tools/*.py"), ("launch/README.md", "launch/*"),
        ("conf/README.md", "conf/*"), ("conf/README.md", "conf/experiment/*.yaml"),
        ("conf/README.md", "conf/model/[a-z]*.yaml"),
    ],
)  # fmt: skip
def test_everything_that_is_there_is_named(name, things):
    known = re.findall(r"[\w.]+", text_of(name))
    for path in ROOT.glob(things):
        if path.name not in ("__init__.py", "README.md", "__pycache__"):
            assert path.stem in known or path.name in known, f"{path.relative_to(ROOT)} is not in {name}"


def test_files_that_are_named_are_there():
    """Paths of this checkout, in any README."""
    for name in READMES:
        for path in re.findall(r"\b(?:pretrain|conf|launch|tools|tests)/[\w/.-]*\w\b", text_of(name)):
            assert any(ROOT.glob(path)) or any(ROOT.glob(f"{path}.*")), f"{name} names {path}"


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
    for word in ("ranks: 2", "bits per byte", "tokens/s", "MFU", "report.html", "what to try next"):
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
