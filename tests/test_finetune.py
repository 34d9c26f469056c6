"""Every task through the real thing: 2 ranks of DeepSpeed ZeRO-2, resumed to the last bit, exported, loaded again."""

import html
import io
import json
import re
import shutil
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from pretrain import dist, entry, finetune
from pretrain.checkpoint.load import Weights, checkpoint_of
from pretrain.checkpoint.manifest import committed
from pretrain.config import compose
from pretrain.config.schema import Config
from pretrain.examples.tables import read_table
from pretrain.hub import convert
from pretrain.plan import Plan, notes
from pretrain.predict import Predictor
from pretrain.report.page import MISTAKES as MISTAKES_SHOWN
from pretrain.report.page import _cut
from pretrain.report.theme import words
from pretrain.stream.objectives import IGNORE
from tests.journals import events, journal, rows_of
from tests.models import filled_model, write_weights
from tests.task_data import write_examples
from tools import generate

SETTINGS = (
    "train.precision=fp32", "train.global_batch_size=8", "train.micro_batch_size=2", "train.seq_len=64",
    "schedule=constant", "schedule.warmup_steps=0", "optim.lr=1e-3", "log=none", "deepspeed=zero2",
    "train.eval_every=4", "task.drop_bad=true",
)  # fmt: skip
CASES = {  # name, the task's or that of a variant: (the model it starts from, what transformers calls its export)
    "classification": ("bert", "BertForSequenceClassification"),
    "token_classification": ("modernbert", "ModernBertForTokenClassification"),
    "extractive_qa": ("bert", "BertForQuestionAnswering"),
    "embedding": ("bert", "BertModel"),
    "instruct": ("llama", "LlamaForCausalLM"),
    "language_model": ("llama", "LlamaForCausalLM"),
    "pairs": ("bert", "BertForSequenceClassification"),
    "scored": ("modernbert", "ModernBertModel"),
    "conversations": ("llama", "LlamaForCausalLM"),
    "masked": ("bert", "BertForMaskedLM"),
    "lora": ("llama", "LlamaForTokenClassification"),
}
VARIANTS = {"pairs": "classification", "scored": "embedding", "conversations": "instruct", "masked": "language_model",
            "lora": "token_classification"}  # fmt: skip
DATA = {"masked": "language_model", "lora": "token_classification"}
MORE = {
    "instruct": ("task.figures=translation", "task.generate_samples=3", "task.max_new_tokens=4"),
    "extractive_qa": ("task.stride=16",),
    "pairs": ("task.multi_label=true", "task.text_pair=code", "tuning=head", "optim.lr=1e-2"),
    "scored": ("tuning=last_layers", "tuning.last_layers=1"),
    "conversations": ("tuning=lora",),
    "masked": ("objective=masked_lm",),
    "lora": ("tuning=lora", "tuning.lora_rank=2"),
}
COMPILED = {"embedding": ("train.compile=blocks",)}  # on 1 rank
STEPS = {  # name: overrides of a run of which one step is taken
    "full": ("tuning.layer_lr_decay=0.5",),
    "head": ("tuning=head",),
    "last_layers": ("tuning=last_layers", "tuning.last_layers=1"),
    "lora": ("tuning=lora", "tuning.lora_on=attention"),
}
SMALL = ("model.vocab_size=512", "model.layers=2", "model.width=48", "model.heads=4", "model.max_positions=64",
         "model.ffn_width=96")  # fmt: skip
PRESETS = {"bert": "bert_base", "modernbert": "modernbert_10m", "llama": "llama_tiny"}


