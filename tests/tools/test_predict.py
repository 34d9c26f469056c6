"""A tuned model on new examples: a run, what it was exported to and that imported again; the command that tells it."""

import contextlib
import datetime
import decimal
import json
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from pretrain.checkpoint.load import Weights
from pretrain.config import compose
from pretrain.config.schema import to_yaml
from pretrain.examples.tables import read_table
from pretrain.hub import convert, folder
from pretrain.hub.families import fitting_head
from pretrain.model.transformer import Transformer
from pretrain.predict import Predictor, settings
from tests.models import SMALL, write_weights
from tests.task_helpers import word_pieces
from tools import predict

pytestmark = pytest.mark.usefixtures("transformers_forked")
WORDS = [f"w{i}" for i in range(30)]
MODEL = ("model=bert_base", "model.layers=1", "model.width=24", "model.heads=2", "model.ffn_width=32",
         "model.max_positions=48", "train.seq_len=24", "train.precision=fp32")  # fmt: skip
ROWS = [{"body": " ".join(f"w{(7 * i + j) % 30}" for j in range(i % 40)), "kind": "abc"[i % 3]} for i in range(50)]
TASKS = {
    "classification": ("sequence", {"labels": ["a", "b", "c"]}, ["task.text=body", "task.label=kind"]),
    "token_classification": ("tokens", {"labels": ["O", "B-X", "I-X"]}, ["task.tokens=body"]),
    "extractive_qa": ("span", {}, ["task.question=kind", "task.context=body", "task.stride=4"]),
    "embedding": ("embedding", {}, ["task.query=body"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each task a run's folder, with a model far from uniform."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = word_pieces(root / "words", WORDS)
    for name, (head, said, columns) in TASKS.items():
        overrides = [f"task={name}", "run.name=x", "data.train=x", *MODEL, *columns]
        cfg = compose.compose("finetune", overrides)
        cfg = replace(cfg, task=replace(cfg.task, **said))
        model = replace(cfg.model, vocab_size=tokenizer.vocab_size)
        write_weights(root / name, fitting_head(model, head, len(cfg.task.labels or [])), 5)
        described = {"name": name, "labels": cfg.task.labels or [], "multi_label": False}
        (root / name / "task.json").write_text(json.dumps(described))
        (root / name / "config.yaml").write_text(to_yaml(cfg))
        (root / name / tokenizer.file_name).write_bytes(tokenizer.file_bytes)
    return root


@pytest.fixture(scope="module")
def imported(runs):
    """The run of classification, exported and imported again."""
    pytest.importorskip("transformers")
    convert.export_hf(runs / "classification", runs / "exported")
    convert.import_hf(runs / "exported", runs / "imported", check=False)
    return runs / "imported"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def told(run, rows, *overrides: str, batch_size: int = 16) -> list[dict]:
    predictor = Predictor(run, "fp32", overrides)
    return predictor.outputs(read_table(str(rows), "--input"), batch_size, lambda count: None)


@pytest.mark.parametrize("task", TASKS)
def test_each_row_is_told_alike_in_every_batch(runs, rows, task):
    found, alone = told(runs / task, rows), told(runs / task, rows, batch_size=1)
    assert len(found) == len(alone) == 50
    for one, other in zip(found, alone, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            both = (value, other[name])
            if isinstance(value, dict):
                assert both[0] == pytest.approx(both[1], abs=1e-5)
            elif isinstance(value, float) or name == "embedding":
                assert both[0] == pytest.approx(both[1], abs=1e-5)
            else:
                assert both[0] == both[1]
    assert len({json.dumps(one) for one in found}) > 3, "not all the same"


def test_an_imported_model_and_a_hugging_face_folder_tell_what_the_run_tells(runs, imported, rows):
    """They know no columns of ours; texts are cut where the run cut them, at half of what the model could read."""
    expected = told(runs / "classification", rows)
    written = json.loads((runs / "exported" / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 24 and Weights(runs / "classification").config.max_positions == 48
    for model in (imported, runs / "exported"):
        found = told(model, rows, "task.text=body")
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        for one, other in zip(found, expected, strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
        predictor = Predictor(model, "fp32", ["task.text=body", "task.label=kind"])
        assert predictor.task.labels == ["a", "b", "c"] and predictor.task.seq_len == 24
        table, of_run = read_table(str(rows), "--input"), Predictor(runs / "classification", "fp32")
        assert predictor.figures(table, 16) == pytest.approx(of_run.figures(table, 16), rel=1e-5)
    with pytest.raises(ValueError, match=r"rows.jsonl has no column 'text'.*task.text=..."):
        told(imported, rows)


def test_settings_of_a_run_hold_unless_others_are_given(runs, rows, tmp_path):
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("".join(json.dumps({"words": row["body"], "kind": row["kind"]}) + "\n" for row in ROWS))
    assert told(runs / "classification", renamed, "task.text=words") == told(runs / "classification", rows)
    for wrong, message in (
        ("task.txt=words", "unknown key task.txt"),
        ("task.labels=[x,y]", "task.labels=.x,y.: only settings of how its task is put"),
        ("task.name=embedding", "task.name=embedding: only settings"),
        ("task.multi_label=true", "task.multi_label=true: only settings"),
        ("task.pooling=first", "task.pooling=first: only settings"),
        ("train.seq_len=4", "train.seq_len=4: only settings"),
        ("task=embedding", "task=embedding: only settings"),
    ):
        with pytest.raises(ValueError, match=message):
            told(runs / "classification", rows, wrong)


def test_what_is_written_is_judged_on_all_rows_unless_some_are_asked_for(runs):
    run = runs / "classification"
    assert settings(run, []).task.generate_samples > 10**9
    written = compose.compose("finetune", ["task=instruct", "run.name=x", "data.train=x"])
    (runs / "writes").mkdir()
    (runs / "writes" / "config.yaml").write_text(to_yaml(written))
    (runs / "writes" / "task.json").write_text('{"name": "instruct", "labels": [], "multi_label": false}')
    write_weights(runs / "writes", compose.compose("pretrain", ["run.name=x", "model=llama_tiny"]).model)
    for overrides, rows in ([], True), (["task.generate_samples=7"], False):
        assert (settings(runs / "writes", overrides).task.generate_samples != 7) == rows


def test_a_model_with_one_output_is_for_no_task(tmp_path):
    """A regression, or a ranker, as many cross-encoders are: not one label that is always right."""
    hf = {"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}
    model = compose.compose("pretrain", ["run.name=x", "model=bert_base", "train.seq_len=512"]).model
    assert folder.task_of_config(hf, replace(model, head="sequence", labels=1)) == {}
    several = hf | {"problem_type": "multi_label_classification"}
    assert folder.task_of_config(several, replace(model, head="sequence", labels=1))["multi_label"]
    hf["id2label"]["1"] = "LABEL_1"
    assert folder.task_of_config(hf, replace(model, head="sequence", labels=2))["name"] == "classification"


def test_a_model_for_no_task_is_refused(runs, rows):
    write_weights(runs / "plain", compose.compose("pretrain", ["run.name=x", "data.train=x", "model=llama_tiny"]).model)
    with pytest.raises(ValueError, match="plain was tuned for no task: give a run of pretrain.finetune"):
        told(runs / "plain", rows)


def test_bad_rows_are_left_out_of_the_figures_and_said(runs, rows, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"body": "w1", "kind": null}\n{"body": null, "kind": "a"}\n')
    good, table = read_table(str(rows), "--input"), read_table(str(bad), "--input")
    run = runs / "classification"
    with pytest.raises(ValueError, match="2 examples of .*bad.jsonl cannot be learnt from: .*line 51.*drop_bad=true"):
        Predictor(run).figures(table, 16)
    found = Predictor(run, overrides=["task.drop_bad=true"]).figures(table, 16)
    assert "2 of 52 examples are left out, the first: " in capsys.readouterr().err
    assert found == Predictor(run).figures(good, 16) and set(found) == {"loss", "accuracy", "macro_f1"}
    assert "left out" not in capsys.readouterr().err


def test_a_loss_of_other_weights_is_not_told(runs, rows):
    weighted = Predictor(runs / "classification", overrides=["task.class_weights=balanced"])
    assert set(weighted.figures(read_table(str(rows), "--input"), 16)) == {"accuracy", "macro_f1"}


def test_scored_pairs_have_no_loss(runs, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    listed = [{"body": f"w{number}", "document": f"w{number + 1}", "score": number} for number in range(9)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in listed))
    assert set(Predictor(runs / "embedding", "fp32").figures(read_table(str(pairs), "--input"), 4)) == {"spearman"}


# Predictions and figures of one pass

GOLD = {
    "classification": lambda row: {}, "extractive_qa": lambda row: {"answers": {"text": [], "answer_start": []}},
    "token_classification": lambda row: {"tags": ["O" if n % 2 else "B-X" for n, _ in enumerate(row["body"].split())]},
    "embedding": lambda row: {"document": f"{row['kind']} w1"},
}  # fmt: skip


@contextlib.contextmanager
def counted():
    """How many rows the trunk of a model has computed, call by call."""
    calls: list[int] = []

    def note(module, inputs, output) -> None:
        if isinstance(module, Transformer):
            calls.append(len(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def quiet(count: int) -> None:
    """Nobody watches."""


def table_of(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(str(path), "--input")


@pytest.mark.parametrize("task", TASKS)
def test_predictions_and_figures_are_of_one_pass(runs, tmp_path, task):
    good = [row | GOLD[task](row) for row in ROWS if row["body"]]
    predictor, table = Predictor(runs / task, "fp32"), table_of(tmp_path / "good.jsonl", good)
    with counted() as of_outputs:
        alone = predictor.outputs(table, 16, quiet)
    with counted() as of_judged:
        judged = predictor.judged(table, 16)
    with counted() as calls:
        told, *both = predictor.told_and_judged(table, 16, quiet)
    assert told == alone and tuple(both) == judged and judged[0]
    assert calls == of_outputs == of_judged and sum(calls) > 40


@pytest.mark.parametrize("task", TASKS)
def test_rows_that_cannot_be_judged_are_told_and_left_out_of_the_figures(runs, tmp_path, task):
    good = [row | GOLD[task](row) for row in ROWS if row["body"]]
    key = {"classification": "kind", "extractive_qa": "answers", "token_classification": "tags"}.get(task, "document")
    bad = good[3] | {key: "" if task == "embedding" else 7}
    rows = [*good[:20], bad, *good[20:], bad]
    predictor = Predictor(runs / task, "fp32", ["task.drop_bad=true"])
    told, *both = predictor.told_and_judged(table_of(tmp_path / "mixed.jsonl", rows), 16, quiet)
    of_good = table_of(tmp_path / "good.jsonl", good)
    assert told[:20] + told[21:-1] == predictor.outputs(of_good, 16, quiet)
    assert [told[20], told[-1]] == predictor.outputs(table_of(tmp_path / "bad.jsonl", [bad, bad]), 16, quiet)
    assert tuple(both) == predictor.judged(of_good, 16)


def test_what_is_written_is_written_once(shards, tmp_path):
    """But for what only the figures ask for: in the middle of a talk."""
    config = compose.compose("finetune", ["task=instruct", "task.figures=answers", "task.max_new_tokens=5",
                                          "run.name=x", "data.train=x", *SMALL])  # fmt: skip
    run = tmp_path / "run"
    write_weights(run, replace(config.model, vocab_size=512), 5)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "task.json").write_text('{"name": "instruct", "labels": [], "multi_label": false}')
    shutil.copy(shards / "train" / "tokenizer.model", run)
    turns = [{"prompt": "import " * (n + 1), "response": "os"} for n in range(5)]
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    predictor = Predictor(run, "fp32")
    for rows, more in (turns, 0), ([{"messages": talk}, {"messages": talk[2:] + talk[1:2]}], 5):
        table = table_of(tmp_path / f"{more}.jsonl", rows)
        with counted() as of_outputs:
            alone = predictor.outputs(table, 4, quiet)
        with counted() as of_judged:
            judged = predictor.judged(table, 4)
        with counted() as calls:
            told, *both = predictor.told_and_judged(table, 4, quiet)
        assert told == alone and tuple(both) == judged and {"loss", "f1"} <= set(judged[0])
        of_loss = -(-len(predictor.task.encode(table)) // 4)
        assert len(calls) == len(of_outputs) + of_loss + more and len(of_judged) > of_loss


# The command


def test_the_command_writes_rows_with_their_predictions(runs, rows, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    line = [str(runs / "classification"), "--input", str(rows), "--precision", "fp32"]
    predict.main([*line, "--output", str(output), "--score"])
    said, progress = capsys.readouterr()
    assert f"50 predictions in {output}" in said and "macro_f1" in said and "50/50" in progress
    assert "label               precision     recall         f1    support\n  a " in said
    expected = [row | {"prediction": one} for row, one in zip(ROWS, told(runs / "classification", rows), strict=True)]
    assert [json.loads(line) for line in output.read_text().splitlines()] == expected
    predict.main([line[0], "task.text=kind", *line[1:]])
    assert [json.loads(row)["kind"] for row in capsys.readouterr().out.splitlines()] == [row["kind"] for row in ROWS]
    predict.main([*line, "--score"])
    assert "prediction" not in capsys.readouterr().out, "alone it only scores"


def test_values_of_parquet_are_written_as_text(runs, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    odd = {"when": datetime.datetime(2024, 5, 6, 7, 8), "price": decimal.Decimal("1.50"), "raw": b"\x00a",
           "none": float("nan"), "inner": {"days": [datetime.date(2024, 1, 2)]}, "fine": [0.5, None]}  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "w1"} | odd]), tmp_path / "in.parquet")
    predict.main([str(runs / "classification"), "--input", str(tmp_path / "in.parquet"), "--output",
                  str(tmp_path / "out.jsonl")])  # fmt: skip
    row = read_table(str(tmp_path / "out.jsonl"), "x").rows[0]
    del row["prediction"]
    assert row == {"body": "w1", "when": "2024-05-06 07:08:00", "price": "1.50", "raw": "b'\\x00a'", "none": "nan",
                   "inner": {"days": ["2024-01-02"]}, "fine": [0.5, None]}  # fmt: skip


def test_what_would_fail_in_the_end_is_refused_before(runs, rows, tmp_path):
    with pytest.raises(ValueError, match="--output .*gone/out.jsonl: there is no folder .*gone"):
        predict.main([str(runs / "none"), "--input", str(rows), "--output", str(tmp_path / "gone" / "out.jsonl")])
    told_before = tmp_path / "told.jsonl"
    told_before.write_text('{"body": "w1", "prediction": 1}\n')
    with pytest.raises(ValueError, match="told.jsonl has a column 'prediction' already: rename it"):
        predict.main([str(runs / "none"), "--input", str(told_before)])


def test_predictions_go_through_a_pipe_and_leave_it_one(runs, rows, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    line = [str(runs / "classification"), "--input", str(rows), "--precision", "fp32"]
    predict.main([*line, "--output", str(tmp_path / "pipe")])
    reader.join()
    assert len(read[0].splitlines()) == 50 and (tmp_path / "pipe").is_fifo()
