"""The plots of a comparison as SVG, drawn by matplotlib (the extra `report`).

Text and axes take the colour of the page around them, so a plot is readable on light and on dark ground.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import GGUForgeError
from gguforge.runtime.compare import Candidate, Part, Report

INK = "#010203"  # stands for the page's text colour, and is replaced by it
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#ec4899", "#14b8a6", "#a3a30b")
SMOOTHING = 16  # positions averaged into one point of the plot by position


def matplotlib() -> Any:
    """matplotlib's Figure class.

    Raises:
        GGUForgeError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GGUForgeError("plots need matplotlib", remedy="pip install 'gguforge[report]'") from None
    return Figure


def frontier_plot(report: Report) -> str:
    """Size against mean divergence, with the files that nothing smaller beats joined by a line."""
    figure, axes = _axes("size, MB", "mean KL divergence, nats")
    best = report.frontier()
    axes.plot([one.nbytes / 1e6 for one in best], [one.divergence for one in best], "-", color=COLORS[0], alpha=0.5)
    for one in report.candidates:
        on = one in best
        assert one.evaluation.comparison is not None
        axes.errorbar(
            one.nbytes / 1e6, one.divergence, yerr=one.evaluation.comparison.mean.error, fmt="o",
            color=COLORS[0] if on else COLORS[1], capsize=2, markersize=5,
        )  # fmt: skip
        axes.annotate(
            one.type,
            (one.nbytes / 1e6, one.divergence),
            textcoords="offset points",
            xytext=(6, 5) if on else (6, -13),
            color=INK,
            fontsize=9,
        )
    if all(one.divergence > 0 for one in report.candidates):
        axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    return _svg(figure)


def standalone(svg: str) -> str:
    """A plot as a file of its own, which takes dark ink on light ground and light ink on dark."""
    style = "<style>svg { color: #1c2024 } @media (prefers-color-scheme: dark) { svg { color: #e6e9ee } }</style>"
    return svg.replace(">", f">{style}", 1)


def position_plot(report: Report) -> str:
    """Mean divergence against the position in the chunk, one line a file."""
    figure, axes = _axes("position in the chunk", "mean KL divergence, nats")
    for one, color in zip(report.candidates, _cycle(len(report.candidates)), strict=True):
        values = one.evaluation.by_position
        first = one.evaluation.context // 2
        step = max(1, min(SMOOTHING, len(values) // 8))
        count = len(values) // step * step
        smooth = values[:count].reshape(-1, step).mean(axis=1)
        axes.plot(first + step * (np.arange(len(smooth)) + 0.5), smooth, color=color, label=one.type)
    if all(one.divergence > 0 for one in report.candidates):
        axes.set_yscale("log")
    figure.legend(loc="outside lower center", frameon=False, labelcolor=INK, fontsize=9, ncols=6)
    return _svg(figure)


def part_plot(candidate: Candidate) -> str:
    """A heat map: the divergence that each layer's tensors of each kind cause alone; colours go by its logarithm."""
    kinds, layers, values = part_table(candidate.parts)
    figure, axes = _axes("", "", height=1.2 + 0.34 * len(layers), width=2.0 + 0.85 * len(kinds))
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(values), 0)
    mesh = axes.pcolormesh(shown, cmap="viridis", edgecolors="none", norm="log" if shown.count() else None)
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=30, ha="right", color=INK)
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers, color=INK)
    axes.invert_yaxis()
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes)
    bar.outline.set_edgecolor(INK)
    bar.ax.tick_params(colors=INK)
    bar.set_label("mean KL divergence, nats", color=INK)
    return _svg(figure)


def part_table(parts: dict[Part, float]) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Kinds, layers, and the values as a table, NaN where there is none: shape (layers, kinds)."""
    kinds = list(dict.fromkeys(kind for _, kind in parts))
    layers = sorted({layer for layer, _ in parts}, key=lambda layer: -1 if layer is None else layer)
    values = np.array([[parts.get((layer, kind), np.nan) for kind in kinds] for layer in layers])
    return kinds, ["no layer" if layer is None else f"layer {layer}" for layer in layers], values


def _cycle(count: int) -> Sequence[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _axes(x: str, y: str, height: float = 3.6, width: float = 7.2) -> tuple[Any, Any]:
    figure = matplotlib()(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, which="both")
    axes.grid(visible=True, color=INK, alpha=0.12)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text))
