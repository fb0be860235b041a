"""The report of a run: what every stage did and how long it took, the files with what they are worth, the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguforge.convert.json_file import read_object
from gguforge.distill.stages import Record, Stage, State
from gguforge.distill.way import REFERENCE, Way
from gguforge.quant.files import replacing


def write_report(way: Way, stages: Sequence[Stage], state: State) -> dict[str, Any]:
    """Write report.json and report.html; the former's content comes back."""
    report = described(way, stages, state.records)
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"),):
        data = text.encode()
        with replacing(way.folder / name, len(data), overwrite=True) as part:
            part.write_bytes(data)
    return report


def described(way: Way, stages: Sequence[Stage], records: Mapping[str, Record]) -> dict[str, Any]:
    """The facts as JSON takes them."""
    files = []
    for preset in dict.fromkeys((*way.types, REFERENCE)) if way.types else ():
        made = records["convert" if preset == REFERENCE else f"quantize {preset}"].facts
        worth = records.get(f"evaluate {preset}")
        size = {"bytes": made["bytes"], "bits_per_weight": made["bits_per_weight"]}
        found = None if worth is None else worth.facts
        files.append({"file": str(way.file(preset)), "type": preset, **size, "evaluation": found})
    opened = f"gguforge chat {way.file(way.types[0])}" if way.types else ""
    lines = [line for name in ("train", "finish") if name in records for line in records[name].facts["summary"]]
    lines += [f"{preset['file']}: {preset['evaluation']['line']}" for preset in files if preset["evaluation"]]
    lines.append(f"wrote {way.folder / 'report.html'}")
    lines.append(f"chat with it: {opened}" if opened else f"the student is {way.training / 'checkpoint'}")
    return {
        "output": str(way.folder),
        "stages": [
            {"stage": one.name, "seconds": records[one.name].seconds, **records[one.name].facts} for one in stages
        ],
        "files": files,
        "training": _training(way.training),
        "finish": _training(way.finishing),
        "open": opened,
        "summary": lines,
    }


def _training(folder: Path) -> dict[str, Any] | None:
    path = folder / "report.json"
    return read_object(path, 1 << 30) if path.exists() else None
