"""A Hugging Face folder starts a run with what transformers would load of it; what begins anew is said, and why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pretrain import dist, entry, finetune
from pretrain.checkpoint.load import Weights
from pretrain.config import compose
from pretrain.hub import convert
from pretrain.plan import Plan, reasons
from tests import forked
from tests.journals import events
from tests.task_helpers import word_pieces

WORDS = [f"w{number}" for number in range(28)]
SHAPE = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 34, "pad_token_id": 1}  # fmt: skip
LINE = ("run.name=x", "log=none", "train.seq_len=16", "train.precision=fp32", "train.global_batch_size=2",
        "train.micro_batch_size=2", "deepspeed=zero0")  # fmt: skip
NONE = "the model has none of this kind"


def saved(folder: Path, kind: str, **more) -> Path:
    """A tiny random model of a class of transformers, with a tokenizer."""
    torch.manual_seed(1)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**SHAPE, **more))
    for parameter in model.parameters():  # biases and norms too: nothing is as it begins
        torch.nn.init.normal_(parameter, std=0.2)
    word_pieces(folder, WORDS)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def line(tmp_path):
    """The command line of a classification that starts from a folder."""

    def made(folder: Path, labels: str = "ab", *more: str) -> list[str]:
        rows = [{"text": f"w{number} w3", "label": labels[number % len(labels)]} for number in range(4)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["task=classification", f"init={folder}", f"run.root={tmp_path}", *LINE,
                f"data.train={tmp_path}/train.jsonl", *more]  # fmt: skip

    return made


def planned(monkeypatch, line: list[str]) -> Plan:
    monkeypatch.setattr(sys, "argv", ["finetune", *line])
    return finetune.make_plan(compose.from_command_line("finetune", entry.model_of), dist.ALONE)


def pooler(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.rpartition("pooler.dense.")[2]: value for name, value in tensors.items() if "pooler.dense." in name}


def test_the_pooler_of_a_folder_starts_a_classification_and_is_exported(line, tmp_path, transformers_here):
    """With a learning rate that changes nothing; the class of the folder has a pooler, its language model has none."""
    folder = saved(tmp_path / "bert", "BertForPreTraining")
    there = transformers.AutoModelForSequenceClassification.from_pretrained(folder).bert.pooler.dense
    argv = line(folder, "ab", "train.steps=1", "optim.lr=1e-30")
    done = subprocess.run(
        forked.program("-m", "pretrain.finetune", *argv), env=forked.ENVIRONMENT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = Weights(tmp_path / "x")
    assert torch.equal(ours.read("pooler.weight"), there.weight) and torch.equal(ours.read("pooler.bias"), there.bias)
    (told,) = events(tmp_path / "x", "initialised")
    assert told["anew"] == ["head.weight", "head.bias"] and told["reasons"] == [f"head.weight, head.bias: {NONE}"]
    convert.export_hf(tmp_path / "x", tmp_path / "exported")
    files = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "exported"))
    before, after = map(pooler, files)
    assert before.keys() == after.keys() == {"weight", "bias"}
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "more", "anew"),
    [
        ("BertForPreTraining", {}, ["head.weight", "head.bias"]),
        ("BertModel", {}, ["head.weight", "head.bias"]),
        ("BertForMaskedLM", {}, ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]),
        ("BertForQuestionAnswering", {}, ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]),
        ("RobertaModel", {"type_vocab_size": 1}, ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]),
        ("RobertaForMaskedLM", {"type_vocab_size": 1}, ["pooler.weight", "pooler.bias", "head.weight", "head.bias"]),
    ],
)
def test_what_begins_anew_is_what_transformers_would_not_load(line, tmp_path, monkeypatch, kind, more, anew):
    folder = saved(tmp_path / "folder", kind, **more)
    plan = planned(monkeypatch, line(folder))
    assert list(plan.new_parameters) == anew and set(plan.new_parameters.values()) == {NONE}
    model_class = transformers.AutoModelForSequenceClassification
    _, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert len(loading["missing_keys"]) == len(anew)
    weights = convert.open_model(folder, plan.model)
    found = load_file(folder / "model.safetensors")
    for name in weights.shapes.keys() - {name for name in weights.shapes if name.startswith("trunk.")}:
        assert torch.equal(weights.read(name), pooler(found)[name.partition(".")[2]])


def test_the_reasons_of_a_head_that_is_there(line, tmp_path, monkeypatch):
    folder = saved(tmp_path / "folder", "BertForSequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "good", "1": "bad"}
    (folder / "config.json").write_text(json.dumps(config))
    assert planned(monkeypatch, line(folder, "ab")).new_parameters == dict.fromkeys(
        ("head.weight", "head.bias"), "its labels are others (good, bad)"
    )
    assert planned(monkeypatch, line(folder, "abc")).new_parameters == {
        "head.weight": "it is [2, 24] there and [3, 24] here", "head.bias": "it is [2] there and [3] here",
    }  # fmt: skip
    plan = planned(monkeypatch, line(folder, "ab", "tuning=lora"))
    told = reasons(plan)["reasons"]
    assert told[0].startswith("trunk.blocks.0.") and told[0].endswith(" and 4 more: LoRA adds it"), told
    assert told[1:] == ["head.weight, head.bias: its labels are others (good, bad)"]
