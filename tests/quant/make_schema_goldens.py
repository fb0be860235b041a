"""Makes schema_goldens.json from the golden files of llama.cpp's own test of type selection.

Run with the sources of llama.cpp (those inside llama-cpp-python 0.3.36 were used):
`python tests/quant/make_schema_goldens.py path/to/llama.cpp/tests/snapshots`.

For each model: the facts in its header; for each preset: how many tensors of each type deviate from the preset's base
type, and a digest of those deviations.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

GOLDENS = Path(__file__).parent / "schema_goldens.json"


def summary(deviations: Mapping[str, str]) -> dict[str, object]:
    """The golden form of a preset's deviations, types by tensor name."""
    lines = "\n".join(sorted(f"{name} {type.upper()}" for name, type in deviations.items()))
    counts = dict(sorted(Counter(type.upper() for type in deviations.values()).items()))
    return {"digest": hashlib.sha256(lines.encode()).hexdigest()[:16], "counts": counts}


def read_schema(text: str) -> dict[str, object]:
    """Facts and presets of one file."""
    facts = {key: int(value) for key, value in re.findall(r"(n_\w+)=(\d+)", text)}
    presets = {}
    for section in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        head, *lines = section.strip().splitlines()
        name, base = head.split("] ")
        presets[name] = {"base": base.upper()} | summary(dict(line.rsplit(" ", 1) for line in lines))
    return {"facts": facts, "presets": presets}


def main() -> None:
    """Write the file beside this script."""
    found = {path.stem: read_schema(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.schema"))}
    text = re.sub(r"\n {4,}|\n {3}(?=})", " ", json.dumps(found, indent=1))  # a line a preset
    GOLDENS.write_text(text + "\n")


if __name__ == "__main__":
    main()
