"""The page of a comparison: one HTML file with everything inside, readable in light and in dark.

It computes nothing; the plots come from `gguforge.runtime.charts`.
"""

from __future__ import annotations

from pathlib import Path

from gguforge.quant.quantize import types_count
from gguforge.runtime.charts import frontier_plot, part_plot, position_plot
from gguforge.runtime.compare import Candidate, Report

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def page(report: Report) -> str:
    """The page as HTML.

    Raises:
        GGUForgeError: matplotlib is not installed.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        best=[one.path for one in report.frontier()],
        frontier=Markup(frontier_plot(report)),
        positions=Markup(position_plot(report)),
        maps=[(one, Markup(part_plot(one))) for one in report.candidates if one.parts],
        types={one.path: _types(one) for one in report.candidates},
        tensors=_tensors(report),
    )


def _types(candidate: Candidate) -> str:
    """Share of bytes by type, the largest first: `Q4_K 71 %, Q6_K 29 %`."""
    count = types_count(candidate.plan)
    whole = sum(nbytes for _, nbytes in count.values()) or 1
    shares = ((kind.name, round(100 * nbytes / whole)) for kind, (_, nbytes) in count.items())
    return ", ".join(f"{name} {share} %" for name, share in shares if share)


def _tensors(report: Report) -> list[tuple[str, list[str]]]:
    """Each matrix and its type in each file."""
    tables = [{tensor.name: tensor.type.name for tensor in one.plan.tensors} for one in report.candidates]
    names = [tensor.name for tensor in report.candidates[0].plan.tensors if len(tensor.shape) > 1]
    return [(name, [types.get(name, "") for types in tables]) for name in names]
