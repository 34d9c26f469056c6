"""The README's fine-tuning commands on real data, run as they stand there: what they reach, against plain methods.

The published models come from the package indexes (`real_models`) instead of the hub.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.evaluation import metrics
from pretrain.examples.tables import read_table
from tests.baselines import bm25_ranks, first_answer_of_its_kind, rows, tf_idf
from tests.conftest import copy_checkout
from tests.forked import ROOT
from tests.real_models import published

pytestmark = pytest.mark.slow
TOOLS = (ROOT / "tools" / "README.md").read_text()
BLOCK = re.search(r"\*\*On real data\*\*.*?^```\n(.*?)^```", TOOLS, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, environment):
    """A clone with both published models in it."""
    folder = copy_checkout(tmp_path_factory.mktemp("clone"))
    models = published(tmp_path_factory.mktemp("models"), environment)
    for name, source in zip(("minilm", "smollm2"), models, strict=True):
        shutil.copytree(source, folder / name)
    return folder


@pytest.fixture
def run(clone, environment):
    """Run the README's lines on one data set; returns the clone."""

    def run_all(name: str) -> Path:
        lines = [line for line in BLOCK[1].replace("\\\n", " ").splitlines() if re.search(rf"\b{name}\b", line)]
        assert len(lines) >= 2, name
        env = {**environment, "PYTHON": sys.executable, "PYTHONPATH": str(clone)}
        for line in lines:
            command = ["bash", "-c", line]
            done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=7200)
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return clone

    return run_all


def figures(clone: Path, name: str) -> dict:
    return json.loads((clone / "runs" / name / "result.json").read_text())["figures"]


def of_seeds(clone: Path, name: str) -> dict:
    return json.loads((clone / "runs" / f"{name}-seeds.json").read_text())["figures"]


def test_sentiment_beats_tf_idf_by_3_points(run):
    clone = run("sentiment")
    found = of_seeds(clone, "sentiment")["test_macro_f1"]
    splits = [rows(clone / "sentiment" / f"{split}.jsonl") for split in ("train", "val", "test")]
    plain = tf_idf(*splits, ngram_range=(1, 2))
    print(f"macro-F1: {found}, TF-IDF {plain:.4f}")
    assert len(found) == 3 and sum(found) / 3 >= plain + 0.03


def test_a_bert_pretrained_here_needs_fewer_labels(run):
    clone = run("reviews")
    pretrained, anew = (of_seeds(clone, name)["val_accuracy"] for name in ("reviews", "reviews-anew"))
    print(f"accuracy with 1,000 labels: pretrained {pretrained}, anew {anew}")
    assert len(pretrained) == len(anew) == 3 and sum(pretrained) / 3 >= sum(anew) / 3 + 0.05


def test_search_beats_bm25_and_the_encoder_before(run):
    clone = run("glosses")
    test = rows(clone / "glosses" / "test.jsonl")
    plain = metrics.ranking(bm25_ranks(*([row[key] for row in test] for key in ("query", "document"))))
    after, before = (figures(clone, name)["val_recall_at_10"] for name in ("glosses", "glosses-before"))
    print(f"recall@10: {after:.4f}, before {before:.4f}, BM25 {plain['recall_at_10']:.4f}")
    assert after > before and after > plain["recall_at_10"]


def test_answers_beat_the_first_of_their_kind(run):
    clone = run("questions")
    test = read_table(str(clone / "questions" / "test.json"), "--input").rows
    plain = metrics.answers(first_answer_of_its_kind(test), [row["answers"]["text"] for row in test])["exact_match"]
    found = figures(clone, "questions")["val_exact_match"]
    print(f"exact match: {found:.4f}, the first answer of its kind {plain:.4f}")
    assert found > plain


@pytest.mark.parametrize(
    "name, figure, judge", [("translation", "chrf", metrics.translation), ("summaries", "rouge_l", metrics.summaries)]
)
def test_lora_beats_the_model_before_and_a_copy(run, name, figure, judge):
    """A copy of what follows the instruction in each prompt, judged on the same pairs."""
    clone = run(name)
    said = rows(clone / "runs" / name / "predictions.jsonl")
    plain = judge([row["prompt"].partition(": ")[2] for row in said], [row["gold"] for row in said])[figure]
    assert len(said) == 200
    after, before = (figures(clone, run_name)[f"val_{figure}"] for run_name in (name, f"{name}-before"))
    print(f"{figure}: {after:.4f}, before {before:.4f}, a copy {plain:.4f}")
    assert after > before and after > plain
