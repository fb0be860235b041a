"""The report of a recipe: what was trained, what it is worth beside its baseline and its teacher, and the curves.

One HTML page without scripts or anything from elsewhere; its plots are plain SVG in the page's own colours.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from gguforge.distill.measure import Measured

if TYPE_CHECKING:
    from gguforge.distill.train import Run, Trained

CLAIM = 3  # seeds that a claim needs
WIDTH, HEIGHT, MARGIN = 720, 260, 54  # of a plot, in pixels
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6")


def gap_closed(base: float, student: float, teacher: float) -> float:
    """The share of the way from `base` to `teacher` that the student came; NaN where there is no way.

    >>> gap_closed(3.0, 2.5, 2.0)
    0.5
    """
    return (base - student) / (base - teacher) if base > teacher else math.nan


def gaps(trained: Trained) -> dict[str, list[float]]:
    """What was won, one number a seed: against the baseline, and against plain quantization."""
    found: dict[str, list[float]] = {}
    for run in students(trained):
        baseline = trained.runs.get(f"baseline-{run.seed}")
        if run.end is None:
            continue
        if baseline is not None and baseline.end is not None and not math.isnan(run.end.teacher_cross_entropy):
            closed = gap_closed(baseline.end.cross_entropy, run.end.cross_entropy, run.end.teacher_cross_entropy)
            found.setdefault("gap to the teacher closed", []).append(closed)
        if trained.unquantized is not None and run.start is not None:
            for name, label in (("cross_entropy", "loss"), ("divergence", "divergence")):
                plain, ours, whole = (getattr(one, name) for one in (run.start, run.end, trained.unquantized))
                found.setdefault(f"{label} of plain quantization recovered", []).append(gap_closed(plain, ours, whole))
    return found


def students(trained: Trained) -> list[Run]:
    """The runs that follow the recipe."""
    return [run for name, run in trained.runs.items() if name.startswith("student-")]


def described(trained: Trained) -> dict[str, Any]:
    """The facts as JSON takes them; what is not known is null."""

    def plain(found: Measured | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {name: _known(value) for name, value in asdict(found).items()}

    return {
        "parameters": trained.parameters,
        "memory": asdict(trained.memory) | {"total": trained.memory.total},
        "unquantized": plain(trained.unquantized),
        "gaps": {name: [_known(value) for value in values] for name, values in gaps(trained).items()},
        "runs": {
            name: {
                "seed": run.seed, "start": plain(run.start), "end": plain(run.end),
                "losses": run.history.losses, "held_out": run.history.held_out,
            }
            for name, run in trained.runs.items()
        },
    }  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def summary(trained: Trained) -> list[str]:
    """What was won, a line each."""
    lines = []
    for name, values in gaps(trained).items():
        known = [value for value in values if not math.isnan(value)]
        if not known:
            lines.append(f"{name}: there was nothing to win")
            continue
        spread = f" ± {100 * stdev(known):.0f}" if len(known) > 1 else ""
        few = "" if len(known) >= CLAIM else f" ({len(known)} seed{'s' * (len(known) > 1)}; a claim needs {CLAIM})"
        lines.append(f"{name}: {100 * mean(known):.0f}{spread} %{few}")
    return lines


COLUMNS = {
    "cross_entropy": "cross-entropy",
    "accuracy": "accuracy",
    "divergence": "KL to teacher",
    "same_top": "same top token",
    "calibration_error": "calibration error",
    "loss": "loss",
    "cosine": "cosine to teacher",
    "rank_correlation": "rank correlation",
}
TEACHERS = {"cross_entropy": "teacher_cross_entropy", "accuracy": "teacher_accuracy"}


def verdict(found: Measured) -> str:
    """What a student is worth, in a few words: its cross-entropy, or without a head its loss; and its embeddings."""
    main = "loss" if math.isnan(found.cross_entropy) else "cross_entropy"
    keys = (main, "cosine", "rank_correlation")
    known = [(COLUMNS[key], getattr(found, key)) for key in keys if not math.isnan(getattr(found, key))]
    return ", ".join(f"{label} {value:.4f}" for label, value in known) + " on held-out text"


def page(trained: Trained) -> str:
    """The report as one HTML page."""
    parts = [
        "<h1>Distillation</h1>",
        f"<p>{trained.parameters:,} parameters; expected memory {trained.memory.total / 2**30:.2f} GiB.</p>",
        "".join(f"<p><b>{html.escape(line)}</b></p>" for line in summary(trained)),
        sections(described(trained)),
    ]
    return f"{HEAD}{''.join(parts)}</body></html>\n"


def sections(found: Mapping[str, Any]) -> str:
    """The figures and the curves of what `described` gave."""
    runs = found["runs"]
    rows = [("unquantized", found["unquantized"])]
    rows += [(f"{name}, {when}", run[key]) for name, run in runs.items() for when, key in WHEN.items()]
    held_out = {name: run["held_out"] for name, run in runs.items() if run["held_out"]}
    parts = [
        _table([(name, _measured(one)) for name, one in rows if one is not None]),
        "<h2>Loss while training</h2>",
        plot({name: smoothed(run["losses"]) for name, run in runs.items()}, "step", "loss, nats"),
    ]
    if held_out:
        parts += ["<h2>On held-out text</h2>", plot(held_out, "step", "loss, nats")]
    return "".join(parts)


WHEN = {"before": "start", "after": "end"}


def _measured(found: Mapping[str, Any]) -> Measured:
    """What `described` made of it."""
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in found.items()}
    return Measured(**values)


HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Distillation</title><style>
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:860px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #8884}
td{white-space:nowrap}div{overflow-x:auto}td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}
small{opacity:.6}.text td,.text th{text-align:left;vertical-align:top}.text td:nth-child(2){white-space:normal}
.files{font-size:14px}.files td,.files th{padding:.2rem .5rem}code{background:#8882;padding:.2rem .5rem}
</style></head><body>"""


