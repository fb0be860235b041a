"""What plain quantization costs, and how much of it quantization-aware distillation recovers, on held-out text.

    python bench/qat.py MODEL --text TRAIN... --held-out TEXT --presets Q4_0 Q3_K_S Q2_K --output DIR

MODEL is a Hugging Face checkpoint: it is the teacher, and the student begins as its copy on the blocks of a preset.
Each preset is one recipe for `gguforge distill train`, so a run that was stopped goes on. Held-out text must be none of
the training text; passages that both hold are counted and reported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gguforge.distill.recipe import read_recipe
from gguforge.distill.train import train_recipe
from gguforge.runtime.overlap import fingerprint, shared

RECIPE = """
[data]
text = {text}
held_out = {held_out}
context = {context}
held_out_documents = {documents}
[teacher]
checkpoint = {model}
[student]
checkpoint = {model}
[losses]
forward_kl = 1
[schedule]
steps = {steps}
batch = {batch}
rate = {rate}
seeds = {seeds}
evaluate = {steps}
save = 50
[hardware]
device = "auto"
threads = {threads}
[blocks]
preset = {preset}
refresh = {refresh}
scales_only = {scales_only}
[report]
baseline = false
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", default=["Q4_0", "Q3_K_S", "Q2_K"])
    parser.add_argument("--output", type=Path, required=True)
    for name, default in (("steps", 500), ("batch", 2), ("context", 256), ("documents", 40), ("refresh", 25)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scales-only", action="store_true")
    return parser.parse_args()


def overlap(held_out: list[Path], text: list[Path]) -> float:
    """The share of the held-out passages that the training text holds as well."""
    ours, theirs = ("\n".join(path.read_text(errors="replace") for path in paths) for paths in (held_out, text))
    return shared(fingerprint(ours), fingerprint(theirs))


def main() -> None:
    given = arguments()
    print(f"held-out passages that are in the training text: {100 * overlap(given.held_out, given.text):.2f} %")
    values = {name: json.dumps(value, default=lambda path: str(path.resolve())) for name, value in vars(given).items()}
    for preset in given.presets:
        folder = given.output / preset
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(RECIPE.format(**values | {"preset": json.dumps(preset)}))
        train_recipe(read_recipe(folder / "recipe.toml"), folder)
        show(preset, json.loads((folder / "report.json").read_text()))


def show(preset: str, report: dict[str, object]) -> None:
    """One line a seed."""
    whole: dict[str, float] = report["unquantized"]  # type: ignore[assignment]
    runs: dict[str, dict[str, dict[str, float]]] = report["runs"]  # type: ignore[assignment]
    for name, run in runs.items():
        start, end = run["start"], run["end"]
        lost = {key: start[key] - whole[key] for key in ("cross_entropy", "divergence")}
        kept = {key: (start[key] - end[key]) / lost[key] for key in lost}
        print(
            f"{preset} {name}: cross-entropy {whole['cross_entropy']:.4f} unquantized, "
            f"{start['cross_entropy']:.4f} plain, {end['cross_entropy']:.4f} trained: {100 * kept['cross_entropy']:.0f} % recovered; "
            f"KLD {start['divergence']:.4f} -> {end['divergence']:.4f}: {100 * kept['divergence']:.0f} %; "
            f"same top {100 * start['same_top']:.1f} -> {100 * end['same_top']:.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
