"""tools/evaluate.py's suites: what they find stands beside what is there, and the harness's figures are right."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import save
from pretrain.checkpoint.load import Weights, load_model
from pretrain.cli import STOPPED
from pretrain.config import compose
from pretrain.config.schema import to_yaml
from pretrain.evaluation import harness
from pretrain.evaluation.suite import run_suite
from pretrain.files import alone
from pretrain.model.heads import parameter_shapes
from pretrain.report.page import write_report
from pretrain.shards import manifest as manifests
from pretrain.stream import opening
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests import forked
from tests.forked import ROOT
from tests.models import SMALL, initial_values, write_weights
from tools import evaluate, show_batches

pytestmark = pytest.mark.usefixtures("transformers_forked")
QUESTIONS = [(f"{word} ", ["self", "the", "import os"]) for word in ("def", "class", "return", "import", "if", "from")]


def test_suites_stand_beside_the_figures_of_all_held_out_text(tool, undisturbed):
    before = {"step": 24, "val_loss": 4.5, "targets": 9, "unigram_loss": 5.0}
    (undisturbed / "evaluation.json").write_text(json.dumps(before))
    said = tool("evaluate.py", undisturbed, "--suite", "--memorization", "--limit", 30, "--precision", "fp32").stdout
    found = json.loads((undisturbed / "evaluation.json").read_text())
    assert {name: found[name] for name in before} == before
    suite, known = found["suite"], found["memorization"]
    assert suite["step"] == known["step"] == 24
    assert suite["next_passage"]["items"] == suite["copying"]["items"] == 30 >= suite["last_word"]["items"] > 10
    assert 2 < suite["copying"]["first_loss"] < 7  # below the 6.2 nats of a guess among 512, or little above
    assert known["once"]["windows"] == known["held out"]["windows"] == 30 and known["once"]["exact"] == 0
    for name in ("next_passage", "copying", "2 to 10 times", "held out"):
        assert name in said
    page = write_report(undisturbed).read_text()
    assert "Tasks made of held-out text" in page and "Training text known by heart" in page and "unigram loss" in page


def test_text_that_a_model_repeats_is_known_by_heart(tuned, shards, tool, tmp_path):
    """A model whose blocks add nothing writes the last id again and again."""
    run, texts = tmp_path / "run", tmp_path / "texts"
    model = replace(Weights(tuned / "language_model").config, max_positions=128)
    shapes, first = parameter_shapes(model), initial_values(model, 5)
    save.write_weights(run, model, lambda name: first(name, shapes[name]) * (".blocks." not in name))
    for name in ("config.yaml", "tokenizer.model"):
        shutil.copy(tuned / "language_model" / name, run)
    shutil.copytree(Path(os.__file__).parent / "json", texts)
    (texts / "again.py").write_text(" self" * 2000)
    files = ["--input", texts, "--tokenizer", run / "tokenizer.model", "--val-fraction", "0.3"]
    tool("write_shards.py", *files, "--output", tmp_path / "shards")
    evaluate.main([str(run), "--data", str(tmp_path / "shards"), "--memorization", "--precision", "fp32"])
    known = json.loads((run / "evaluation.json").read_text())["memorization"]
    assert known["once"] == {"windows": known["once"]["windows"], "exact": 0.0} and known["once"]["windows"] > 20
    assert known["11 times or more"] == {"windows": 1, "exact": 1.0}


@pytest.fixture(scope="module")
def tuned(shards, tmp_path_factory):
    """Runs' folders of fine-tuned models that were not trained: a language model and an embedding model."""
    root = tmp_path_factory.mktemp("tuned")
    for task, head in (("language_model", "lm"), ("embedding", "embedding")):
        line = [*SMALL[1:], "model.vocab_size=512", f"task={task}", f"run.name={task}", "data.train=x.jsonl"]
        cfg = compose.compose("finetune", line)
        model = replace(cfg.model, head=head, max_positions=128)
        write_weights(root / task, model)
        (root / task / "config.yaml").write_text(to_yaml(cfg))
        shutil.copy(shards / "train" / "tokenizer.model", root / task)
    return root


