"""What plain quantization costs, and how much of it quantization-aware distillation recovers, on held-out text.

    python bench/qat.py MODEL --text TRAIN... --held-out TEXT --presets Q4_0 Q3_K_S Q2_K --output DIR

MODEL is a Hugging Face checkpoint: it is the teacher, and the student begins as its copy on the blocks of a preset.
Each preset is one recipe for `gguforge distill train`, so a run that was stopped goes on. Held-out text that shares
passages with the training text is refused.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from texts import refuse_overlap

from gguforge.distill.grid import Grid, placements, plan_blocks
from gguforge.distill.measure import Measured
from gguforge.distill.processes import processes
from gguforge.distill.recipe import Recipe, read_recipe
from gguforge.distill.train import train_recipe
from gguforge.distill.workshop import Workshop

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
precision = {precision}
[blocks]
preset = {preset}
refresh = {refresh}
scales_only = {scales_only}
{guide}
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
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--imatrix", type=Path, help="guides the search for scales; plain quantization has none")
    parser.add_argument("--scales-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    refuse_overlap(given.held_out, given.text)
    values = {name: json.dumps(value, default=lambda path: str(path.resolve())) for name, value in vars(given).items()}
    for preset in given.presets:
        folder = given.output / preset
        folder.mkdir(parents=True, exist_ok=True)
        guide = "" if given.imatrix is None else f"imatrix = {values['imatrix']}"
        (folder / "recipe.toml").write_text(RECIPE.format(**values | {"preset": json.dumps(preset), "guide": guide}))
        recipe = read_recipe(folder / "recipe.toml")
        plain = None if given.imatrix is None else asdict(plainly_quantized(recipe, folder))
        train_recipe(recipe, folder, told)
        show(preset, plain, json.loads((folder / "report.json").read_text()))


def told(name: str, step: int, losses: dict[str, float]) -> None:
    """Print every 50th step."""
    if step % 50 == 0:
        print(f"{name} step {step}: loss {losses['loss']:.4f}", flush=True)


def plainly_quantized(recipe: Recipe, folder: Path) -> Measured:
    """What `gguforge quantize` alone gives: the preset's blocks, without importance matrix or training."""
    assert recipe.blocks is not None
    with processes(recipe.hardware.device, recipe.hardware.threads) as group:
        shop = Workshop(recipe, folder, group)
        student = shop.student(0)
        plan = plan_blocks(shop.home, recipe.blocks.preset)
        Grid(dict(student.named_parameters()), plan, placements(plan, shop.home))
        found = shop.worth(student)
    assert found is not None
    return found


def show(preset: str, plain: dict[str, float] | None, report: dict[str, Any]) -> None:
    """One line a seed; without importance matrix, plain quantization is where training begins."""
    whole = report["unquantized"]
    for name, run in report["runs"].items():
        base = plain or run["start"]
        stages = {"plain": base, "with importance": run["start"], "trained": run["end"]}
        parts = [f"{preset} {name}: unquantized {whole['cross_entropy']:.4f}"]
        for stage, found in stages.items():
            if stage == "with importance" and plain is None:
                continue
            shares = [
                f"{100 * (base[key] - found[key]) / (base[key] - whole[key]):.0f} %"
                for key in ("cross_entropy", "divergence")
            ]
            parts.append(
                f"{stage} {found['cross_entropy']:.4f} ({shares[0]} recovered), KLD {found['divergence']:.4f} "
                f"({shares[1]}), same top {100 * found['same_top']:.1f} %"
            )
        print("; ".join(parts), flush=True)


if __name__ == "__main__":
    main()