@pytest.fixture(scope="module")
def models(shards, tmp_path_factory):
    """Random models of three families as runs, with a real tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, preset in PRESETS.items():
        objective = "causal_lm" if name == "llama" else "masked_lm"
        model = compose.compose("pretrain", ["run.name=x", f"model={preset}", f"objective={objective}", *SMALL,
                                             "train.seq_len=64", "model.kv_heads=0"]).model  # fmt: skip
        write_weights(root / name, model)
        (root / name / "tokenizer.model").write_bytes((shards.parent / "tokenizer.model").read_bytes())
    return root


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def runs(models, examples, worker, tmp_path_factory):
    """Of each case: `CASE`, with dropout, in one go, `-resumed` in two; `-plain` on 2 ranks, `-alone` on 1. `over`
    ends when nothing gets better, and was started twice. `several` is judged by two sets, and resumed; `other` by the
    second alone. steps.json: what a step changes.
    """
    root = tmp_path_factory.mktemp("runs")

    def line(name: str, case: str, *more: str) -> list[str]:
        data = examples[DATA.get(case, case)]
        return [f"task={task_of(case)}", f"init={models / CASES[case][0]}", f"data.train={data}/train.jsonl",
                f"data.val={data}/val.jsonl", f"run.root={root}", f"run.name={name}", *SETTINGS, *MORE.get(case, ()),
                *more]  # fmt: skip

    saving = ("train.save_every=4", "model.dropout=0.1")
    two, one = [], []
    for case in CASES:
        two += [
            line(f"{case}-resumed", case, "train.steps=6", *saving),
            line(f"{case}-resumed", case, "train.steps=8", *saving),
            line(f"{case}-plain", case, "train.steps=3", "model.dropout=0"),
        ]
        alone = ("train.steps=3", "model.dropout=0", "train.micro_batch_size=8", *COMPILED.get(case, ()))
        one.append(line(f"{case}-alone", case, *alone))
    sets = examples["classification"]
    judged = (f"data.val=[own={sets}/val.jsonl,other={sets}/train.jsonl]", "tuning.best=val_other/loss")
    several = [line("several", "classification", f"train.steps={steps}", *saving, *judged) for steps in (4, 8)]
    two.append(line("other", "classification", "train.steps=8", *saving, f"data.val=other={sets}/train.jsonl"))
    over = ("train.epochs=0.75", "train.eval_every=1", "tuning.early_stopping=2", "optim.lr=1e-12")
    two += 2 * [line("over", "classification", *over)]
    alone = ("optim.eps=1e-20", "optim.weight_decay=0", "deepspeed=zero0", "model.dropout=0")
    steps = {name: line("unused", "classification", *alone, *more) for name, more in STEPS.items()}
    reported = [line(case, case, "train.steps=8", *saving) for case in CASES]
    for ranks, asked in ((2, {"runs": reported + several, "unreported": two, "steps": {}}),
                         (1, {"runs": [], "unreported": one, "steps": steps})):  # fmt: skip
        request = root / f"runs-{ranks}.json"
        request.write_text(json.dumps(asked))
        changes = worker("finetune_worker.py", request, ranks=ranks)
    (root / "steps.json").write_text(json.dumps(changes))
    return root


def task_of(case: str) -> str:
    return VARIANTS.get(case, case)


def figures(row: dict) -> dict:
    return {name: value for name, value in row.items() if name.startswith("val_")}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(runs, case):
    whole, resumed = journal(runs / case), journal(runs / f"{case}-resumed")
    for name in ("step", "tokens", "loss", "grad_norm", "lr", "batch_hash"):
        assert [row[name] for row in resumed] == [row[name] for row in whole], name
    assert figures(whole[7]) == figures(resumed[7]) != {}
    assert whole[-1]["loss"] < whole[0]["loss"]
    found = json.loads((runs / f"{case}-resumed" / "result.json").read_text())
    if found["step"] == 6:  # where it was first to end it was judged too, and was better
        assert found["best"] == resumed[5][found["metric"]] and "val_" not in "".join(whole[5])
    else:
        for name in ("result.json", "predictions.jsonl"):
            assert (runs / case / name).read_text() == (runs / f"{case}-resumed" / name).read_text(), name
    ours, again = (Weights(runs / name / "checkpoints" / "step-000000008") for name in (case, f"{case}-resumed"))
    for name in ours.shapes:
        assert torch.equal(ours.read(name), again.read(name)), name


@pytest.mark.parametrize("case", CASES)
def test_one_rank_learns_what_two_learn(runs, case):
    """Also the embedding, whose loss is between all pairs of the global batch, with compiled blocks on one."""
    assert bool(events(runs / f"{case}-alone", "compiled")) == (case in COMPILED)
    two, one = journal(runs / f"{case}-plain"), journal(runs / f"{case}-alone")
    assert [row["batch_hash"] for row in one] == [row["batch_hash"] for row in two]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], rel=1e-4), name
    assert figures(one[-1]) == pytest.approx(figures(two[-1]), rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_the_best_checkpoint_is_kept_and_used(runs, case):
    rows = [row for row in journal(runs / case) if figures(row)]
    result = json.loads((runs / case / "result.json").read_text())
    sign = -1 if result["metric"] in ("val_loss", "val_bits_per_byte") else 1
    best = max(rows, key=lambda row: (sign * row[result["metric"]], -row["step"]))
    assert result["step"] == best["step"] and result["figures"] == figures(best)
    assert checkpoint_of(runs / case).name == f"step-{best['step']:09d}"
    kept = {path.name for path in committed(runs / case / "checkpoints")}
    assert kept == {f"step-{best['step']:09d}", "step-000000008"}


def test_the_figures_of_each_of_several_sets_are_those_of_a_run_with_it_alone(runs):
    """To the last bit, with a name or without, over a resume."""
    both, own, other = (journal(runs / name) for name in ("several", "classification", "other"))
    for row, of_own, of_other in zip(both, own, other, strict=True):
        expected = {name.replace("val_", "val_own/"): value for name, value in figures(of_own).items()}
        assert figures(row) == expected | figures(of_other)
    assert [row["step"] for row in both if figures(row)] == [4, 8] and "val_other/macro_f1" in both[7]
    result, alone = (json.loads((runs / name / "result.json").read_text()) for name in ("several", "other"))
    best = min((row for row in both if figures(row)), key=lambda row: row["val_other/loss"])
    assert result["metric"] == "val_other/loss" and alone["metric"] == "val_other/macro_f1", "the first set's own"
    assert (result["step"], result["best"]) == (best["step"], best["val_other/loss"])
    assert checkpoint_of(runs / "several").name == f"step-{best['step']:09d}"


def test_examples_of_several_sets_are_told_apart_in_what_a_run_leaves(runs, examples):
    result = json.loads((runs / "several" / "result.json").read_text())
    said = rows_of(runs / "several" / "predictions.jsonl")
    for name, split in (("own", "val"), ("other", "train")):
        gold = [row["label"] for row in rows_of(examples["classification"] / f"{split}.jsonl")]
        mine = [row for row in said if row["set"] == name]
        assert [row["gold"] for row in mine] == [label for label in gold if label]
        right = sum(row["right"] for row in mine) / len(mine)
        assert result["figures"][f"val_{name}/accuracy"] == pytest.approx(right)
        assert sum(map(sum, result["sets"][name]["confusion"])) == len(mine)
    assert len(result["sets"]) == 2 and "confusion" not in result
    one = json.loads((runs / "other" / "result.json").read_text())
    assert "confusion" in one and "set" not in rows_of(runs / "other" / "predictions.jsonl")[0]


def test_other_sets_other_names_or_another_order_are_another_run(check, runs, examples):
    val, train = (examples["classification"] / f"{split}.jsonl" for split in ("val", "train"))
    line = ("run.name=several", f"run.root={runs}", "train.steps=8", "train.save_every=4", "model.dropout=0.1",
            "task.drop_bad=true", "tuning.best=val_other/loss")  # fmt: skip
    assert check("classification", *line, f"data.val=[own={val},other={train}]").changes == ()
    for other in (f"other={train}", f"[other={train},own={val}]", f"[own={train},other={train}]"):
        with pytest.raises(ValueError, match=r"another config \(data.val: \['own=.* -> .*; data .val.: "):
            check("classification", *line, f"data.val={other}")


def test_names_and_order_of_sets_identify_a_run_but_one_without_a_name_is_known_by_its_examples(check, examples):
    val, train = (examples["classification"] / f"{split}.jsonl" for split in ("val", "train"))
    sets = f"a={val}", f"b={val}", f"[{val}]", f"[a={val},b={train}]", f"[b={train},a={val}]", f"[a={train},b={val}]"
    plans = [check("classification", "task.drop_bad=true", f"data.val={each}") for each in (val, *sets)]
    assert len({plan.identity["val"] for plan in plans}) == 7
    assert plans[0].identity["val"] == plans[0].validation.examples.fingerprint
    figures = [plan.best_metric for plan in plans]
    assert figures == [f"val_{name}macro_f1" for name in ("", "a/", "b/", "val/", "a/", "b/", "a/")], "of the first set"


@pytest.mark.parametrize("case", CASES)
def test_it_is_exported_to_the_class_that_transformers_has_for_it(runs, case, tmp_path, transformers_here):
    proof = convert.export_hf(runs / case, tmp_path / "exported")
    assert proof["class"] == CASES[case][1] and proof["max_difference"] <= 1e-4
    ours, again = Weights(runs / case), convert.open_model(tmp_path / "exported")
    for name in again.shapes:
        assert torch.equal(again.read(name), ours.read(name)), name
    if task_of(case).endswith("classification"):
        theirs = json.loads((tmp_path / "exported" / "config.json").read_text())["id2label"]
        assert list(theirs.values()) == json.loads((runs / case / "task.json").read_text())["labels"]


def test_transformers_predicts_what_the_run_predicts_from_the_texts_themselves(
    runs, examples, tmp_path, transformers_here
):
    """Tokenizer, special ids, padding and weights together: what a user of the export gets."""
    convert.export_hf(runs / "classification", tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    table = read_table(str(examples["classification"] / "val.jsonl"), "--input")
    told = Predictor(runs / "classification", "fp32").outputs(table, 5, lambda count: None)
    texts = [row["text"] for row in table.rows]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")).logits
    for row, theirs in zip(told, logits.softmax(1).tolist(), strict=True):
        assert list(row["scores"].values()) == pytest.approx(theirs, abs=1e-5)
        assert row["label"] == model.config.id2label[int(np.argmax(theirs))]


@pytest.mark.parametrize("case", CASES)
def test_the_run_explains_itself(runs, case):
    folder = runs / case
    settings: Config = compose.read(folder / "config.yaml")
    assert settings.task.name == task_of(case) == json.loads((folder / "task.json").read_text())["name"]
    (source,) = events(folder, "source")
    assert source["examples"] > 0 and source["epochs"] > 0
    page, result = (folder / "report.html").read_text(), json.loads((folder / "result.json").read_text())
    assert f"The best evaluation by {words(result['metric'].removeprefix('val_'))}: step {result['step']}" in page
    wrong = [row for row in rows_of(folder / "predictions.jsonl") if row.get("right") is False]
    is_judged = case not in ("language_model", "masked", "scored", "conversations")
    assert ("What it got wrong" in page) == bool(wrong) == is_judged
    for row in wrong[:MISTAKES_SHOWN]:
        for name in ("gold", "prediction"):
            assert f">{html.escape(_cut(row[name]))}" in page
    if case == "classification":
        confusion = page.partition("Labels (rows) and what was predicted")[2].partition("</table>")[0]
        counts = [int(count) for count in re.findall(r">(\d+)<", confusion)]
        assert counts == [count for line in result["confusion"] for count in line] and sum(counts) == 23


@pytest.fixture
def check(models, examples, tmp_path, monkeypatch):
    """Judge a command line as `--check` does; examples may be given as rows."""

    def run(task: str, *overrides: str, train: list[dict] | None = None, val: list[dict] | None = None) -> Plan:
        files = {"train": examples[task] / "train.jsonl", "val": examples[task] / "val.jsonl"}
        for split, rows in (("train", train), ("val", val)):
            if rows is not None:
                files[split] = tmp_path / f"{split}.jsonl"
                files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = [f"task={task}", f"init={models / CASES[task][0]}", "run.name=x", f"run.root={tmp_path}", *SETTINGS[:-1],
                *MORE.get(task, ()), *(f"data.{split}={file}" for split, file in files.items())]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["finetune", *line, *overrides])
        return finetune.make_plan(compose.from_command_line("finetune", entry.model_of), dist.ALONE)

    return run


@pytest.mark.parametrize("case", ["classification", "token_classification", "extractive_qa", "instruct"])
def test_a_batch_of_a_run_costs_in_transformers_what_it_costs_here(check, runs, tmp_path, case, transformers_here):
    """The task's own batch and loss, from the texts on; the gradient of the embeddings hears of all that is above."""
    convert.export_hf(runs / case, tmp_path / "exported")
    line = (f"init={runs / case}", "data.packing=none", "task.drop_bad=true")
    plan, count = check(case, *line), 1 if case == "extractive_qa" else 4
    batch = {name: torch.from_numpy(part) for name, part in plan.collate(plan.stream.rows(np.arange(count))).items()}
    labels, ours = batch["labels"], convert.load_model(runs / case).requires_grad_()
    loss = plan.loss_rows(ours, **batch).sum() / (labels != IGNORE).sum()
    theirs = getattr(transformers, CASES[case][1]).from_pretrained(tmp_path / "exported").eval()
    inputs = {"input_ids": batch["inputs"]}
    if "segments" in batch:
        inputs["token_type_ids"] = batch["segments"].long()
    if case == "instruct":  # what follows each token is its label here already; what looks back needs no mask
        asked = {"labels": labels, "shift_labels": labels}
    elif case == "extractive_qa":  # one row: in a batch, padding takes part in their softmax
        asked = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    else:
        asked = {"labels": labels, "attention_mask": batch["documents"] + 1}
    expected = theirs(**inputs, **asked).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    loss.backward()
    expected.backward()
    found, right = ours.trunk.embedding.weight.grad, theirs.get_input_embeddings().weight.grad
    assert torch.allclose(found[: len(right)], right[: len(found)], rtol=0, atol=1e-4 * float(right.abs().max()))