def test_a_tuned_language_model_is_evaluated_on_shards_that_are_named(tuned, shards, capsys):
    run, line = tuned / "language_model", ["--precision", "fp32", "--limit", "8"]
    with pytest.raises(ValueError, match=r"was fine-tuned for language_model: .* name these with --data"):
        evaluate.main([str(run), "--suite"])
    evaluate.main([str(run), "--data", str(shards), "--suite", "--memorization", *line])
    evaluate.main([str(run), "--data", str(shards), *line])
    found, cfg = json.loads((run / "evaluation.json").read_text()), compose.read(run / "config.yaml")
    held_out = manifests.open_split(shards, "val")
    expected = run_suite(load_model(run), held_out, load_tokenizer(run), cfg.train.seq_len, 8)
    assert found["suite"] == {"step": 0, **expected} and found["memorization"]["held out"]["exact"] == 0
    # with small weights the model guesses; the unigram model knows the training shards
    assert found["val_loss"] == pytest.approx(math.log(512), abs=0.05)
    assert found["unigram_bits_per_byte"] < found["val_bits_per_byte"] and "gzip -9" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--memorization sets training text beside held-out text, and .*val is both"):
        evaluate.main([str(run), "--data", str(shards / "val"), "--memorization", *line])
    with pytest.raises(ValueError, match=r"embedding: its figures .* it is no language model \(model.head=embedding\)"):
        evaluate.main([str(tuned / "embedding"), "--data", str(shards), "--suite"])


def test_batches_of_examples_are_not_shown(tuned):
    with pytest.raises(ValueError, match="was fine-tuned on examples"):
        show_batches.main([str(tuned / "embedding"), "--step", "1"])


def write_harness(folder: Path, body: str) -> None:
    """A package in the harness's place, with one task, whose evaluation is `body`."""
    (folder / "lm_eval").mkdir()
    (folder / "lm_eval" / "tasks.py").write_text(
        "class TaskManager:\n    all_tasks = ['it']\n    def __init__(self, **given):\n        pass\n"
    )
    (folder / "lm_eval" / "__init__.py").write_text(f"def simple_evaluate(**asked):\n{textwrap.indent(body, '    ')}")


