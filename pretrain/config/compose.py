"""Hydra composes a run's configuration here, and ends here: OmegaConf -> the frozen dataclasses of `schema`.

Each mistake, Hydra's own refusals included, becomes a `ValueError` that names the key, where it came from and the
nearest right name.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.checks import check, check_said
from pretrain.config.held_out import held_out_sets, split_name
from pretrain.config.help import help_text, in_our_words, wants_help
from pretrain.config.overrides import PATHS, as_typed, schema_keys
from pretrain.config.schema import (
    ADDED_TO_MODELS,
    ADDED_TO_OPTIMIZERS,
    ADDED_TO_TASKS,
    ADDED_TO_TRAINING,
    Config,
    PhaseConfig,
)

ReadModel = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Where a composed configuration came from, for messages: the main file, the command line, the groups' choices."""

    config_name: str = "pretrain"
    overrides: tuple[str, ...] = ()
    choices: dict[str, str] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()  # where Hydra looks for the groups


def conf_folder() -> Path:
    """`conf/` beside the package in a checkout, inside the package in an installed wheel."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def from_command_line(config_name: str, read_model: ReadModel) -> Config | None:
    """Compose `conf/<config_name>.yaml` with the command line; None when that asked for --help or --cfg only.

    `read_model` gives the model that a run has, for `init`. A user's mistake raises `ValueError`.
    """
    # The deepspeed launcher adds --local_rank=N, which torchrun's environment variables already say.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    said = {as_typed(argument): argument for argument in sys.argv[1:]}
    if wants_help(said):
        cfg, hydra_config = _composed(config_name, [each for each in said if not each.startswith("-")])
        plain, template = OmegaConf.to_container(cfg), hydra_config.help.template
        print(help_text(template, config_name, conf_folder(), plain, dict(hydra_config.runtime.choices)))
        return None
    sys.argv[1:] = said
    composed = _answered if any(argument.startswith("-") for argument in said) else _composed
    found = composed(config_name, list(said))
    if found is None:
        return None
    cfg, hydra_config = found
    if hydra_config.mode and hydra_config.mode.name != "RUN":
        raise ValueError("--multirun is not supported: start one command a run, each with its own run.name")
    origin = _origin(config_name, [said.get(each, each) for each in hydra_config.overrides.task], hydra_config)
    return from_hydra(_with_its_model(_at_home(cfg), origin, read_model), origin)


def compose(config_name: str, overrides: list[str]) -> Config:
    """The same composition without a command line, for tools and tests."""
    cfg, hydra_config = _composed(config_name, [as_typed(override) for override in overrides])
    return from_hydra(_at_home(cfg), _origin(config_name, overrides, hydra_config))


def _composed(config_name: str, overrides: list[str]) -> tuple[Any, Any]:
    """(the configuration, Hydra's own), composed once: `hydra.main` would do it twice."""
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder().resolve())):
            cfg = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
    except HydraException as error:
        raise ValueError(_explain(error, Origin(config_name, tuple(overrides)))) from error
    hydra_config = cfg.hydra
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg, hydra_config


