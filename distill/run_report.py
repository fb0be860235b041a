"""The report of a run: what every stage did and how long it took, the files with what they are worth, the training.

One HTML page without scripts or anything from elsewhere, and the same facts as JSON.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguforge.convert.json_file import read_object
from gguforge.distill.pipeline import REFERENCE, Pipeline
from gguforge.distill.report import HEAD, sections
from gguforge.distill.stages import Record, Stage, State
from gguforge.quant.files import replacing

MIB = 1 << 20
LARGEST = 1 << 30  # bytes of a training's report; every step's loss is in it

Report = dict[str, Any]


def write_report(pipeline: Pipeline, stages: Sequence[Stage], state: State) -> Report:
    """Write report.json and report.html; the former's content comes back."""
    report = described(pipeline, stages, state.records)
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.html", page(report))):
        data = text.encode()
        with replacing(pipeline.folder / name, len(data), overwrite=True) as part:
            part.write_bytes(data)
    return report


def described(pipeline: Pipeline, stages: Sequence[Stage], records: Mapping[str, Record]) -> Report:
    """The facts as JSON takes them."""
    known = [(one.name, records[one.name]) for one in stages]
    files = (
        [_file(pipeline, preset, records) for preset in dict.fromkeys((*pipeline.types, REFERENCE))]
        if pipeline.types
        else []
    )
    report = {
        "name": pipeline.recipe.output.name,
        "output": str(pipeline.folder),
        "stages": [{"stage": name, "seconds": record.seconds, **record.facts} for name, record in known],
        "seconds": round(sum(record.seconds for _, record in known), 3),
        "files": files,
        "training": _training(pipeline.training),
        "finish": None if pipeline.recipe.finish is None else _training(pipeline.finishing),
        "open": _opener(files[0]["file"], pipeline.writes) if files else "",
    }
    return report | {"summary": summary(report, pipeline)}


def _opener(file: str, writes: bool) -> str:
    """What opens a file: a chat, or for an encoder llama.cpp, which embeds a text."""
    if writes:
        return f"gguforge chat {file}"
    return f"python3 -c \"import llama_cpp; print(llama_cpp.Llama('{file}', embedding=True).embed('Hello.'))\""


def _file(pipeline: Pipeline, preset: str, records: Mapping[str, Record]) -> Report:
    made = records["convert" if preset == REFERENCE else f"quantize {preset}"].facts
    worth = records.get(f"evaluate {preset}")
    return {
        "file": str(pipeline.file(preset)),
        "type": preset,
        "bytes": made["bytes"],
        "bits_per_weight": made["bits_per_weight"],
        "evaluation": None if worth is None else worth.facts,
    }


def _training(folder: Path) -> Report | None:
    path = folder / "report.json"
    return read_object(path, LARGEST) if path.exists() else None


def summary(report: Report, pipeline: Pipeline) -> list[str]:
    """For people: what was won, what the files are worth, and how to open them."""
    found = {stage["stage"]: stage for stage in report["stages"]}
    lines = [line for name in ("train", "finish") if name in found for line in found[name]["summary"]]
    for file in report["files"]:
        worth = f": {file['evaluation']['line']}" if file["evaluation"] is not None else ""
        lines.append(f"{file['file']}, {file['bytes'] / MIB:.2f} MiB{worth}")
    lines.append(f"the report: {Path(report['output']) / 'report.html'}")
    ending = f"{'chat' if pipeline.writes else 'embed'} with it: {report['open']}"
    lines.append(ending if report["open"] else f"the student: {pipeline.training / 'checkpoint'}")
    return lines


def page(report: Report) -> str:
    """The report as one HTML page."""
    name = html.escape(report["name"])
    stages = {stage["stage"]: stage for stage in report["stages"]}
    parts = [
        HEAD.replace("<title>Distillation</title>", f"<title>{name}</title>"),
        f"<h1>{name}</h1>",
        f"<p>Made in {_minutes(report['seconds'])} by {len(stages)} stages.</p>",
        f"<p><code>{html.escape(report['open'])}</code></p>" if report["open"] else "",
        *(_paragraphs(stages[one]["summary"]) for one in ("train", "finish") if one in stages),
        _files(report["files"]),
        _stages(report["stages"]),
    ]
    for key, title in (("training", "Training"), ("finish", "Training on blocks")):
        if report[key] is not None:
            parts.append(f"<h1>{title}</h1>{sections(report[key])}")
    return f"{''.join(parts)}</body></html>\n"


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p><b>{html.escape(line)}</b></p>" for line in lines)


def _minutes(seconds: float) -> str:
    """A time for people.

    >>> _minutes(4.2), _minutes(75), _minutes(7300)
    ('4.2 s', '1 min 15 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


MEASURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kld": ("KLD from {}", lambda found: _estimate(found, 5)),
    "same_top": ("same top", lambda found: f"{100 * found['value']:.1f} %"),
    "cosine": ("cosine to {}", lambda found: f"{found:.5f}"),
    "rank_correlation": ("rank correlation with {}", lambda found: f"{found:.5f}"),
}
"""What a file is compared by: a column's title, and how its values are written."""


def _files(files: Sequence[Report]) -> str:
    """Size and worth of every file; notes below."""
    if not files:
        return ""
    worth = [file["evaluation"] or {} for file in files]
    columns = list(
        dict.fromkeys(
            (name, key)
            for one in worth
            for name, found in one.get("against", {}).items()
            for key in MEASURES
            if found.get(key) is not None
        )
    )
    read = any("perplexity" in one for one in worth)
    head = ["file", "MiB", "bits a weight", *(["perplexity"] if read else [])]
    head += [MEASURES[key][0].format(name) for name, key in columns]
    notes = dict.fromkeys(note for one in worth for note in one.get("notes", ()))
    texts = dict.fromkeys(one["text"] for one in worth if one)
    unit = ", nats a token" if read else ""
    theirs: Report = next((one["against"]["teacher"] for one in worth if "teacher" in one.get("against", {})), {})
    unit += f"; the teacher's perplexity is {_estimate(theirs['perplexity'], 3)}" if "perplexity" in theirs else ""
    said = f"<p>Measured by llama.cpp on {html.escape(', '.join(texts))}{unit}.</p>" if texts else ""
    rows = [_file_row(file, read, columns) for file in files]
    return f"<h2>Files</h2><div class=files>{_table(head, rows)}</div>{said}" + "".join(
        f"<p>{html.escape(note)}</p>" for note in notes
    )


def _file_row(file: Report, read: bool, columns: Sequence[tuple[str, str]]) -> list[str]:
    worth = file["evaluation"] or {}
    row = [html.escape(Path(file["file"]).name), f"{file['bytes'] / MIB:.2f}", f"{file['bits_per_weight']:.2f}"]
    row += [_estimate(worth.get("perplexity"), 3)] if read else []
    for judge, key in columns:
        value = worth.get("against", {}).get(judge, {}).get(key)
        row.append("" if value is None else MEASURES[key][1](value))
    return row


def _estimate(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return ""
    return f"{found['value']:.{digits}f} <small>± {found['error']:.{digits}f}</small>"


def _stages(stages: Sequence[Report]) -> str:
    rows = []
    for stage in stages:
        said = [stage["line"], *stage.get("warnings", ())]
        rows.append([html.escape(stage["stage"]), "<br>".join(map(html.escape, said)), _minutes(stage["seconds"])])
    table = _table(["stage", "what it did", "time"], rows)
    return f"<h2>Stages</h2><div class=text>{table}</div>"
