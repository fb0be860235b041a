"""Files of a chosen size against llama.cpp's presets of that size, on held-out text.

    python3 bench/size_quality.py MODEL-F16.gguf --text calibration.txt --held-out held-out.txt

For each preset, `fit_size` chooses the types for exactly its bytes, measured on the first text; then both files, and
the best of the presets that are smaller, are measured on the second. A pair of texts that share passages is refused.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from texts import refuse_overlap

from gguforge.quant.imatrix import read_imatrix
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import Guide, plan_of_file, retype
from gguforge.quant.reader import read_gguf
from gguforge.runtime.divergence import Estimate
from gguforge.runtime.meter import Meter
from gguforge.runtime.sizing import Measuring, fit_size


def divergence(meter: Meter, plan: Plan) -> Estimate:
    """Mean KL divergence and its standard error, nats."""
    comparison = meter.evaluation(plan).comparison
    assert comparison is not None
    return comparison.mean


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, type=Path, help="the choice is made on this")
    parser.add_argument("--held-out", required=True, type=Path, help="and measured on this")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix, used for presets and choice alike")
    parser.add_argument("--presets", default="Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=12, help="chunks for the choice, and for its verification")
    parser.add_argument("--held-out-chunks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    refuse_overlap([given.held_out], [given.text])
    guide = None if given.imatrix is None else Guide.from_matrix(read_imatrix(given.imatrix), str(given.imatrix))
    base = plan_of_file(read_gguf(given.model))
    print("| size of | bytes | its KLD | best smaller preset | chosen types: bytes | KLD | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        how = Measuring(
            given.text, context=given.context, chunks=given.chunks, threads=given.threads, workers=given.threads,
            store=Path(folder) / "sweep.json",
        )  # fmt: skip
        with Meter(
            given.model, given.held_out, context=given.context, chunks=given.held_out_chunks, threads=given.threads,
            workers=given.threads,
        ) as meter:  # fmt: skip
            for preset in given.presets.split(","):
                plan = retype(base, preset, guide=guide)
                found = fit_size(given.model, plan.size, how, guide=guide)
                plain, chosen = divergence(meter, plan), divergence(meter, found.best.plan)
                smaller = [rival for rival in found.rivals if rival.plan.size < plan.size]
                other = f"{smaller[0].name} {divergence(meter, smaller[0].plan).value:.5f}" if smaller else ""
                cells = [
                    preset, f"{plan.size:,}", f"{plain.value:.5f} ± {plain.error:.5f}", other,
                    f"{found.best.plan.size:,}", f"{chosen.value:.5f} ± {chosen.error:.5f}",
                    f"{chosen.value / plain.value:.2f}x",
                ]  # fmt: skip
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