def _answered(config_name: str, arguments: list[str]) -> tuple[Any, Any] | None:
    """What Hydra's own options (--help, --cfg, ...) ask for is printed; None where that was all."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting: the message is ours
    composed = []

    @hydra.main(version_base="1.3", config_path=str(conf_folder().resolve()), config_name=config_name)
    def note(cfg) -> None:  # what raises in here, Hydra would comment on
        composed.append((cfg, HydraConfig.get()))

    try:
        note()
    except HydraException as error:
        raise ValueError(_explain(error, Origin(config_name, tuple(arguments)))) from error
    return composed[0] if composed else None


def _at_home(cfg: Any) -> Any:
    """Paths in one spelling: without `~`, which a shell leaves alone after `key=`, and without a slash at the end."""
    for key in PATHS:
        found = OmegaConf.select(cfg, key)
        paths = list(found) if OmegaConf.is_list(found) else [found]
        spelt = [_spelt(path, key == "data.val") if isinstance(path, str) else path for path in paths]
        if spelt != paths:
            OmegaConf.update(cfg, key, spelt if OmegaConf.is_list(found) else spelt[0])
    return cfg


def _spelt(path: str, may_have_name: bool) -> str:
    name, place = split_name(path) if may_have_name else ("", path)
    if "://" not in place:
        place = os.path.expanduser(place).rstrip("/") or place
    return f"{name}={place}" if name else place


def _origin(config_name: str, overrides: Iterable[str], hydra_config: Any) -> Origin:
    runtime = hydra_config.runtime
    folders = tuple(Path(source.path) for source in runtime.config_sources if source.schema == "file")
    return Origin(config_name, tuple(overrides), dict(runtime.choices), folders)


def from_hydra(cfg: Any, origin: Origin = Origin()) -> Config:  # noqa: B008 (frozen)
    """Composed OmegaConf -> `Config`.

    The plain container is merged back into the schema, so that a key that slipped past Hydra (`+key=value`, a YAML
    file) is refused like any other.
    """
    try:
        config = _checked(OmegaConf.to_container(cfg, resolve=True), origin)
    except OmegaConfBaseException as error:
        raise ValueError(_explain_key(error, origin)) from error
    held_out_sets(config.data.val)  # judged here, not of a run that is read: what is a name depends on what is there
    for section in ("optim",) if config.task is None else ("optim", "task", "tuning"):
        check_said(config, section, {key: _source(f"{section}.{key}", origin) for key in _said(origin, section)})
    return config


def _checked(plain: dict[str, Any], origin: Origin) -> Config:
    """Plain values -> `Config`. Text is taken as it is: a label that looks like an interpolation is a label."""
    train = plain.get("train") or {}
    _check_phases(train.get("phases"), origin)
    if (key := "activation_checkpointing") in train:  # it was all or nothing once
        train[key] = {"true": "full", "false": "none"}.get(str(train[key]).lower(), train[key])
    try:
        merged = OmegaConf.merge(_schema(), _escaped(plain))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{missing[0]} has no value: add {missing[0]}=... to the command line")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_explain_key(error, origin)) from error
    check(config)
    return config


def _check_phases(phases: Any, origin: Origin) -> None:
    """OmegaConf does not say in which item of a list a key is wrong."""
    known = [key.name for key in fields(PhaseConfig)]
    for number, phase in enumerate(phases if isinstance(phases, list) else []):
        where = f"train.phases[{number}] (from {_source('train.phases', origin)})"
        if not isinstance(phase, dict):
            raise ValueError(f"{where}: {phase!r} is no phase: write {{from_step: ..., seq_len: ...}}")
        if unknown := [key for key in phase if key not in known]:
            near = difflib.get_close_matches(unknown[0], known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f": a phase has {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {unknown[0]}{hint}")
        if "from_step" not in phase:
            raise ValueError(f"{where}: it needs from_step, the step that it begins after")


def _with_its_model(cfg: Any, origin: Origin, read_model: ReadModel) -> Any:
    """A run that starts from another one has its model, with what the command line and the experiment say about it.

    Other runs take the vocabulary of their tokenizer, not the one a preset was published with.
    """
    said = _said(origin, "model")
    if not cfg.init:
        if "vocab_size" not in said:
            cfg.model.vocab_size = 0
        return cfg
    if any(override.lstrip("+").startswith("model=") for override in origin.overrides):
        raise ValueError(f"init={cfg.init} brings its own model: leave model=... out")
    name = "" if OmegaConf.is_missing(cfg.run, "name") else str(cfg.run.name)
    own = Path(cfg.run.root) / name / "config.yaml"  # a run that began before needs `init` no more
    before = read(own) if own.is_file() else None
    brought = asdict(before.model) if before and before.init == cfg.init else read_model(cfg.init)
    brought |= {key: cfg.model[key] for key in said}
    return OmegaConf.merge({**cfg, "model": None}, {"model": brought})


def _said(origin: Origin, section: str) -> set[str]:
    """The keys of a section that the command line or an experiment names, not the choice of a group. Where the command
    line chooses a group, the keys that an experiment has for its own choice do not count.
    """
    keys = {override.lstrip("+").partition("=")[0] for override in origin.overrides}
    said = {key.partition(".")[2] for key in keys if key.startswith(f"{section}.")}
    return said if section in keys else said.union(*(content.get(section) or {} for _, content in _experiments(origin)))


def _experiments(origin: Origin) -> list[tuple[str, dict[str, Any]]]:
    """The name and the content of each experiment: of those that were chosen, and of those that they build on."""
    said = (override.partition("=")[2] for override in origin.overrides if override.startswith("experiment=["))
    lists = [name for value in said for name in yaml.safe_load(value)]  # Hydra notes the choice of one, not of several
    names, found = lists or [origin.choices.get("experiment")], []
    while names:
        name = names.pop()
        files = (folder / "experiment" / f"{name}.yaml" for folder in origin.folders)
        content = (
            next((yaml.safe_load(file.read_text(encoding="utf-8")) for file in files if file.is_file()), None) or {}
        )
        found.append((f"experiment/{name}", content))
        built_on = [entry for entry in content.get("defaults") or [] if isinstance(entry, str) and entry != "_self_"]
        names += [entry.removeprefix("/experiment/") for entry in built_on]
    return found


def read(path: Path) -> Config:
    """Read a run's resolved `config.yaml`."""
    if not path.is_file():
        raise ValueError(f"no config.yaml in {path.parent}: is this a run's folder (runs/NAME)?")
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        saved["model"] = ADDED_TO_MODELS | saved["model"]
        saved["train"] = ADDED_TO_TRAINING | saved["train"]
        saved["optim"] = ADDED_TO_OPTIMIZERS | saved["optim"]
        if saved.get("task"):
            saved["task"] = ADDED_TO_TASKS | saved["task"]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not the config of a run") from None
    return _checked(saved, Origin())


