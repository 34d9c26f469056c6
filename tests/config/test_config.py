"""Every shipped config composes, and every mistake in one is refused with its key, its origin and a remedy."""

import shutil
import sys
from dataclasses import asdict, replace

import pytest
import yaml

from pretrain import tasks
from pretrain.config import checks, compose
from pretrain.config.schema import (
    ADDED_TO_MODELS,
    ADDED_TO_OPTIMIZERS,
    ADDED_TO_TASKS,
    differences,
    flatten,
    to_yaml,
)
from pretrain.config.steps import accumulation_steps, with_steps
from pretrain.hub import folder
from pretrain.tasks import instruct

CONF = compose.conf_folder()
GROUPS = ("model", "data", "objective", "optim", "schedule", "deepspeed", "log", "guard", "experiment")
CHOICES = [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONF / group).glob("[!_]*.yaml"))]


TUNED = [f"{group}={file.stem}" for group in ("task", "tuning") for file in sorted((CONF / group).glob("[!_]*.yaml"))]


@pytest.mark.parametrize("choice", [*CHOICES, *TUNED])
def test_every_shipped_choice_composes(choice):
    group, _, name = choice.partition("=")
    is_tuned = choice in TUNED or group == "data" and name == "examples"
    if group == "experiment":
        is_tuned = "override /task" in (CONF / group / f"{name}.yaml").read_text()
    needed = ["task=classification"] if is_tuned and group not in ("task", "experiment") else []
    needed += ["train.seq_len=512"] if group == "model" else []
    needed += ["init=runs/y"] if is_tuned else []
    cfg = compose.compose("finetune" if is_tuned else "pretrain", ["run.name=x", *needed, choice])
    if group in ("schedule", "optim", "objective", "task"):
        assert getattr(cfg, group).name == name
    if group == "deepspeed":
        assert f"zero{cfg.deepspeed.stage}" == name


def test_every_group_has_a_choice():
    assert {choice.partition("=")[0] for choice in CHOICES} == set(GROUPS)


