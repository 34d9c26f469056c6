"""The card says what a model was started from by a name that tells something, and never where it lay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import compose
from pretrain.config.schema import to_yaml
from pretrain.files import IMPORTED
from pretrain.hub.card import model_card, model_name

HASH = "0123456789abcdef0123456789abcdef01234567"


def folder(path: Path, said: str | None = None, **files: str) -> Path:
    """A Hugging Face folder whose config.json says that it was loaded from `said`."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({} if said is None else {"_name_or_path": said}))
    return path


@pytest.mark.parametrize(
    ("path", "said", "name"),
    [
        ("bert-tiny", None, "bert-tiny"),
        ("bert-tiny/model", None, "bert-tiny"),
        ("bert-tiny/final/checkpoint-500", None, "bert-tiny"),
        ("bert-tiny/checkpoints/final", None, "bert-tiny"),
        ("bert-tiny", "prajjwal1/bert-mini", "prajjwal1/bert-mini"),
        ("model", "bert-base-uncased", "bert-base-uncased"),
        ("bert-tiny/model", "/home/someone/secret/bert", "bert-tiny"),
        ("bert-tiny/model", "./bert", "bert-tiny"),
        ("bert-tiny/model", "out/model", "bert-tiny"),
        ("bert-tiny/model", "", "bert-tiny"),
        (f"models--google--bert-small/snapshots/{HASH}", None, "google/bert-small"),
        (f"models--gpt2/snapshots/{HASH}", None, "gpt2"),
    ],
)
def test_a_folder_of_hugging_face_has_its_name_or_the_model_s(tmp_path, path, said, name):
    assert model_name(folder(tmp_path / path, said)) == name
    assert model_name(str(tmp_path / path) + "/") == name


def test_a_run_has_its_name_and_a_checkpoint_its_step(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "base"
    checkpoint = run / "checkpoints" / "step-000001200"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (tmp_path / "runs" / "model").mkdir()
    (tmp_path / "runs" / "model" / "config.yaml").write_text("")
    assert model_name(run) == "base" and model_name(checkpoint) == "base, step 1,200"
    assert model_name(tmp_path / "runs" / "model") == "model"
    monkeypatch.chdir(run)
    assert model_name(".") == "base" and model_name("checkpoints/step-000001200") == "base, step 1,200"


def test_an_imported_folder_has_its_name_or_that_of_what_was_imported(tmp_path):
    for name, told in (("model", "bert-tiny"), ("mine", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / IMPORTED).write_text('{"source": "bert-tiny"}')
        assert model_name(tmp_path / name) == told


def test_no_user_and_no_disk_is_named():
    for path in ("/home/alice/models/final", "/home/alice/model", "/scratch/secret/checkpoints/best", "/data/model"):
        assert model_name(path) in ("final", "model", "best"), path
    assert model_name("/home/alice/bert/model") == "bert" == model_name("/home/alice/bert/final/checkpoint-5")


def test_what_is_gone_has_the_name_that_its_place_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name("/gone/far/away/bert/model") == "bert" and model_name("../bert/checkpoint-7") == "bert"
    assert model_name("runs/base/checkpoints/step-000000002") == "base, step 2" and model_name("runs/base") == "base"
    assert model_name("../model") == "model" and model_name("model") == "model"


def test_the_card_of_a_run_names_what_it_was_started_from(tmp_path):
    run, start = tmp_path / "tuned", folder(tmp_path / "bert-tiny" / "model")
    config = compose.compose("pretrain", ["run.name=x", "model=bert_base", "train.seq_len=512", f"init={start}"])
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(replace(config, init=str(start))))
    proof = {"transformers": "5", "class": "C", "compared": "all", "positions": 1, "unit": "positions",
             "max_difference": 0.0, "continued_tokens": 0, "texts": 1}  # fmt: skip
    hf = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "dtype": "float32"}
    text = model_card("tuned", run, 0, config.model, hf, 1, "AutoModelForMaskedLM", proof)
    assert "| started from | bert-tiny |" in text and str(tmp_path) not in text and "trained on too" not in text
    (run / "data.json").write_text(json.dumps({"train": "abc", "val_trained_on": f"news={tmp_path}"}))
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "tokens": 8, "loss": 2, "val_news/loss": 1, "val_web/bits_per_byte": 2}'
    )
    text = model_card("tuned", run, 0, config.model, hf, 1, "AutoModelForMaskedLM", proof)
    assert "| note | (some of) the validation data was trained on too" in text and str(tmp_path) not in text
    assert "| validation at step 0 | news loss 1.0000 nats a token, web 2.0000 bits per byte |" in text