def test_the_harness_runs_alone_also_under_a_launcher(tmp_path, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    write_harness(
        tmp_path,
        f"""import os
seen = sum(name in os.environ for name in {names})
return {{'results': {{'it': {{'launched,none': seen, 'sample_len': asked['limit']}}}}}}
""",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in names:
        monkeypatch.setenv(name, "1")
    assert harness.evaluate(tmp_path, "float32", ["it"], None, 3) == {"it": {"launched": 0, "items": 3}}


def test_the_harness_ends_with_the_tool(tmp_path, environment):
    begun = tmp_path / "begun"
    write_harness(
        tmp_path,
        f"""import os, pathlib, time
new = pathlib.Path({str(begun) + ".new"!r})
new.write_text(str(os.getpid()))
new.rename({str(begun)!r})
time.sleep(600)
""",
    )
    (tmp_path / "config.json").write_text("{}")
    line = forked.program(ROOT / "tools" / "evaluate.py", tmp_path, "--tasks", "it", "--precision", "fp32")
    path = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    with subprocess.Popen(line, env=environment | {"PYTHONPATH": path}) as process:
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(600) == STOPPED
    while Path(f"/proc/{begun.read_text()}").exists():  # it is on its way: the tool has ended what it started
        time.sleep(0.01)


def write_task(folder) -> None:
    """A task of the harness with its data beside it."""
    rows = [{"question": question, "choices": choices, "answer": number % 3}
            for number, (question, choices) in enumerate(QUESTIONS)]  # fmt: skip
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(f"""task: own_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")


@torch.no_grad()
def likeliest_choice(model, tokenizer, question: str, choices: list[str]) -> int:
    """The choice of the greatest log-probability after the question, by our own model."""
    chances = []
    for choice in choices:
        ids = [*tokenizer.prefix, *tokenizer.encode(question + choice)]
        first = len(tokenizer.prefix) + len(tokenizer.encode(question.rstrip()))  # the space goes to the choice
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        chances.append(float(log_p[range(first - 1, len(ids) - 1), ids[first:]].sum()))
    return max(range(len(choices)), key=chances.__getitem__)


def test_tasks_of_the_harness_are_asked_of_the_export(tool, undisturbed, tmp_path):
    pytest.importorskip("lm_eval")
    write_task(tmp_path / "tasks")
    options = ("--tasks", "own_words", "--include-path", tmp_path / "tasks", "--precision", "fp32")
    said = tool("evaluate.py", undisturbed, *options).stdout
    found = json.loads((undisturbed / "evaluation.json").read_text())["tasks"]["own_words"]
    model, tokenizer = load_model(undisturbed), load_tokenizer(undisturbed)
    hits = [likeliest_choice(model, tokenizer, *row) == number % 3 for number, row in enumerate(QUESTIONS)]
    assert found["acc"] == pytest.approx(sum(hits) / 6) and found["items"] == 6 and found["step"] == 24
    assert "own_words" in said and f"acc {found['acc']:.4g}" in said


def test_an_unknown_task_is_met_with_the_nearest_names(tmp_path):
    pytest.importorskip("lm_eval")
    write_task(tmp_path / "tasks")
    with pytest.raises(ValueError, match=r"no task 'own_word': did you mean .*own_words"):
        harness.run({"tasks": ["own_word"], "include_path": str(tmp_path / "tasks")})


def test_a_model_that_writes_nothing_is_not_given_to_the_harness(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    with pytest.raises(ValueError, match="models that write text, and this is BertForSequenceClassification"):
        harness.evaluate(tmp_path, "float32", ["it"], None, 3)


def test_the_harness_suffixes_are_left_out():
    found = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict-match": 0.25, "sample_len": 6}
    assert harness.figures(found) == {"acc": 0.5, "exact_match strict-match": 0.25, "items": 6}


def test_without_a_network_or_the_harness_it_is_said_what_to_do(monkeypatch):
    class LocalEntryNotFoundError(Exception):
        pass

    request = {"tasks": ["lambada_openai"]}
    try:
        try:
            raise LocalEntryNotFoundError("no route")
        except LocalEntryNotFoundError as error:
            raise RuntimeError("could not load the data set") from error
    except RuntimeError as error:
        assert "--include-path" in harness.explained(error, request)
    assert harness.explained(ValueError("bad task"), request) == "bad task"
    assert harness.explained(KeyError("a fault"), request) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pretrain\[eval\]"):
        evaluate.main(["runs/none", "--tasks", "hellaswag"])


def test_a_suite_that_is_done_is_kept_when_the_harness_fails(undisturbed, tmp_path, monkeypatch, capsys):
    (undisturbed / "evaluation.json").unlink(missing_ok=True)
    write_harness(tmp_path, "raise ValueError('no data for it')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = [str(undisturbed), "--suite", "--limit", "8", "--precision", "fp32", "--tasks", "it"]
    with pytest.raises(ValueError, match="no data for it"):
        evaluate.main(line)
    assert "copying" in capsys.readouterr().out
    assert json.loads((undisturbed / "evaluation.json").read_text())["suite"]["step"] == 24


def test_the_unigram_model_counts_all_tokens_or_a_share_of_them(undisturbed, monkeypatch):
    cfg, tokenizer = compose.read(undisturbed / "config.yaml"), load_tokenizer(undisturbed)
    stream = opening.open_held_out(cfg.data.sources[0], cfg.data, 32, tokenizer, "train")
    every = evaluate.token_counts([stream, stream], 32, tokenizer.vocab_size)
    assert every.sum() == 2 * 32 * stream.epoch_samples
    assert (every == 2 * np.bincount(np.concatenate(list(evaluate.parts(stream))), minlength=len(every))).all()
    monkeypatch.setattr(evaluate, "COUNTED", 32 * stream.epoch_samples // 3)
    some = evaluate.token_counts([stream, stream], 32, tokenizer.vocab_size)
    assert some.sum() == pytest.approx(every.sum() / 7, rel=0.02) and (some <= every).all()


def test_other_suites_and_other_tasks_are_kept(tmp_path):
    path = tmp_path / "evaluation.json"
    evaluate.save(path, {"step": 1, "val_loss": 2.0, "unigram_loss": 3.0})
    evaluate.save(path, {"tasks": {"a": {"acc": 0.1}, "b": {"acc": 0.2}}})
    evaluate.save(path, {"tasks": {"b": {"acc": 0.3}}, "suite": {"step": 1}})
    evaluate.save(path, {"step": 2, "val_loss": 1.0})
    assert json.loads(path.read_text()) == {
        "step": 2, "val_loss": 1.0, "tasks": {"a": {"acc": 0.1}, "b": {"acc": 0.3}}, "suite": {"step": 1},
    }  # fmt: skip


def test_two_evaluations_at_once_keep_what_both_found(tmp_path):
    """The second waits until the first has written, and reads that."""
    path = tmp_path / "evaluation.json"
    with alone(path):
        second = threading.Thread(target=evaluate.save, args=(path, {"suite": {"step": 1}}))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        path.write_text('{"step": 1, "val_loss": 2.0}')
    second.join()
    assert json.loads(path.read_text()) == {"step": 1, "val_loss": 2.0, "suite": {"step": 1}}


def test_what_has_no_held_out_text_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Hugging Face folder: give it --tasks"):
        evaluate.main([str(tmp_path), "--suite"])
    (tmp_path / "config.json").unlink()
    tuned = compose.compose("finetune", ["task=classification", "run.name=x", "data.train=x.jsonl", "data.val=y.jsonl"])
    (tmp_path / "config.yaml").write_text(to_yaml(tuned))
    with pytest.raises(ValueError, match="fine-tuned for classification"):
        evaluate.main([str(tmp_path)])
    for wrong in (["--limit", "0"], ["--include-path", "x"]):
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path), *wrong])
