"""Overrides as a user types them: for keys that hold text, Hydra's grammar has no say.

`run.name=20_26` would become the number 2026, `data.train=/d/a=b` or `/d/имя` a syntax error, `task.labels=[yes,no]`
true and false. Values of such keys are quoted for Hydra here, unless the user did.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin

from pretrain.config.schema import Config

PATHS = ("init", "run.root", "data.train", "data.val", "data.tokenizer")
_OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
_ITEM = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]*?)\s*(?:,|$)""", re.DOTALL)


def schema_keys(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the configuration, sections too, and its type without `Optional`."""
    for field in fields(section):
        kind = get_args(field.type)[0] if get_origin(field.type) is Union else field.type
        yield prefix + field.name, kind
        if is_dataclass(kind):
            yield from schema_keys(kind, f"{prefix}{field.name}.")


def as_typed(override: str) -> str:
    """An override whose text Hydra takes as it is; any other unchanged."""
    if not (found := _OVERRIDE.fullmatch(override)):
        return override
    before, key, value = found.groups()
    if key not in TEXTS | LISTS or value in ("", "null"):
        return override
    if key in LISTS and value.startswith("[") and value.endswith("]"):
        items = [item for item in _ITEM.findall(value[1:-1]) if item]
        return f"{before}{key}=[{','.join(map(_quoted, items))}]"
    return f"{before}{key}={_quoted(value)}" if key in TEXTS else override


def _quoted(text: str) -> str:
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return text
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # only before a quote does a backslash mean anything to Hydra
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


_KEYS = dict(schema_keys())
TEXTS = {key for key, kind in _KEYS.items() if kind is str} | {"data.train", "data.val"}
LISTS = {key for key, kind in _KEYS.items() if kind == list[str]} | {"data.train", "data.val"}