def test_the_yaml_round_trip_keeps_every_value(tmp_path):
    cfg = compose.compose("pretrain", ["run.name=x", "optim.lr=0.00123", "data.train=a b"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert compose.read(tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.stepz=3"], ["train.stepz", "command line: train.stepz=3", "train.steps"]),
        (["+train.stepz=3"], ["train.stepz", "command line: +train.stepz=3", "train.steps"]),
        (["++model.layrs=3"], ["model.layrs", "model.layers"]),
        (["+nothing=3"], ["nothing", "unknown key"]),
        (["steps=3"], ["steps", "train.steps"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["train.steps=1.5"], ["train.steps", "1.5"]),
        (["optim.lr=[1]"], ["optim.lr"]),
        (["optim.lr=nan"], ["optim.lr", "finite"]),
        (["optim.lr=0"], ["optim.lr", "greater than 0"]),
        (["optim=mun"], ["optim=mun", "did you mean muon?"]),
        (["optim.momentum=0.9"], ["optim.momentum", "command line", "is for optim=muon, not adamw: drop it"]),
        (["optim=muon", "optim.momentum=2"], ["optim.momentum=2", "between 0 and 1"]),
        (["optim=muon", "optim.adamw_lr_scale=0"], ["optim.adamw_lr_scale", "greater than 0"]),
        (["model.value_embeddings=99"], ["model.value_embeddings=99", "model.layers"]),
        (["optim.base_width=64", "model=gpt2_124m"], ["optim.base_width=64", "tied_embeddings=false"]),
        (["optim.embedding_lr_scale=3", "model=gpt2_124m"], ["optim.embedding_lr_scale=3.0", "output matrix"]),
        (["train.steps=-1"], ["train.steps", "must not be negative"]),
        (["train.steps=0"], ["train.steps=0", "train.epochs=0"]),
        (["train.global_batch_size=0"], ["train.global_batch_size", "greater than 0"]),
        (["schedule.warmup_steps=-1"], ["schedule.warmup_steps", "negative"]),
        (["model.dropout=2"], ["model.dropout", "between 0 and 1"]),
        (["train.precision=fp23"], ["train.precision", "fp32"]),
        (["train.activation_checkpointing=fnn"], ["train.activation_checkpointing=fnn", "ffn", "did you mean ffn?"]),
        (["log.wandb=none"], ["log.wandb=none: choose one of", "log=none is without W&B"]),
        (["model=lama_14m"], ["model=lama_14m", "llama_14m"]),
        (["train.seq_len=5000"], ["train.seq_len=5000", "model.max_positions=1024"]),
        (["model.heads=7"], ["model.width=240", "model.heads=7"]),
        (["model.kv_heads=2"], ["model.heads=3", "model.kv_heads=2"]),
        (["run.name=a/b"], ["run.name", "slash"]),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(overrides, words):
    with pytest.raises(ValueError) as caught:
        compose.compose("pretrain", ["run.name=x", *overrides])
    for word in words:
        assert word in str(caught.value)


def test_a_missing_value_says_what_to_add():
    with pytest.raises(ValueError, match=r"run.name has no value: add run.name="):
        compose.compose("pretrain", [])


@pytest.mark.parametrize("how", ["--multirun", "hydra.mode=MULTIRUN"])
def test_several_runs_in_one_command_are_refused(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", how, "run.name=x"])
    with pytest.raises(ValueError, match="--multirun is not supported: start one command a run"):
        compose.from_command_line("pretrain", lambda init: {})


def test_a_mistake_in_a_file_names_the_file(tmp_path, monkeypatch):
    shutil.copytree(CONF, tmp_path / "conf")
    bad = tmp_path / "conf" / "model" / "llama_tiny.yaml"
    bad.write_text(bad.read_text().replace("layers: 2", "layers: two"))
    monkeypatch.setattr(compose, "conf_folder", lambda: tmp_path / "conf")
    with pytest.raises(ValueError, match=r"model.layers \(from conf/model/llama_tiny.yaml\)"):
        compose.compose("pretrain", ["run.name=x", "model=llama_tiny", "train.seq_len=8"])


def test_accumulation_is_derived_and_must_divide():
    train = compose.compose("pretrain", ["run.name=x"]).train
    assert accumulation_steps(replace(train, global_batch_size=24, micro_batch_size=3), 2) == 4
    with pytest.raises(ValueError) as caught:
        accumulation_steps(replace(train, global_batch_size=14, micro_batch_size=4), 2)
    message = str(caught.value)
    assert "train.global_batch_size=14" in message and "8 or 16" in message and "one of 1, 7" in message
    with pytest.raises(ValueError, match="take train.global_batch_size=3$"):
        accumulation_steps(replace(train, global_batch_size=1, micro_batch_size=1), 3)


def test_differences_tell_safe_changes_from_unsafe_ones():
    old = compose.compose("pretrain", ["run.name=x"])
    new = compose.compose("pretrain", ["run.name=x", "train.steps=7", "model.layers=2", "seed=1",
                                     "deepspeed=zero3", "model.attention=plain"])  # fmt: skip
    safe, unsafe = differences(old, new)
    assert safe == ["train.steps: 1000 -> 7", "model.attention: sdpa -> plain", "deepspeed.stage: 1 -> 3"]
    assert unsafe == ["seed: 0 -> 1", "model.layers: 3 -> 2"]


def test_conf_files_hold_every_default_of_the_schema():
    flat = flatten(compose.compose("finetune", ["run.name=x", "task=classification"]))
    documented = set()
    for file in CONF.rglob("*.yaml"):
        for key, value in (yaml.safe_load(file.read_text()) or {}).items():
            documented |= {key, *(value if isinstance(value, dict) else ())}
    assert {key.rpartition(".")[2] for key in flat} <= documented


def test_a_text_that_looks_like_an_interpolation_stays_text(tmp_path):
    """Labels come from data: nothing in them is looked up."""
    before = compose.compose("finetune", ["run.name=x", "task=classification"])
    labels = ["${oc.env:HOME}", "${x}", "a\\${b}", "\\\\${c}", "plain"]
    before = replace(before, task=replace(before.task, labels=labels))
    (tmp_path / "config.yaml").write_text(to_yaml(before))
    assert compose.read(tmp_path / "config.yaml") == before


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    now = compose.compose("pretrain", ["run.name=x"])
    saved = yaml.safe_load(to_yaml(now))
    for section, keys in (("model", ADDED_TO_MODELS), ("train", ["epochs"]), ("optim", ADDED_TO_OPTIMIZERS)):
        for key in keys:
            del saved[section][key]
    del saved["task"], saved["tuning"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert compose.read(tmp_path / "config.yaml") == now
    tuned = compose.compose("finetune", ["run.name=x"])
    saved = yaml.safe_load(to_yaml(tuned))
    for key in ADDED_TO_TASKS:
        del saved["task"][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert compose.read(tmp_path / "config.yaml") == tuned


@pytest.mark.parametrize("said, meant", [("true", "full"), ("True", "full"), ("false", "none"), ("ffn", "ffn")])
def test_activation_checkpointing_is_read_as_all_or_nothing_too(tmp_path, monkeypatch, said, meant):
    line = ["run.name=x", f"train.activation_checkpointing={said}"]
    cfg = compose.compose("pretrain", line)
    monkeypatch.setattr("sys.argv", ["pretrain", *line])
    assert cfg.train.activation_checkpointing == meant and compose.from_command_line("pretrain", dict) == cfg
    saved = yaml.safe_load(to_yaml(cfg))
    saved["train"]["activation_checkpointing"] = yaml.safe_load(said)  # as earlier versions wrote it
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert compose.read(tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize("steps, epochs, expected", [(0, 1, 13), (0, 0.5, 7), (0, 2, 25), (0, 0.001, 1), (9, 2, 9)])
def test_epochs_are_as_many_steps_as_they_take(steps, epochs, expected):
    """Of 100 samples in batches of 8; steps, where they are given, stand."""
    given = compose.compose("pretrain", ["run.name=x", "schedule.warmup_steps=2"])
    given = replace(given, train=replace(given.train, steps=steps, epochs=epochs, global_batch_size=8))
    settled = with_steps(given, 100)
    assert settled.train == replace(given.train, steps=expected)
    assert settled.schedule.warmup_steps == (2 if steps else min(2, expected // 10))


@pytest.mark.parametrize("section", checks.READS)
def test_what_a_choice_reads_is_what_the_comment_of_the_key_says(section):
    said = {}
    for line in (CONF / section / "_base.yaml").read_text().splitlines():
        key, _, comment = line.partition(":")
        readers = comment.partition("#")[2].partition(":")[0].strip()
        known = [name for name in readers.split(", ") if name in checks.READS[section]]
        if known:
            said[key] = set(known)
    last_said = {"context": "question", "answers": "question"}  # one comment for the three
    said |= {key: said[other] for key, other in last_said.items() if other in said}
    for name, keys in checks.READS[section].items():
        assert keys == {key for key, readers in said.items() if name in readers}, name


def test_an_experiment_says_what_those_it_builds_on_say_too(tmp_path, monkeypatch):
    """Also one of the user's own folder; an empty one says nothing."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [sentiment, _self_]\nmodel: {norm_eps: 0.5}\n"
    )
    (tmp_path / "experiment" / "empty.yaml").write_text("# @package _global_\n")
    theirs = asdict(compose.compose("pretrain", ["run.name=x", "model=bert_base", "train.seq_len=512"]).model) | {
        "dropout": 0.4
    }
    (tmp_path / "experiment" / "team").mkdir()
    (tmp_path / "experiment" / "team" / "base.yaml").write_text("# @package _global_\nmodel: {dropout: 0.3}\n")
    (tmp_path / "experiment" / "team" / "ours.yaml").write_text(
        "# @package _global_\ndefaults: [team/base, /experiment/mine, _self_]\n"
    )
    for name, expected in (
        ("mine", (0.0, "plain", 0.5)), ("empty", (0.4, "sdpa", 1e-12)), ("team/base", (0.3, "sdpa", 1e-12)),
        ("team/ours", (0.0, "plain", 0.5)), ("[mine,team/base]", (0.3, "plain", 0.5)),
    ):  # fmt: skip
        line = [f"hydra.searchpath=[file://{tmp_path}]", "run.name=x", "init=runs/y", f"experiment={name}"]
        monkeypatch.setattr("sys.argv", ["finetune", *line])
        model = compose.from_command_line("finetune", lambda init: dict(theirs)).model
        assert (model.dropout, model.attention, model.norm_eps) == expected


def test_a_key_that_no_model_has_is_refused_with_init_too(monkeypatch):
    theirs = asdict(compose.compose("pretrain", ["run.name=x"]).model)
    monkeypatch.setattr("sys.argv", ["finetune", "run.name=x", "init=runs/y", "+model.dropuot=0.1"])
    with pytest.raises(
        ValueError, match="unknown key model.dropuot .from the command line.*did you mean model.dropout"
    ):
        compose.from_command_line("finetune", lambda init: theirs)


def test_what_an_experiment_says_of_its_own_choice_does_not_bind_another(tmp_path):
    given = compose.compose("finetune", ["run.name=x", "experiment=questions", "task=classification"])
    assert given.task.name == "classification"
    with pytest.raises(ValueError, match=r"task.stride .from the command line: .*9. is for task=extractive_qa"):
        compose.compose("finetune", ["run.name=x", "experiment=questions", "task=classification", "task.stride=9"])
    with pytest.raises(ValueError, match=r"tuning.layer_lr_decay .* is for tuning=full or last_layers or lora"):
        compose.compose("finetune", ["run.name=x", "init=x", "tuning=head", "tuning.layer_lr_decay=0.5"])


TYPED = [
    ("pretrain", "run.name=20_26", lambda cfg: cfg.run.name, "20_26"),
    ("pretrain", "run.name=1e3", lambda cfg: cfg.run.name, "1e3"),
    ("pretrain", "run.name='true'", lambda cfg: cfg.run.name, "true"),
    ("pretrain", "data.train=/d/имя", lambda cfg: cfg.data.train, "/d/имя"),
    ("pretrain", "data.train=/d/a=b", lambda cfg: cfg.data.train, "/d/a=b"),
    ("pretrain", "data.train=/d/a(b) c's\\", lambda cfg: cfg.data.train, "/d/a(b) c's\\"),
    ("pretrain", "data.train=[/d/имя, '/d/a,b', ~/x]", lambda cfg: cfg.data.train, ["/d/имя", "/d/a,b", "/home/me/x"]),
    ("pretrain", "data.val=~/x", lambda cfg: cfg.data.val, "/home/me/x"),
    ("pretrain", "data.val=null", lambda cfg: cfg.data.val, None),
    ("pretrain", "data.val=news=~/x/", lambda cfg: cfg.data.val, "news=/home/me/x"),
    ("finetune", "data.val=[a=~/x,b=/d/c=d/,'e=f,g']", lambda cfg: cfg.data.val, ["a=/home/me/x", "b=/d/c=d", "e=f,g"]),
    ("pretrain", "run.root=/r/", lambda cfg: cfg.run.root, "/r"),
    ("pretrain", "data.train=[/d/,s3://b/d/,/]", lambda cfg: cfg.data.train, ["/d", "s3://b/d/", "/"]),
    ("pretrain", "log.sample_prompt=~/x", lambda cfg: cfg.log.sample_prompt, "~/x"),
    ("finetune", "task.labels=[yes,1_0,null]", lambda cfg: cfg.task.labels, ["yes", "1_0", "null"]),
    ("finetune", "task.template=Translate: {en}", lambda cfg: cfg.task.template, "Translate: {en}"),
    ("finetune", "task.template='Translate: {en}'", lambda cfg: cfg.task.template, "Translate: {en}"),
    ("finetune", "task.template={en}", lambda cfg: cfg.task.template, "{en}"),
]


@pytest.mark.parametrize(("entry", "typed", "value", "expected"), TYPED, ids=[case[1] for case in TYPED])
def test_text_stays_as_typed(entry, typed, value, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    task = {"task.labels": ["task=classification"], "task.template": ["task=instruct"]}.get(typed.split("=")[0], [])
    given = [*task, typed] if typed.startswith("run.name") else [*task, "run.name=x", typed]
    assert value(compose.compose(entry, given)) == expected
    monkeypatch.setattr("sys.argv", [entry, *given])
    assert value(compose.from_command_line(entry, dict)) == expected


def test_a_wrong_phase_is_named_with_where_it_came_from():
    words = r"train.phases\[1\] .from the command line: train.phases=.*: unknown key step; did you mean from_step\?"
    with pytest.raises(ValueError, match=words):
        compose.compose("pretrain", ["run.name=x", "train.phases=[{from_step: 3, seq_len: 8}, {step: 30}]"])
    with pytest.raises(ValueError, match=r"train.phases\[0\] .*: it needs from_step"):
        compose.compose("pretrain", ["run.name=x", "train.phases=[{seq_len: 8}]"])
    epochs = ["run.name=x", "train.steps=0", "train.epochs=2", "train.seq_len=64"]
    with pytest.raises(ValueError, match="train.epochs counts rows of one length, and train.phases has others: give"):
        compose.compose("pretrain", [*epochs, "train.phases=[{from_step: 3, seq_len: 8}]"])
    compose.compose("pretrain", [*epochs, "train.phases=[{from_step: 3, global_batch_size: 8}]"])


def test_every_task_is_known_wherever_tasks_are_listed():
    files = {file.stem for file in (CONF / "task").glob("*.yaml")} - {"_base"}
    assert set(checks.TASKS) == set(tasks.TASKS) == files == set(checks.CHOICES["task.name"])
    for name in files:
        assert compose.compose("finetune", ["run.name=x", f"task={name}"]).task.name == name
    of_heads = {kind.head: name for name, kind in tasks.TASKS.items() if kind.head != "lm"}
    assert folder.TASK_OF_HEAD == of_heads, "an import is told by its head what it was tuned for"
    assert set(checks.CHOICES["task.figures"]) == {"none", *instruct.JUDGES}