def _table(rows: Sequence[tuple[str, Measured]]) -> str:
    if not rows:
        return "<p>No held-out text was given: nothing is measured.</p>"
    shown = {key: label for key, label in COLUMNS.items() if any(not math.isnan(getattr(one, key)) for _, one in rows)}
    head = "".join(f"<th>{label}</th>" for label in shown.values())
    lines = [
        f"<tr><td>{html.escape(name)}</td>" + "".join(_cell(getattr(found, key)) for key in shown) + "</tr>"
        for name, found in rows
    ]
    first = rows[0][1]
    teacher = {key: getattr(first, TEACHERS[key]) if key in TEACHERS else math.nan for key in shown}
    if any(not math.isnan(value) for value in teacher.values()):
        lines.insert(0, "<tr><td>teacher</td>" + "".join(map(_cell, teacher.values())) + "</tr>")
    what = "texts" if math.isnan(first.cross_entropy) else "tokens"
    return f"<h2>On {first.positions:,} held-out {what}</h2><table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _cell(value: float) -> str:
    return "<td></td>" if math.isnan(value) else f"<td>{value:.4f}</td>"


def smoothed(losses: Sequence[float], points: int = 200) -> list[tuple[int, float]]:
    """Step and mean loss, at most so many points.

    >>> smoothed([4.0, 2.0, 3.0, 1.0], 2)
    [(2, 3.0), (4, 2.0)]
    """
    size = max(1, -(-len(losses) // points))
    return [
        (min(start + size, len(losses)), mean(losses[start : start + size])) for start in range(0, len(losses), size)
    ]


def plot(lines: Mapping[str, Sequence[tuple[int, float]]], x_label: str, y_label: str) -> str:
    """Lines over steps as SVG: two ticks an axis, a legend above."""
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (y - low_y) / ((high_y - low_y) or 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)}">']
    for i, (name, line) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line if math.isfinite(y))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts.append(f'<text x="{MARGIN + 130 * i}" y="16" style="fill:{color}">{html.escape(name)}</text>')
    bottom = HEIGHT - MARGIN
    ticks = ((bottom, low_y), (MARGIN + 4, high_y))
    parts += [
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="currentColor" opacity=".4"/>',
        *(f'<text x="{MARGIN - 6}" y="{at}" text-anchor="end">{y:.3g}</text>' for at, y in ticks),
        f'<text x="{MARGIN}" y="{bottom + 18}">{low_x}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 18}" text-anchor="end">{high_x}</text>',
        f'<text x="{WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text x="4" y="{MARGIN - 12}">{html.escape(y_label)}</text></svg>',
    ]
    return "".join(parts)
