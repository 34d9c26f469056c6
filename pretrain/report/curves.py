"""Curves of a run's columns over its steps, as SVG in the page's colours. The only module that imports matplotlib."""

import html
import io
import re

import numpy as np

POINTS = 1000  # a curve; more would only make the file heavy
NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu")
# Drawn in these colours, which the style sheet's variables then replace, so that curves follow the reader's theme.
INK, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
THEME = {INK: "var(--muted)", GRID: "var(--line)", FIRST: "var(--accent)", SECOND: "var(--second)"}


def panel(title: str, metrics: dict[str, np.ndarray], lines: list[tuple[str, str]]) -> str:
    """One figure of (column, label) curves over the steps; nothing where no column has a number."""
    curves = [(name, label, *_thin(metrics["step"], metrics[name])) for name, label in lines]
    curves = [curve for curve in curves if curve[2].size]
    if not curves:
        return ""
    svg = _draw(title, curves)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"| id="[A-Za-z0-9.]+_\d+"|font-family: [^;]*; ', "", svg)
    # A hundredth of a point is enough, and halves the page. Only in attributes: labels keep their digits.
    svg = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found[0]), svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _draw(title: str, curves: list[tuple]) -> str:
    """SVG text of curves (column, label, x, mean, low, high); noisy ones pale behind their running mean."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.9))  # with margins of its own: a layout engine would draw everything twice
        axes = figure.add_axes((0.12, 0.15, 0.86, 0.81))
        for colour, (name, label, x, mean, low, high) in zip((FIRST, SECOND), curves, strict=False):
            if name in NOISY and x.size > 100:
                if low is not high:
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(x, mean, color=colour, alpha=0.35, linewidth=0.7)
                mean = _running_mean(mean, x.size // 50)
            axes.plot(x, mean, color=colour, linewidth=1.5, marker="o" if x.size <= 40 else "", ms=3, label=label)
        axes.grid(color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0, 1.02 * max(1, *(x[-1] for _, _, x, *_ in curves)))
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        percent = PercentFormatter(1.0)
        formats = {"mfu": percent, "val_accuracy": percent, "lr": "{x:.2g}", "tokens_per_second": EngFormatter(sep="")}
        if (name := curves[0][0]) in formats:
            axes.yaxis.set_major_formatter(formats[name])
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=INK)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True)
    return svg.getvalue()


def _running_mean(values: np.ndarray, half_width: int) -> np.ndarray:
    """Mean of each value and as many neighbours on either side, fewer towards the ends, so that slopes stay put."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    half = np.minimum(half_width, np.minimum(at, values.size - 1 - at))
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def _thin(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(step, mean, least, greatest) of at most `POINTS` runs of rows, those without a number left out."""
    good = np.isfinite(step) & np.isfinite(value)
    x, y = step[good], value[good]
    if x.size <= POINTS:
        return x, y, y, y
    starts = np.linspace(0, x.size, POINTS, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, x.size))
    means = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return *means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
