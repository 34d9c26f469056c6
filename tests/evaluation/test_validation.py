"""Validation against a plain computation, of causal and masked models, and tools/evaluate.py with its baselines."""

import gzip
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain import dist
from pretrain import train as train_module
from pretrain.checkpoint.load import Weights, load_model
from pretrain.config import compose
from pretrain.config.schema import to_yaml
from pretrain.evaluation.validation import Best, Several, together
from pretrain.model.losses import cross_entropy_rows
from pretrain.report.page import write_report
from pretrain.shards import manifest as manifests
from pretrain.stream.mixture import Phase
from pretrain.stream.objectives import IGNORE, causal_lm, make_objective
from pretrain.stream.stream import Stream
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.journals import journal, rows_of
from tests.models import filled_model
from tools import evaluate as tool_module
from tools.report import headline


@pytest.fixture(scope="module")
def held_out(shards):
    return Stream.in_order(manifests.load(shards / "val"), 32)


def plain_bits(model, tokenizer, stream, windows):
    """(nats a token, bits a byte of the target text), one window at a time."""
    nats = targets = text_bytes = 0
    lengths = tokenizer.byte_lengths()
    for window in windows:
        inputs, labels = causal_lm(stream.rows(np.array([window])))
        nats += float(cross_entropy_rows(model(torch.from_numpy(inputs)), torch.from_numpy(labels)))
        counted = labels[labels != IGNORE]
        targets += len(counted)
        text_bytes += int(lengths[counted].sum())
    return nats / targets, nats / math.log(2) / text_bytes