GOOD = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
ASKED = {"id": "1", "question": "Who?", "context": "It was Ann.", "answers": {"text": ["Ann"], "answer_start": [7]}}
MISTAKES = {  # what is wrong: (task, overrides, train, val, what the message says)
    "a missing column": ("classification", ["task.label=lable"], GOOD, None, r"train.jsonl has no column 'lable' \(did "
                         r"you mean 'label'\?\): there is text, label; .* task.label="),
    "an unknown label": ("classification", [], GOOD, [*GOOD, {"text": "c", "label": "z"}],
                         r"val.jsonl, line 3: the label 'z' is none of x, y.* task.drop_bad=true"),
    "one label": ("classification", [], GOOD[:1], None, r"only the label x"),
    "an answer that is not in its context": (
        "extractive_qa", [], [ASKED, ASKED | {"answers": {"text": ["Bob"], "answer_start": [7]}}], None,
        r"1 examples of .*train.jsonl cannot be learnt from: .*line 2: .*Bob.* task.drop_bad=true"),
    "an empty response": ("instruct", [], [{"prompt": "a", "response": ""}], None, r"line 1: .*empty.*"),
    "a conversation longer than the model": (
        "instruct", [], [{"prompt": "a", "response": "word " * 99}], None,
        r"line 1: the conversation has \d+ tokens, train.seq_len=64"),
    "tags and words that do not fit": ("token_classification", [], [{"tokens": ["a", "b"], "tags": ["B-X"]}], None,
                                       r"train.jsonl, line 1: .*2 words.*1 tag"),
    "no such figure": ("classification", ["tuning.best=val_bleu"], None, None,
                       r"val_bleu is no figure of .*val_macro_f1"),
    "a figure of no set": (
        "classification", ["data.val=[a=DATA/val.jsonl,b=DATA/train.jsonl]", "tuning.best=val_macro_f1"], None, None,
        r"val_macro_f1 is no figure of task=classification: take one of val_a/loss, val_a/macro_f1, val_a/accuracy, "
        r"val_b/loss, val_b/macro_f1, val_b/accuracy$"),
    "a head alone that is none": ("language_model", ["tuning=head"], None, None, r"tuning=head: .*embedding"),
    "a text model for responses": ("instruct", ["init=null", "model=modernbert_10m", "data.tokenizer=TOKENIZER"], None,
                                   None, r"writes no responses"),
    "more layers than there are": ("classification", ["tuning=last_layers", "tuning.last_layers=9"], None, None,
                                   r"last_layers=9: the model has 2"),
    "a pooling where none is": ("token_classification", ["task.pooling=mean"], None, None,
                                r"task.pooling .* is for task=classification or embedding, not token_classification"),
    "weights that no one asks for": ("token_classification", ["task.class_weights=balanced"], None, None,
                                     r"task.class_weights .* is for task=classification, not token_classification"),
    "a pooling that sees one token": ("embedding", ["init=null", "data.tokenizer=TOKENIZER", "model=llama_tiny",
                                                    "task.pooling=first"], None, None, r"the first token sees no"),
    "a rank without LoRA": ("classification", ["tuning.lora_rank=64"], None, None,
                            r"tuning.lora_rank .* is for tuning=lora, not full"),
    "no matrix that learns": ("classification", ["optim=muon", "tuning=head"], None, None,
                              r"optim=muon is for the matrices of the blocks, and with tuning=head none of them"),
    "nothing to keep": ("classification", ["init=null", "data.tokenizer=TOKENIZER", "model=modernbert_10m",
                                           "tuning=lora"], None, None, r"tuning=lora keeps .* init="),
    "phases": ("classification", ["train.phases=[{from_step: 1}]"], None, None, r"train.phases .* shards"),
    "one document": ("embedding", [], [{"query": q, "document": "same"} for q in "ab"], None,
                     r"has one document .document. in all pairs"),
    "a pair alone": ("embedding", ["train.global_batch_size=1", "train.micro_batch_size=1"], None, None,
                     r"train.global_batch_size=1 leaves a pair alone"),
    "no room for a token": ("classification", ["train.seq_len=2"], None, None,
                            r"train.seq_len=2 has no room for 2 special tokens and 1 of text: take 3"),
    "no room for a token of a pair": ("classification", ["train.seq_len=4", "task.text_pair=label"], None, None,
                                      r"train.seq_len=4 has no room for 3 special tokens and 2 of text: take 5"),
    "too long": ("classification", ["train.seq_len=128"], None, None, r"train.seq_len=128 .* model.max_positions=64"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_anything_starts(check, models, examples, tmp_path, mistake):
    task, overrides, train, val, said = MISTAKES[mistake]
    tokenizer, data = models / "bert" / "tokenizer.model", examples[task]
    overrides = [each.replace("TOKENIZER", str(tokenizer)).replace("DATA", str(data)) for each in overrides]
    with pytest.raises(ValueError, match=said):
        check(task, *overrides, train=train, val=val)
    assert not (tmp_path / "x").exists()


def test_bad_examples_are_left_out_counted_and_named_when_that_is_wanted(check, capfd):
    rows = [ASKED, ASKED | {"answers": {"text": ["Bob"], "answer_start": [7]}}]
    plan = check("extractive_qa", "task.drop_bad=true", train=rows)
    assert len(plan.stream.examples) == 1 and len(plan.stream.examples.dropped) == 1
    assert "1 of 2 examples are left out, the first: " in capfd.readouterr().err
    assert plan.stream.summary(1)[0]["dropped"] == 1


def test_a_head_of_another_shape_begins_anew_and_is_listed(check, runs):
    first = check("classification", train=GOOD, val=GOOD)
    assert list(first.new_parameters) == ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]
    again = check("classification", f"init={runs / 'classification'}")
    assert again.new_parameters == {}, "the head it has fits"
    other = check("classification", f"init={runs / 'classification'}", train=GOOD, val=GOOD)
    assert list(other.new_parameters) == ["head.weight", "head.bias"]


def test_a_head_is_kept_for_fewer_labels_or_in_another_order(check, runs, models, tmp_path, capfd):
    labels = json.loads((runs / "classification" / "task.json").read_text())["labels"]
    few = [{"text": str(number), "label": label} for number, label in enumerate(labels[::2])]
    plan = check("classification", f"init={runs / 'classification'}", train=few, val=few)
    assert plan.config.task.labels == labels and plan.new_parameters == {} and len(labels) > len(few)
    assert f"the head keeps labels that data.train has not: {', '.join(labels[1::2])} (" in capfd.readouterr().err
    turned = tmp_path / "turned"
    shutil.copytree(runs / "classification", turned)
    described = json.loads((turned / "task.json").read_text())
    (turned / "task.json").write_text(json.dumps(described | {"labels": labels[::-1]}))
    plan = check("classification", f"init={turned}")
    assert plan.config.task.labels == labels[::-1] and plan.new_parameters == {}


def test_what_changed_of_the_held_out_examples_is_named(check, runs, tmp_path):
    shutil.copytree(runs / "classification", tmp_path / "x")
    line = ("train.steps=8", "train.save_every=4", "model.dropout=0.1", "task.drop_bad=true", "train.eval_samples=3")
    with pytest.raises(ValueError, match=r"another config .train.eval_samples: 0 -> 3; data .val.: "):
        check("classification", *line)


def test_examples_that_are_held_out_and_trained_on_are_said(check, tmp_path):
    assert check("classification").trains_on_held_out == ()
    assert check("classification", train=GOOD, val=GOOD).trains_on_held_out == (f"{tmp_path}/val.jsonl",)
    both = f"data.val=[new={tmp_path}/new.jsonl,known={tmp_path}/val.jsonl]"
    (tmp_path / "new.jsonl").write_text((tmp_path / "val.jsonl").read_text().replace('"a"', '"c"'))
    plan = check("classification", both, train=GOOD)
    said = f"data.val=known={tmp_path}/val.jsonl is trained on too: its figures are not of held-out text"
    assert notes(plan) == [said]


def test_masks_on_a_gpu_are_said_with_their_reason(check):
    plan, gpu = check("classification"), torch.device("cuda")
    near = replace(plan, model=replace(plan.model, sliding_window=8, head_width=16, dropout=0.0))
    (said,) = notes(near, gpu, "fp32")
    assert said.startswith("attention takes memory and time for all pairs of positions of a row") and said.endswith(
        ": cuda has no kernel without them for float32"
    )
    whole = replace(plan.config, data=replace(plan.config.data, document_mask=False))
    far = replace(near, config=whole, model=replace(near.model, sliding_window=0))
    assert notes(near, gpu, "bf16") == notes(far, gpu, "fp32") == notes(near, torch.device("cpu"), "fp32") == []


def test_another_length_is_named_and_not_the_digest_of_its_examples(check, runs):
    with pytest.raises(ValueError) as refused:
        check("classification", "run.name=classification", f"run.root={runs}", "train.steps=8", "train.seq_len=32")
    assert "train.seq_len: 64 -> 32" in str(refused.value) and "data (" not in str(refused.value)


def test_what_an_experiment_says_of_the_model_holds_for_init_too(check):
    for more, expected in ([], (0.1, "sdpa")), (["experiment=sentiment"], (0.0, "plain")), (
        ["experiment=sentiment", "model.dropout=0.3"], (0.3, "plain"),
    ):  # fmt: skip
        model = check("classification", *more).model
        assert (model.dropout, model.attention) == expected


def test_the_pooling_of_a_head_can_be_chosen(check):
    for task, usual in (("classification", "pooler"), ("embedding", "mean")):
        found = [check(task, *more).model.pooling for more in ([], ["task.pooling=last"])]
        assert found == [usual, "last"]


def test_balanced_weights_make_rare_labels_count_as_much(check):
    rows = GOOD + [{"text": "c", "label": "x"}] * 2
    plan = check("classification", "task.class_weights=balanced", train=rows, val=GOOD)
    batch = {name: torch.from_numpy(part) for name, part in plan.collate(plan.stream.rows(np.arange(4))).items()}
    model = filled_model(plan.model).eval()
    weighted = plan.loss_rows(model, **batch)
    plain = check("classification", train=rows, val=GOOD).loss_rows(model, **batch)
    expected = torch.where(batch["labels"] == 0, 4 / (2 * 3), 4 / (2 * 1))
    torch.testing.assert_close(weighted / plain, expected)


TOP = {"head.weight", "head.bias", "pooler.weight", "pooler.bias"}
ATTENTION = {f"attention.{matrix}" for matrix in ("q", "k", "v", "out")}
BLOCK = {f"{part}.{kind}" for part in (*ATTENTION, "ffn.up", "ffn.down", "attention_norm", "ffn_norm")
         for kind in ("weight", "bias")}  # fmt: skip
TABLES = {"trunk.embedding.weight", "trunk.positions.weight", "trunk.segments.weight"}
EMBEDDED = {"trunk.embedding_norm.weight", "trunk.embedding_norm.bias"}
MOVED = {  # of each way to tune: {share of the learning rate: what moves so far in the first step}
    "full": {1.0: TOP, 0.5: {f"trunk.blocks.1.{name}" for name in BLOCK},
             0.25: {f"trunk.blocks.0.{name}" for name in BLOCK}, 0.125: TABLES | EMBEDDED},
    "head": {1.0: TOP},
    "last_layers": {1.0: TOP | {f"trunk.blocks.1.{name}" for name in BLOCK}},
    "lora": {1.0: TOP | {f"trunk.blocks.{n}.{name}.lora_b" for n in (0, 1) for name in ATTENTION}},
}  # fmt: skip


@pytest.mark.parametrize("method", STEPS)
def test_a_step_moves_what_learns_by_its_learning_rate(runs, method):
    """AdamW's first step is lr x sign(gradient). Of LoRA's two matrices A has no gradient while B is 0."""
    changes = json.loads((runs / "steps.json").read_text())[method]
    found: dict[float, set[str]] = {}
    for name, change in changes.items():
        if change:
            share = round(change / 1e-3, 3)
            found.setdefault(share, set()).add(name)
    assert found == MOVED[method]
    assert len(changes) > len(TOP) + 2 * len(BLOCK)


def test_a_run_ends_when_nothing_gets_better_and_stays_ended(runs):
    """9 steps are 0.75 epochs of 96 examples; the first of three equal evaluations is the best."""
    folder = runs / "over"
    assert [row["step"] for row in journal(folder)] == [1, 2, 3]
    assert len({row["val_macro_f1"] for row in journal(folder)}) == 1
    assert compose.read(folder / "config.yaml").train.steps == 9
    reason = "no better val_macro_f1 in 2 evaluations"
    assert [(event["reason"], event["step"]) for event in events(folder, "stopped")] == 2 * [(reason, 3)]
    assert [event["step"] for event in events(folder, "resume")] == [3]
    assert checkpoint_of(folder).name == "step-000000001"
    assert json.loads((folder / "result.json").read_text())["step"] == 1


@pytest.mark.parametrize("case, key", [("classification", "label"), ("pairs", "labels")])
def test_predictions_are_those_of_the_best_checkpoint(runs, examples, case, key):
    folder, table = runs / case, read_table(str(examples[case] / "val.jsonl"), "--input")
    said, done = rows_of(folder / "predictions.jsonl"), []
    told = Predictor(folder, "fp32").outputs(table, 5, done.append)
    assert sum(done) == len(table.rows) and max(done) == 5
    for row, written, predicted in zip(table.rows, said, told, strict=True):
        gold = sorted(row["label"]) if key == "labels" else row["label"]
        assert (written["text"], written["gold"], written["prediction"]) == (row["text"], gold, predicted[key])
        assert written["right"] == (written["gold"] == written["prediction"])
    if case == "classification":
        share = sum(row["right"] for row in said) / len(said)
        assert json.loads((folder / "result.json").read_text())["figures"]["val_accuracy"] == pytest.approx(share)


def test_chat_with_a_tuned_run_or_its_export_says_what_predict_does(runs, tmp_path, capsys, transformers_here):
    """With weights that say more than eight steps teach."""
    run = tmp_path / "run"
    write_weights(run, Weights(runs / "conversations").config, 5, seed=38)
    for name in ("config.yaml", "task.json", "tokenizer.model"):
        shutil.copy(runs / "conversations" / name, run)
    convert.export_hf(run, tmp_path / "exported")
    asked = tmp_path / "asked.jsonl"
    texts = ["What?", "Return a list", "import os", "Create a new instance of the class.", "0 1 2 3 4 5 6 7"]
    rows = [{"prompt": text, "messages": [{"role": "user", "content": text}]} for text in texts]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictor = Predictor(run, "fp32", ["task.max_new_tokens=9"])
    answers = predictor.outputs(read_table(str(asked), "--input"), 3, lambda count: None)
    told = [row["response"].strip() for row in answers]
    assert len(set(told)) > 2
    generate.main([str(runs / "instruct"), "--chat", "--prompt", "x", "--max-tokens", "1"])
    assert "was tuned on prompts as they are" in capsys.readouterr().err
    # Of bytes that are no text the tokenizers library makes other signs, and also of the whole ones beside them.
    plain = [number for number, text in enumerate(told) if "\ufffd" not in text]
    assert len(plain) > 1
    for model, compared in ((run, range(len(told))), (tmp_path / "exported", plain)):
        line = [str(model), "--chat", "--temperature", "0", "--max-tokens", "9"]
        generate.main([*line, "--input", str(asked), "--text-key", "prompt"])
        found = [json.loads(row)["text"] for row in capsys.readouterr().out.splitlines()]
        assert [found[number] for number in compared] == [told[number] for number in compared]
        generate.main([*line, "--prompt", texts[plain[0]]])
        out, err = capsys.readouterr()
        assert out.strip() == told[plain[0]] and "was tuned on" not in err


def test_a_tar_of_examples_is_the_same_data(check, examples, tmp_path):
    """The run of a WebDataset tar is the run of the rows in it: its data has the same fingerprint."""
    lines = (examples["classification"] / "train.jsonl").read_bytes().splitlines()
    for number, part in enumerate((lines[:50], lines[50:])):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
            for place, line in enumerate(part):
                member = tarfile.TarInfo(f"{place:05d}.json")
                member.size = len(line)
                tar.addfile(member, io.BytesIO(line))
    tars = f"data.train=[{tmp_path}/train-0.tar,{tmp_path}/train-1.tar]"
    assert check("classification", tars).identity == check("classification").identity
