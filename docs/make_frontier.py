"""Makes docs/frontier.svg: the demo model's presets, size against divergence, on questions it was not trained on.

python3 docs/make_frontier.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from gguforge.convert import convert
from gguforge.distill.demo.demonstration import CHECKPOINT
from gguforge.distill.demo.lessons import read_course
from gguforge.quant.quantize import quantize
from gguforge.runtime.charts import frontier_plot, standalone
from gguforge.runtime.compare import compare

PRESETS = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def main() -> None:
    """Quantize, compare, draw."""
    lessons = read_course().lessons
    talks = [
        [("user", question), ("assistant", next(iter(one.answers)))] for one in lessons for question in one.held_out
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "held-out.jsonl"
        lines = ([{"role": role, "content": content} for role, content in talk] for talk in talks)
        text.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        full = folder / "BF16.gguf"
        convert(CHECKPOINT, full, type="BF16", workers=1)
        files = [folder / f"{preset}.gguf" for preset in PRESETS]
        for file in files:
            quantize(full, file, file.stem, workers=1)
        report = compare(files, full, text, context=128)
    svg = standalone(frontier_plot(report))
    Path(__file__).with_name("frontier.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
