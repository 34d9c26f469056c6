"""--help shows what an entry takes, each key with its comment; Hydra's refusals are said in our words."""

import pytest

from pretrain.config import compose, help
from pretrain.config.overrides import schema_keys
from tests.forked import ROOT

FOREIGN = {"pretrain": ("task", "tuning", "sentiment", "examples"), "finetune": ("quickstart", "shards")}


@pytest.mark.parametrize("entry", FOREIGN)
def test_help_shows_what_the_entry_takes(entry, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [entry, "--help", "train.seq_len=77", "model=bert_base"])
    assert compose.from_command_line(entry, dict) is None
    said = capsys.readouterr().out
    groups = said.partition("(GROUP=CHOICE):")[2].partition("Keys, as")[0]
    for name in FOREIGN[entry]:
        assert f" {name}" not in groups.replace(",", " ").replace(":", " ")
    lines = {line.split("=")[0].strip(): line for line in said.splitlines() if line.startswith("  ") and "=" in line}
    sections = {"task", "tuning"} if entry == "pretrain" else set()
    for key, kind in schema_keys():
        if key.partition(".")[0] not in sections and not hasattr(kind, "__dataclass_fields__"):
            assert key in lines or any(line.startswith(f"{key}.") for line in lines), key
    assert lines["train.seq_len"].split()[0] == "train.seq_len=77" and "tokens" in lines["train.seq_len"]
    assert lines["model.layers"].split() == ["model.layers=12"]
    assert lines["model.kv_heads"].endswith("0: as many as heads"), "the comment of the presets' base"
    commented = sum(len(line.split()) > 1 for line in lines.values())
    assert commented > 40 and "--check" in said and said.startswith(("Train", "Fine-tune"))


REFUSED = [
    ("pretrain", "model=llama_8", "model=llama_8: choose one of bert_base, .*; did you mean llama_8b?"),
    ("pretrain", "experiment=nope", "experiment=nope: choose one of masked, quickstart, speedrun$"),
    ("finetune", "data=nope", "data=nope: choose one of examples$"),
    ("pretrain", "task=classification", "task=... is for pretrain.finetune: pretrain.train has the groups model, data"),
    ("pretrain", "experiment=sentiment", "experiment=sentiment is for pretrain.finetune: pretrain.train has"),
    ("pretrain", "+model=llama_tiny", "model=...: leave the . out, model=CHOICE chooses another"),
    ("pretrain", "train.steps=(3", r"train.steps=\(3: it is no KEY=VALUE: put what is more than a number"),
    ("pretrain", "steps", "steps: it is no KEY=VALUE"),
    ("pretrain", "train.phases=[{from_step: }", r"train.phases=\[{from_step: }: it is no KEY=VALUE"),
    (
        "pretrain",
        "train.steps=1,2",
        r"train.steps=1,2: one value is wanted and several are there; a list is written \[1,2\]",
    ),
    ("pretrain", "~nope", "~nope: there is no key nope"),
]


@pytest.mark.parametrize(("entry", "override", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_hydras_refusals_are_in_our_words(entry, override, message):
    with pytest.raises(ValueError, match=message) as refused:
        compose.compose(entry, ["run.name=x", override])
    assert "hydra" not in str(refused.value).lower() and "override" not in str(refused.value)


def test_the_files_name_no_group_that_help_would_miss():
    for entry in FOREIGN:
        listed = help.groups_of(ROOT / "conf", entry)
        assert set(listed) <= {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
        assert all(help.choices(ROOT / "conf", entry, group) for group in listed)