def _escaped(value: Any) -> Any:
    """Plain values in which OmegaConf finds no interpolations."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _schema() -> Any:
    """The dataclasses as OmegaConf; frozen ones come out read-only, which would refuse the merge."""
    schema = OmegaConf.structured(Config)
    for node in (schema, *(schema._get_node(key) for key in schema)):
        if OmegaConf.is_config(node):
            OmegaConf.set_readonly(node, False)
    return schema


def _explain(error: HydraException, origin: Origin) -> str:
    """Hydra's own refusal (an override, a group's choice) in one clear message."""
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _explain_key(cause, origin)
    text = str(error).partition("Config search path:")[0].strip()
    return in_our_words(text, origin.config_name, conf_folder(), origin.overrides)


def _explain_key(error: OmegaConfBaseException, origin: Origin) -> str:
    key = str(error.full_key)
    where = f"(from {_source(key, origin)})"
    known = [name for name, _ in schema_keys()]
    if key not in known:
        last = key.rpartition(".")[2]
        near = difflib.get_close_matches(key, known, 1, 0.7) or [k for k in known if k.rpartition(".")[2] == last][:1]
        near = near or difflib.get_close_matches(key, known, 1, 0.5)
        return f"unknown key {key} {where}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key} {where}: {str(error.msg or error).splitlines()[0]}"


def _source(key: str, origin: Origin) -> str:
    """The override or the YAML file that a key came from, for messages."""
    choices = origin.choices
    said = {override.lstrip("+~").partition("=")[0]: override for override in origin.overrides}
    fitting = [name for name in said if name and name not in choices and f"{key}.".startswith(f"{name}.")]
    if fitting:
        return f"the command line: {said[max(fitting, key=len)]}"
    parts = key.split(".")
    files = [(origin.config_name, parts)]
    if choices.get(parts[0]):
        files.insert(0, (f"{parts[0]}/{choices[parts[0]]}", parts[1:]))
    contents = [(name, parts, content) for name, content in _experiments(origin)]
    for name, path in files:
        file = conf_folder() / f"{name}.yaml"
        contents.append((name, path, yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None))
    for name, path, node in contents:
        for part in path:
            node = node[part] if isinstance(node, dict) and part in node else None
        if node is not None:
            return f"conf/{name}.yaml"
    return "the config files"
