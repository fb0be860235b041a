"""KL divergence of `gguforge quantize --quality` against llama-quantize with llama-imatrix, at the same tensor bytes.

    python3 bench/quality.py model-f16.gguf --calibration calibration.txt --held-out test.txt \\
        --llama-imatrix path/to/llama-imatrix --llama-quantize path/to/llama-quantize

Both sides see the same calibration text; the divergence from the model is measured on the other, by the real kernels. A
pair of texts that share passages is refused. Prints a Markdown table; fails when the tensors of a file take other bytes
than the peer's, or when the targets (0.9 of the peer's divergence for high, 0.5 for best) are missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from texts import refuse_overlap
from turns import run

from gguforge.quant.reader import read_gguf
from gguforge.runtime.evaluate import evaluate

TARGETS = {"high": 0.9, "best": 0.5}


@dataclass(frozen=True)
class Row:
    """One file: its tensors' bytes, mean divergence and standard error, processor seconds of making it."""

    name: str
    nbytes: int
    divergence: float
    error: float
    seconds: float


def ways(given: argparse.Namespace, type: str, imatrix: Path) -> dict[str, list[object]]:
    """The commands that make a file, but for its name; the peer comes first."""
    ours = [sys.executable, "-m", "gguforge.cli", "quantize", given.model, "--type", type, "--overwrite", "-q"]
    text = ["-f", given.calibration, "--threads", given.threads]
    if given.calibration_chunks:
        text += ["--calibration-chunks", given.calibration_chunks]
    found: dict[str, list[object]] = {
        "llama-quantize": [given.llama_quantize, "--imatrix", imatrix, given.model],
        "high": [*ours, "--quality", "high", "--imatrix", imatrix, "-o"],
        "high -f": [*ours, "--quality", "high", *text, "-o"],
        "best": [*ours, "--quality", "best", *text, "-o"],
    }
    return {name: words for name, words in found.items() if name in ("llama-quantize", *given.ways.split(","))}


def measured(given: argparse.Namespace, name: str, file: Path, seconds: float) -> Row:
    """Evaluate one file."""
    found = evaluate(file, given.held_out, against=given.model, chunks=given.chunks, threads=given.threads)
    assert found.comparison is not None
    nbytes = sum(tensor.nbytes for tensor in read_gguf(file).tensors)
    return Row(name, nbytes, found.comparison.mean.value, found.comparison.mean.error, seconds)


def table(type: str, rows: list[Row]) -> str:
    """Markdown lines, the peer first."""
    lines = []
    for row in rows:
        ratio = row.divergence / rows[0].divergence
        figures = f"{row.divergence:.5f} ± {row.error:.5f} | {ratio:.3f} | {row.seconds:.0f}"
        lines.append(f"| {type} | {row.name} | {row.nbytes} | {figures} |")
    return "\n".join(lines)


def missed(rows: list[Row]) -> list[str]:
    """What is wrong with the results."""
    peer = rows[0]
    found = [f"{row.name}: {row.nbytes} bytes" for row in rows if row.nbytes != peer.nbytes]
    for row in rows[1:]:
        target = TARGETS[row.name.split()[0]]
        if row.divergence > target * peer.divergence:
            found.append(f"{row.name}: {row.divergence / peer.divergence:.3f}, target {target}")
    return found


def main() -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--llama-imatrix", required=True)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--types", default="Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--ways", default="high,high -f,best")
    parser.add_argument("--chunks", type=int, help="of the held-out text")
    parser.add_argument("--calibration-chunks", type=int, help="for ours; the peer always reads the whole text")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    refuse_overlap([given.held_out], [given.calibration])
    wrong = []
    print("| type | made by | tensor bytes | mean KLD | ratio | processor s |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        imatrix, output = Path(folder) / "imatrix.gguf", Path(folder) / "model.gguf"
        words = ["-m", given.model, "-f", given.calibration, "-o", imatrix, "--no-ppl", "-t", given.threads]
        run([given.llama_imatrix, *words])
        for type in given.types.split(","):
            rows = []
            for name, command in ways(given, type, imatrix).items():
                end = [output, type, given.threads] if name == "llama-quantize" else [output]
                rows.append(measured(given, name, output, run([*command, *end])[0].processor))
            print(table(type, rows), flush=True)
            wrong += [f"{type} {line}" for line in missed(rows)]
    print("\n".join(["", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
