"""How the page groups what is known of held-out sets: a panel a figure with a line a set, tiles of the first sets."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pretrain.config.held_out import LESS_IS_BETTER, by_set, column, parted
from pretrain.report import theme

WITH_TILES = 3  # sets
FORMS = {"loss": ("Validation loss", "{:.3f}"), "bits_per_byte": ("Bits per byte", "{:.3f}"),
         "accuracy": ("Accuracy", "{:.1%}")}  # fmt: skip
Metrics = dict[str, np.ndarray]


def in_order(columns: Iterable[str]) -> list[str]:
    """A task's own columns by their names, then those of sets with names, as they come."""
    return sorted(columns, key=lambda name: (1, "") if parted(name)[0] else (0, name))


def further(metrics: Metrics) -> list[tuple[str, str]]:
    """The figures of which a set has a number, but for loss and bits per byte; each with its name in words."""
    found = dict.fromkeys(figure for columns in _with_numbers(metrics).values() for figure in columns)
    return [(figure, theme.words(figure)) for figure in found if figure not in LESS_IS_BETTER]


def lines(metrics: Metrics, figure: str, alone: str = "") -> list[tuple[str, str]]:
    """(column, label) of a figure of every set. `alone`: the label of the only set, where it has no name."""
    found = {name: columns[figure] for name, columns in _with_numbers(metrics).items() if figure in columns}
    unnamed = "without a name" if len(found) > 1 else alone
    return [(each, name or unnamed) for name, each in found.items()]


def tiles(metrics: Metrics) -> Iterator[tuple[str, float, str, str]]:
    """(label, the last value, its form, a note) of each figure of the first few sets that have names."""
    named = [(name, columns) for name, columns in _with_numbers(metrics).items() if name]
    for name, columns in named[:WITH_TILES]:
        for figure, each in columns.items():
            values = metrics[each][np.isfinite(metrics[each])]
            words = theme.words(figure)
            label, form = FORMS.get(figure, (words[:1].upper() + words[1:], "{:.4g}"))
            best = form.format(values.min() if figure in LESS_IS_BETTER else values.max())
            yield theme.esc(label), float(values[-1]), form, f"{theme.esc(name)}, best {best}"


def results(task: dict[str, Any], result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(task, result) as the one set of a run has it, for each set: its name stands behind the task's."""
    figures, facts = (found if isinstance(found, dict) else {} for found in map(result.get, ("figures", "sets")))
    found = []
    for name, columns in by_set(figures).items():
        own = {column("", figure): figures[each] for figure, each in columns.items()}
        of_set = {"name": f"{task.get('name') or 'task'}, {name}"} if name else {}
        found.append((task | of_set, result | facts.get(name, {}) | {"figures": own}))
    return found or [(task, result)]


def first_of_each(rows: Iterable[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The first `count` rows of each set, in their order."""
    seen: Counter[str] = Counter()
    for row in rows:
        name = str(row.get("set"))
        seen[name] += 1
        if seen[name] <= count:
            yield row


def _with_numbers(metrics: Metrics) -> dict[str, dict[str, str]]:
    """{set: {figure: column}} of the columns that have any."""
    return by_set(name for name, values in metrics.items() if np.isfinite(values).any())
