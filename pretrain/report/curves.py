"""Curves of a run's columns over its steps, as SVG in the page's colours. The only module that imports matplotlib."""

import html
import io
import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 1000  # a curve; more would only make the file heavy
STYLES = {"resume": (0, (1, 3)), "phase": (0, (5, 3)), "fault": "solid"}  # of what is marked on a curve
NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu")
# Drawn in these colours, which the style sheet's variables then replace, so that curves follow the reader's theme.
INK, GRID, FAULT = "#010101", "#020202", "#030303"
COLOURS = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909")
NAMES = ("accent", "second", "third", "fourth", "fifth", "sixth")
THEME = {INK: "var(--muted)", GRID: "var(--line)", FAULT: "var(--bad)"}
THEME |= {colour: f"var(--{name})" for colour, name in zip(COLOURS, NAMES, strict=True)}


@dataclass(frozen=True)
class Curve:
    """A column over the steps; the line breaks before the places `breaks`."""

    name: str
    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    breaks: np.ndarray


def panel(
    title: str, metrics: dict[str, np.ndarray], lines: list[tuple[str, str]],
    marks: dict[str, list[int]] | None = None, levels: dict[str, float] | None = None,
) -> str:  # fmt: skip
    """One figure of (column, label) curves over the steps; nothing where no column has a number.

    `marks`: steps at which something happened, by its kind (`STYLES`); `levels`: values to compare with, by name.
    """
    curves = [
        Curve(name, label, *_thin(metrics["step"], metrics[name], not name.startswith("val_"))) for name, label in lines
    ]
    curves = [curve for curve in curves if curve.x.size]
    if not curves:
        return ""
    svg = _draw(title, curves, marks or {}, levels or {})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"| id="[A-Za-z0-9.]+_\d+"|font-family: [^;]*; ', "", svg)
    # A hundredth of a point is enough, and halves the page. Only in attributes: labels keep their digits.
    svg = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found[0]), svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _draw(title: str, curves: list[Curve], marks: dict[str, list[int]], levels: dict[str, float]) -> str:
    """SVG text of what `panel` shows."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.9))  # with margins of its own: a layout engine would draw everything twice
        axes = figure.add_axes((0.145, 0.15, 0.835, 0.81))
        last = max(1, *(curve.x[-1] for curve in curves))
        for kind, step in ((kind, step) for kind, steps in marks.items() for step in steps):
            axes.axvline(step, color=FAULT if kind == "fault" else INK, linestyle=STYLES[kind], linewidth=0.9)
        for style, (name, value) in zip(("dashed", "dotted"), levels.items(), strict=False):
            axes.axhline(value, color=INK, linestyle=style, linewidth=1, label=name)
        looks = itertools.cycle(itertools.product(("solid", "dashed", "dotted"), COLOURS))
        for look, curve in zip(looks, curves, strict=False):
            _plot(axes, *look, curve)
        axes.grid(color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0, 1.02 * last)
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _scale(axes, curves[0].name)
        if (count := len(curves) + len(levels)) > 1:
            axes.legend(frameon=False, labelcolor=INK, ncols=1 + count // 9)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True)
    return svg.getvalue()


def _plot(axes: Any, dash: str, colour: str, curve: Curve) -> None:
    """A line, broken where rows are missing; a noisy one pale behind its running mean."""
    x, mean, low, high = (
        np.insert(column, curve.breaks, np.nan) for column in (curve.x, curve.mean, curve.low, curve.high)
    )
    if curve.name in NOISY and curve.x.size > 100:
        if curve.low is not curve.high:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=colour, alpha=0.35, linewidth=0.7)
        mean = np.insert(_running_mean(curve.mean, curve.x.size // 50), curve.breaks, np.nan)
    marker = "o" if curve.x.size <= 40 else ""
    axes.plot(x, mean, color=colour, linestyle=dash, linewidth=1.5, marker=marker, ms=3, label=curve.label)


def _scale(axes: Any, name: str) -> None:
    """The numbers of the upright axis: from 0 on where it is a share of what there is, else as the curve needs."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    if name.endswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif name in ("mfu", "lr", "tokens_per_second"):
        forms = {"mfu": PercentFormatter(1.0), "lr": "{x:.2g}", "tokens_per_second": EngFormatter(sep="")}
        axes.yaxis.set_major_formatter(forms[name])
        axes.set_ylim(bottom=0)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
        low, high = axes.get_ylim()
        if high - low < 1e-6 * abs(high):  # all but constant: what is left is rounding
            axes.set_ylim(low - 0.05 * abs(low), high + 0.05 * abs(high))


def _running_mean(values: np.ndarray, half_width: int) -> np.ndarray:
    """Mean of each value and as many neighbours on either side, fewer towards the ends, so that slopes stay put."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    half = np.minimum(half_width, np.minimum(at, values.size - 1 - at))
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def _thin(step: np.ndarray, value: np.ndarray, is_in_each_row: bool) -> tuple[np.ndarray, ...]:
    """(step, mean, least, greatest) of at most `POINTS` runs of rows, those without a number left out; and the places
    int64[k] before which the line breaks: rows are missing there or, where each row should have one, numbers.
    """
    row = np.flatnonzero(np.isfinite(step) & np.isfinite(value))
    x, y = step[row], value[row]
    apart = (np.diff(x) > np.diff(row)) | (is_in_each_row & (np.diff(row) > 1))
    breaks = np.flatnonzero(apart) + 1
    if x.size <= POINTS:
        return x, y, y, y, breaks
    starts = np.linspace(0, x.size, POINTS, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, x.size))
    means = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    extremes = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return *means, *extremes, np.unique(np.searchsorted(starts, breaks))