def test_the_loops_validation_is_the_plain_computation_on_windows_spread_evenly(undisturbed, held_out):
    model, tokenizer = load_model(undisturbed), load_tokenizer(undisturbed)
    last = journal(undisturbed)[-1]
    windows = [i * held_out.epoch_samples // 13 for i in range(13)]
    loss, bits = plain_bits(model, tokenizer, held_out, windows)
    assert last["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_on_one_rank_too_each_of_several_sets_is_judged_as_it_would_be_alone(undisturbed, shards):
    model, given = load_model(undisturbed), compose.read(undisturbed / "config.yaml")

    def figures(val) -> dict[str, float]:
        cfg = replace(given, data=replace(given.data, val=val), run=replace(given.run, name="unused"))

        @torch.no_grad()
        def evaluate(function, **batch):
            return function(model, **batch).double()

        return train_module.make_plan(cfg, dist.ALONE).validation.run(evaluate, dist.ALONE, torch.device("cpu"))

    places = {"own": str(shards / "val"), "rest": str(shards / "train")}
    alone = {name: figures(place) for name, place in places.items()}
    assert set(alone["own"]) == {"val_loss", "val_bits_per_byte"} and alone["own"] != alone["rest"]
    expected = {f"val_{name}/{figure[4:]}": value for name, found in alone.items() for figure, value in found.items()}
    assert figures([f"{name}={place}" for name, place in places.items()]) == expected
    assert figures([places["own"]]) == {f"val_val/{figure[4:]}": value for figure, value in alone["own"].items()}
    assert figures(f"own={places['own']}") == {name: expected[name] for name in expected if "own" in name}


def test_of_several_sets_the_tool_takes_the_first_or_the_one_that_is_named(undisturbed, shards, tmp_path, capsys):
    run, rest = shutil.copytree(undisturbed, tmp_path / "run"), shards / "train"
    cfg = compose.read(run / "config.yaml")
    data = replace(cfg.data, val=[f"own={shards}", f"rest={rest}"])
    (run / "config.yaml").write_text(to_yaml(replace(cfg, data=data)))

    def evaluated(*arguments: str) -> tuple[dict, str, str]:
        tool_module.main([str(run), "--precision", "fp32", *arguments])
        return json.loads((run / "evaluation.json").read_text()), *capsys.readouterr()

    found, out, err = evaluated()
    known = f"{run} has the held-out sets own={shards}, rest={rest}: evaluating own, --data NAME takes another\n"
    assert err.startswith(known) and "bytes of held-out text (own)\n" in out and found["set"] == "own"
    assert f"{found['val_bits_per_byte']:.3f} bits per byte on held-out text (own) (unigram" in headline(run)
    named, out, err = evaluated("--data", "rest")
    assert (named["set"], named["val_loss"] != found["val_loss"]) == ("rest", True)
    assert "bytes of text that is trained on too (rest)\n" in out and "has the held-out sets" not in err
    placed, out, _ = evaluated("--data", str(rest))
    assert placed == {name: value for name, value in named.items() if name != "set"} and "trained on too\n" in out
    assert "bits per byte on text that is trained on too (unigram" in headline(run)
    assert "Evaluation on all text that is trained on too<" in write_report(run).read_text()
    suite, out, _ = evaluated("--suite", "--limit", "20")
    assert suite["suite"]["set"] == "own" and f"{run}, suite (own)\n" in out


def test_the_tool_evaluates_all_windows_beside_its_baselines(tool, undisturbed, held_out):
    said = tool("evaluate.py", undisturbed, "--precision", "fp32").stdout
    result = json.loads((undisturbed / "evaluation.json").read_text())
    model, tokenizer = load_model(undisturbed), load_tokenizer(undisturbed)
    loss, bits = plain_bits(model, tokenizer, held_out, range(held_out.epoch_samples))
    assert result["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    ids = np.concatenate(list(tool_module.parts(held_out)))
    text = tokenizer.decode(ids.tolist()).encode()
    assert result["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert result["xz_bits_per_byte"] < result["gzip_bits_per_byte"] < 8
    for key in ("val", "unigram", "gzip", "xz"):
        assert f"{result[key + '_bits_per_byte']:.3f}" in said
    assert result["step"] == 24 and result["text_bytes"] == len(text)
    assert f"{result['val_bits_per_byte']:.3f} bits per byte on held-out text" in tool("report.py", undisturbed).stdout
    assert "Evaluation on all held-out text" in (undisturbed / "report.html").read_text()


def test_unigram_bits_are_the_entropy_of_known_frequencies():
    training = np.array([1, 3])  # with one added to each count: 2/6 and 4/6
    expected = -math.log2(2 / 6) - math.log2(4 / 6)
    assert tool_module.unigram_bits(training, np.array([0, 1])) == pytest.approx(expected)


def test_without_validation_data_the_tool_asks_for_it(tool, train):
    train(1, "run.name=blind", "data.val=null", "train.steps=1")
    done = tool("evaluate.py", train.root / "blind", check=False)
    assert done.returncode == 2 and "--data" in done.stderr
    assert dist.from_environment() == dist.ALONE


# --- a masked model ---


class Told:
    """What an evaluation leaves for the run's folder."""

    details, facts = [{"prediction": "ä", "right": True}], {"confusion": [[1]]}


def rows_with(metric: str, *values: float | None) -> list[dict]:
    return [{"step": step, metric: value} for step, value in enumerate(values, 1)]


@pytest.mark.parametrize("metric, values, steps", [
    ("val_macro_f1", (0.2, 0.4, 0.4, 0.3, 0.5), [1, 2, 5]),
    ("val_loss", (3.0, 2.0, 2.0, 2.5, 1.0), [1, 2, 5]),
    ("val_web/macro_f1", (0.2, 0.4, 0.4, 0.3, 0.5), [1, 2, 5]),
    ("val_web_f1/loss", (3.0, 2.0, 2.0, 2.5, 1.0), [1, 2, 5]),
    ("val_bits_per_byte", (math.nan, None, math.inf, 2.5, 2.4), [4, 5]),
])  # fmt: skip
def test_the_best_evaluation_is_the_first_of_the_best_ones(metric, values, steps, tmp_path):
    best = Best(metric, 0, [], tmp_path)
    assert best.step is None and best.is_over is None
    rows = rows_with(metric, *values)
    assert [row["step"] for row in rows if best.offer(row, Told)] == steps
    assert best.step == steps[-1] and best.is_over is None, "without patience it is never over"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"metric": metric, "best": values[-1], "step": 5, "figures": {metric: values[-1]},
                      "confusion": [[1]]}  # fmt: skip
    assert rows_of(tmp_path / "predictions.jsonl") == Told.details
    assert Best(metric, 0, rows, None).row == rows[-1], "the journal alone tells it again"


def test_the_best_evaluation_of_several_sets_is_told_set_by_set():
    row = {"step": 4, "val_news/loss": 2.25, "val_news/macro_f1": None, "val_my_web/macro_f1": 0.5}
    told = Best("val_my_web/macro_f1", 0, [row], None).told()
    assert told == "best my_web macro_f1 at step 4 (news loss 2.2500, my_web macro_f1 0.5000)"


def test_what_is_told_of_examples_and_sets_is_told_with_their_set_where_there_are_several():
    facts, rows = Told.facts, Told.details
    both = Several({"news": Told, "web": Told})
    assert both.details == [{"set": "news", **rows[0]}, {"set": "web", **rows[0]}]
    assert both.facts == {"sets": {"news": facts, "web": facts}}
    one = together({"news": Told})
    assert (one.details, one.facts) == (rows, facts)
    assert together({}) is None and together({"": Told}) is Told


def test_patience_ends_a_run_and_counts_from_the_last_better_evaluation():
    rows = rows_with("val_f1", 0.1, 0.1, 0.2, 0.1, None, 0.2, 0.3)
    over = [bool(Best("val_f1", 3, rows[:count], None).is_over) for count in range(len(rows) + 1)]
    assert over == [False] * 6 + [True, False]
    best = Best("val_f1", 3, rows[:5], None)
    assert not best.offer(rows[5], Told) and best.is_over == "no better val_f1 in 3 evaluations"


def test_a_run_that_went_back_before_its_best_evaluation_forgets_it(tmp_path):
    rows = rows_with("val_f1", 0.1, 0.3)
    for row in rows:
        Best("val_f1", 0, rows[: row["step"] - 1], tmp_path).offer(row, Told)
    Best("val_f1", 0, rows, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 2, "nothing was undone"
    Best("val_f1", 0, rows[:1], tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 1
    assert not (tmp_path / "predictions.jsonl").exists(), "they were those of step 2"
    Best("val_f1", 0, [], tmp_path)
    assert not (tmp_path / "result.json").exists()


MASKED = ("objective=masked_lm", "objective.whole_word=true", "objective.z_loss=1e-3", "model.causal=false",
          "train.steps=12", "train.eval_every=6", "deepspeed=zero3")  # fmt: skip


@pytest.fixture(scope="module")
def masked(train):
    """The folder of a finished run of masked_lm on 2 ranks."""
    train(2, "run.name=masked", *MASKED)
    return train.root / "masked"


def plain_scores(folder, stream, windows):
    """(nats a masked token, share of them right, the masked tokens), from the logits of all positions."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    objective = make_objective(compose.read(folder / "config.yaml").objective, tokenizer, 0)
    nats, hits, masked = 0.0, 0, []
    for some in np.array_split(np.array(windows), max(1, len(windows) // 16)):
        inputs, labels = objective(stream.rows(some))
        logits, labels = model(torch.from_numpy(inputs)).detach().double(), torch.from_numpy(labels)
        at = labels != IGNORE
        nats += float(torch.nn.functional.cross_entropy(logits[at], labels[at], reduction="sum"))
        hits += int((logits.argmax(-1) == labels)[at].sum())
        masked += labels[at].tolist()
    return nats / len(masked), hits / len(masked), masked


def test_a_masked_model_is_validated_on_the_same_masks_each_time(masked, held_out):
    last = journal(masked)[-1]
    windows = [i * held_out.epoch_samples // 13 for i in range(13)]
    loss, accuracy, tokens = plain_scores(masked, held_out, windows)
    assert last["val_loss"] == pytest.approx(loss, rel=1e-5) and last["val_accuracy"] == pytest.approx(accuracy)
    assert len(tokens) == pytest.approx(0.15 * 13 * 32, rel=0.5) and "val_bits_per_byte" not in last


def test_masked_training_is_the_same_for_any_number_of_ranks(train, masked):
    """With the z-loss in the training loss, and never in the validation's."""
    train(1, "run.name=masked-alone", *MASKED, "deepspeed=zero1")
    for row, alone in zip(journal(masked), journal(train.root / "masked-alone"), strict=True):
        assert row["batch_hash"] == alone["batch_hash"]
        for key in ("loss", "grad_norm", "val_loss", "val_accuracy"):
            assert row.get(key) == (pytest.approx(alone[key], rel=1e-3) if key in alone else None), key
    config = replace(Weights(masked).config, attention="plain")
    model = filled_model(config)
    stream = Stream([manifests.load(train.shards / "train")], [Phase(0, 32, 8, (1.0,))], seed=0)
    objective = make_objective(compose.read(masked / "config.yaml").objective, load_tokenizer(masked), 0)
    inputs, labels = map(torch.from_numpy, objective(stream.rows(stream.numbers(0))))
    with torch.no_grad():
        logits = model(inputs)[labels != IGNORE].double()
    expected = torch.nn.functional.cross_entropy(logits, labels[labels != IGNORE])
    z_loss = 1e-3 * logits.logsumexp(1).square().mean()
    assert journal(masked)[0]["loss"] == pytest.approx(float(expected + z_loss), rel=1e-5)


def test_the_tool_compares_a_masked_model_with_the_unigram_model(tool, masked, train, held_out):
    said = tool("evaluate.py", masked, "--precision", "fp32").stdout
    result = json.loads((masked / "evaluation.json").read_text())
    loss, accuracy, tokens = plain_scores(masked, held_out, range(held_out.epoch_samples))
    assert result["val_loss"] == pytest.approx(loss, rel=1e-5) and result["val_accuracy"] == pytest.approx(accuracy)
    assert result["targets"] == len(tokens) and result["step"] == 12 and result["windows"] == held_out.epoch_samples
    training = Stream.in_order(manifests.load(train.shards / "train"), 32)
    trained_on = training.rows(np.arange(training.epoch_samples)).tokens[:, :-1]
    counts = np.bincount(trained_on.ravel(), minlength=512) + 1.0
    counts[:7] = 0  # special tokens
    expected = -np.log(counts[tokens] / counts.sum()).mean()
    assert result["unigram_loss"] == pytest.approx(expected)
    assert f"{loss:.3f} nats a token   (perplexity {math.exp(loss):.1f}, {accuracy:.1%} right)" in said
    assert f"unigram    {expected:8.3f}" in said and "gzip" not in said and "bits" not in said
    headline = f"{loss:.3f} nats a token on held-out text (unigram {expected:.3f}, {accuracy:.1%} of masked"
    assert headline in tool("report.py", masked).stdout
    page = (masked / "report.html").read_text()
    assert "Validation accuracy" in page and "of masked tokens, best" in page and "unigram loss" in page
    assert not (masked / "samples.jsonl").exists(), "it can not write"
