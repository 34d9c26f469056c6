"""What --help prints, from the comments of `conf/`; and the refusals of Hydra's grammar and groups in our words."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ENTRIES = {"pretrain": "pretrain.train", "finetune": "pretrain.finetune"}
COLUMN = 44  # where the comments stand
_LINE = re.compile(r"( *)(\w+):(?:\s+([^\s#].*?))?(?:\s+#\s*(.*))?$")


def help_text(template: str, config_name: str, conf: Path, plain: dict[str, Any], chosen: dict[str, str]) -> str:
    """`template` with the groups that the entry has, and every key as it is composed, beside its comment."""
    groups = (f"  {group}: {', '.join(choices(conf, config_name, group))}" for group in groups_of(conf, config_name))
    known = {**_comments(conf / f"{config_name}.yaml")}
    for group, choice in chosen.items():
        for name in ("_base", choice):
            known |= {f"{group}.{key}": said for key, said in _comments(conf / group / f"{name}.yaml").items()}
    keys = []
    for key, value in _flat(plain):
        pair = f"  {key}={_shown(value)}"
        keys.append(f"{pair:{COLUMN}}{known[key]}" if known.get(key) else pair)
    return template.replace("$APP_CONFIG_GROUPS", "\n".join(groups) + "\n").replace("$CONFIG", "\n".join(keys))


def groups_of(conf: Path, config_name: str) -> list[str]:
    """The groups of an entry, as its file names them."""
    listed = yaml.safe_load((conf / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    return [
        next(iter(entry)) for entry in listed if isinstance(entry, dict) and not next(iter(entry)).startswith("over")
    ]


def choices(conf: Path, config_name: str, group: str) -> list[str]:
    """What an entry can choose of a group."""
    names = sorted(file.stem for file in (conf / group).glob("[!_]*.yaml"))
    if group == "data":  # each entry has its own kind
        return [{"pretrain": "shards", "finetune": "examples"}[config_name]]
    if group == "experiment":
        return [name for name in names if _has_task(conf, name) == (config_name == "finetune")]
    return names


def in_our_words(refusal: str, config_name: str, conf: Path, overrides: Sequence[str]) -> str:
    """A refusal of Hydra's, with what to do."""
    entry, groups = ENTRIES[config_name], groups_of(conf, config_name)
    if found := re.search(r"Could not find '(\w+)/([^']+)'", refusal):
        group, name = found.groups()
        known = choices(conf, config_name, group)
        near = difflib.get_close_matches(name, known, 1)
        return f"{group}={name}: choose one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
    if found := re.search(r"(?:In 'experiment/(\w+)': )?Could not override '(\w+)'. No match", refusal):
        experiment, group = found.groups()
        what = f"experiment={experiment}" if experiment else f"{group}=..."
        others = " and ".join(other for other in ENTRIES.values() if other != entry)
        return f"{what} is for {others}: {entry} has the groups {', '.join(groups)}"
    if found := re.search(r"Multiple values for (\w+)", refusal):
        return f"+{found[1]}=...: leave the + out, {found[1]}=CHOICE chooses another"
    if found := re.search(r"Could not delete from config. '([^']+)'", refusal):
        return f"~{found[1]}: there is no key {found[1]}"
    if found := re.search(r"Ambiguous value for argument '(.*)'", refusal):
        return f"{found[1]}: one value is wanted and several are there; a list is written [1,2]"
    if "override_grammar" in refusal or "parsing override" in refusal:
        found = re.search(r"Error parsing override '(.*)'\n", refusal)
        bad = found[1] if found else next((said for said in overrides if said.partition("=")[2][:9] in refusal), "")
        return f"{bad}: it is no KEY=VALUE: put what is more than a number, a name or [a,b] in quotes, \"KEY='VALUE'\""
    return f"{refusal}\n(--help lists the keys, --cfg job shows the composed config)"


def _has_task(conf: Path, experiment: str) -> bool:
    content = yaml.safe_load((conf / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")) or {}
    listed = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in content.get("defaults") or []]
    built_on = (name.removeprefix("/experiment/") for name in listed if name.startswith("/experiment/"))
    return "override /task" in listed or any(_has_task(conf, name) for name in built_on)


def _comments(file: Path) -> dict[str, str]:
    """{dotted key: the comment beside it} of a YAML file."""
    found, above = {}, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if match := _LINE.match(line):
            depth = len(match[1]) // 2
            above = [*above[:depth], match[2]]
            if match[4]:
                found[".".join(above)] = match[4]
    return found


def _flat(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def wants_help(arguments: Iterable[str]) -> bool:
    return any(argument in ("--help", "-h") for argument in arguments)
