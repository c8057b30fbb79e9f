"""Held-out accuracy against generated tokens and against seconds: the mean over seeds in a band from lowest to highest.

matplotlib comes with the extra `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's: told apart by colour-blind people too."""

PLACES = 200
"""Points at which the curves of the seeds are read off."""


def write_plot(comparison: Mapping[str, Any], path: Path) -> Path:
    """Draw a comparison into a PNG file.

    Args:
        comparison: what `comparison.json` holds.
        path: of the file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install 'graft-rl[plots]'") from None
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, comparison, "generated_tokens", "generated tokens")
    _panel(right, comparison, "seconds", "seconds of training")
    left.set_ylabel("held-out accuracy, %")
    seeds = len(comparison["seeds"])
    figure.suptitle(
        f"Mean of {seeds} seeds; the band goes from the lowest to the highest" if seeds > 1 else "One seed",
        fontsize=11,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    figure.savefig(path)
    return path


def _panel(axes: Axes, comparison: Mapping[str, Any], axis: str, name: str) -> None:
    for number, line in enumerate(comparison["lines"]):
        color = COLORS[number % len(COLORS)]
        style = "-" if number < len(COLORS) else "--"
        curves = [run["curve"] for run in comparison["runs"] if run["label"] == line["label"]]
        places, accuracies = read_off(curves, axis)
        if len(places) == 1:  # draws nothing: where it ends, at no price
            end = 100 * float(np.mean([curve[-1]["accuracy"] for curve in curves]))
            axes.axhline(end, color=color, linestyle=":", label=f"{line['label']} (draws no tokens)")
            continue
        axes.fill_between(
            places,
            100 * accuracies.min(axis=0),
            100 * accuracies.max(axis=0),
            color=color,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(places, 100 * accuracies.mean(axis=0), style, color=color, linewidth=2, label=line["label"])
    if comparison["target"] is not None:
        target = 100 * comparison["target"]
        axes.axhline(target, color="0.5", linewidth=1, linestyle="--", zorder=0, label=f"target {target:g} %")
    axes.set_xlabel(name)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def read_off(curves: Sequence[Sequence[Mapping[str, Any]]], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """The curves of several seeds at the same places, straight between measurements.

    Args:
        curves: measurements of each seed, in order.
        axis: `generated_tokens` or `seconds`.

    Returns:
        Places from 0 to where the first seed ends `[P]` (one place where that is 0), and accuracies `[seeds, P]`.
    """
    end = min(curve[-1][axis] for curve in curves)
    inner = {point[axis] for curve in curves for point in curve if point[axis] <= end}
    places = np.array(sorted({*np.linspace(0, end, PLACES), *inner})) if end > 0 else np.zeros(1)
    return places, np.stack(
        [np.interp(places, [p[axis] for p in curve], [p["accuracy"] for p in curve]) for curve in curves]
    )
