"""The sets of held-out data that `data.val` names, and what the figures of each are called.

`data.val` is null, one place (a path or URL), or a list of places, each of which may be written NAME=PLACE. One place
without a name has the figures `val_loss`, ...; any other set has `val_NAME/loss`, ..., in the order of the list.
"""

import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

LESS_IS_BETTER = ("loss", "bits_per_byte")  # of all figures
_NAME = re.compile(r"[\w.-]+")
_ENDINGS = re.compile(r"(\.(jsonl?|csv|tsv|txt|parquet|tar))?(\.(gz|zst))?$")  # of files of examples
_PREFIX = "val_"


class HeldOut(NamedTuple):
    """A set: its name ("" where it is the only one and was given none), and where it is."""

    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.name}={self.place}" if self.name else self.place


def held_out_sets(val: Any) -> list[HeldOut]:
    """The sets of `data.val`; `ValueError` where two have one name, or one has none that it could be called by."""
    if not isinstance(val, list):
        return [HeldOut(*split_name(val))] if val else []
    found: dict[str, HeldOut] = {}
    for name, place in map(split_name, val):
        name = name or _ENDINGS.sub("", place.rstrip("/").rpartition("/")[2])
        if not _NAME.fullmatch(name):
            raise ValueError(f"data.val: {place} needs a name of letters, digits, _, - and . for its figures: write "
                             f"NAME={place}")  # fmt: skip
        if name in found:
            raise ValueError(f"data.val has two sets called {name}, {found[name].place} and {place}: give them names "
                             f"that differ, as [one={found[name].place},other={place}]")  # fmt: skip
        found[name] = HeldOut(name, place)
    return list(found.values())


def split_name(text: str) -> tuple[str, str]:
    """(name, place) of NAME=PLACE, where NAME is letters, digits, `_`, `-`, `.`; ("", text) of a place alone. What is
    there under the whole text is a place, whatever it has in it.
    """
    name, _, place = text.partition("=")
    if not place or not _NAME.fullmatch(name) or os.path.exists(text):
        return "", text
    return name, place


def told_of_trained_on(places: str) -> str:
    """What is said where held-out data is trained on too."""
    return f"data.val={places} is trained on too: its figures are not of held-out text"


def text_of(evaluation: dict[str, Any]) -> str:
    """What text the figures of a run's evaluation.json are of."""
    kind = "text that is trained on too" if evaluation.get("is_trained_on") else "held-out text"
    return f"{kind} ({evaluation['set']})" if "set" in evaluation else kind


def column(name: str, figure: str) -> str:
    """What a figure of a set is called in the journal: val_loss; of a set with a name val_NAME/loss."""
    return f"{_PREFIX}{name}/{figure}" if name else _PREFIX + figure


def parted(column: str) -> tuple[str, str]:
    """(the set's name, the figure) of a column."""
    name, _, figure = column.removeprefix(_PREFIX).rpartition("/")
    return name, figure


def by_set(columns: Iterable[str]) -> dict[str, dict[str, str]]:
    """{set: {figure: column}} of those columns that are figures of held-out data, all in their order."""
    found: dict[str, dict[str, str]] = {}
    for each in columns:
        if each.startswith(_PREFIX):
            name, figure = parted(each)
            found.setdefault(name, {})[figure] = each
    return found
