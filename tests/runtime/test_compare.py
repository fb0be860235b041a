"""Comparing files of one model: figures are those of `evaluate`, parts add up to the whole, the page shows them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import plan_of_file, quantize
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write
from gguforge.runtime.answers import Piece, marked
from gguforge.runtime.charts import part_table
from gguforge.runtime.compare import Report, compare
from gguforge.runtime.evaluate import evaluate
from gguforge.runtime.hybrid import differing_parts, hybrid

CHUNK = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} hello user, a list he said it in {i * i}.\n" for i in range(12)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(random_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for preset in ("Q8_0", "Q4_0"):
        quantize(random_path, folder / f"{preset}.gguf", preset, workers=1)
    return [folder / "Q8_0.gguf", folder / "Q4_0.gguf"]


@pytest.fixture(scope="module")
def report(files: list[Path], random_path: Path, text: Path) -> Report:
    return compare(
        files, random_path, text, context=CHUNK, part_chunks=2, prompts=("hello",), answer_tokens=8, threads=1
    )


def plan(path: Path) -> Plan:
    return plan_of_file(read_gguf(path))


def test_figures_are_those_of_evaluate(report: Report, files: list[Path], random_path: Path, text: Path) -> None:
    alone = evaluate(files[1], text, against=random_path, context=CHUNK, threads=1)
    assert [one.type for one in report.candidates] == ["Q4_0", "Q8_0"], "smallest first"
    assert report.candidates[0].evaluation.comparison == alone.comparison
    assert report.candidates[0].nbytes == files[1].stat().st_size
    assert report.candidates[0].divergence > report.candidates[1].divergence > 0
    assert report.frontier() == list(report.candidates)


def test_divergence_by_position_averages_to_the_mean(report: Report) -> None:
    for one in report.candidates:
        assert len(one.evaluation.by_position) == CHUNK // 2 - 1
        assert np.mean(one.evaluation.by_position) == pytest.approx(one.divergence)


def test_a_file_beaten_by_a_smaller_one_is_off_the_frontier(
    files: list[Path], random_path: Path, text: Path, tmp_path: Path
) -> None:
    padded = tmp_path / "padded.gguf"  # Q4_0 everywhere but in the head: larger, and worse than Q8_0 all the same
    write(hybrid(plan(files[1]), plan(random_path), ["token_embd.weight"]), padded, workers=1)
    found = compare([files[0], padded], random_path, text, context=CHUNK, chunks=4, threads=1)
    sizes = {one.path: one.nbytes for one in found.candidates}
    assert sizes[padded] > sizes[files[0]]
    assert [one.path for one in found.frontier()] == [files[0]]


def test_parts_name_every_quantized_tensor(report: Report) -> None:
    parts = report.candidates[0].parts
    assert {(0, "attn_q"), (1, "ffn_down")} <= set(parts)
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(report.candidates[0].divergence, rel=1), "of one order"
    kinds, layers, values = part_table(parts)
    assert layers[-2:] == ["layer 0", "layer 1"]
    assert values.shape == (len(layers), len(kinds))
    assert np.nansum(values) == pytest.approx(sum(parts.values()))


def test_the_hybrid_of_all_parts_is_the_file(files: list[Path], random_path: Path, text: Path, tmp_path: Path) -> None:
    base, other = plan(random_path), plan(files[1])
    names = [name for part in differing_parts(base, other).values() for name in part]
    write(hybrid(base, other, names), tmp_path / "all.gguf", workers=1)
    both = [
        evaluate(path, text, against=random_path, context=CHUNK, threads=1).comparison
        for path in (tmp_path / "all.gguf", files[1])
    ]
    assert both[0] == both[1]


def test_another_models_tensors_are_refused(random_path: Path, tmp_path: Path) -> None:
    other = plan(write_tiny_model(tmp_path / "other.gguf", answer=("▁another", "▁answer")))
    with pytest.raises(InputError, match=r"token_embd.*is no quantized form of the reference"):
        hybrid(plan(random_path), other, ["token_embd.weight"])


PIECES = st.lists(st.sampled_from("abc"), max_size=8).map(lambda texts: tuple(Piece(text) for text in texts))


@given(PIECES, PIECES)
def test_marks_leave_a_common_subsequence(ours: tuple[Piece, ...], theirs: tuple[Piece, ...]) -> None:
    found = marked(ours, theirs)
    assert [piece.text for piece in found] == [piece.text for piece in ours]
    rest = iter(piece.text for piece in theirs)
    assert all(piece.text in rest for piece in found if not piece.differs)
    if ours == theirs:
        assert not any(piece.differs for piece in found)


def test_the_page_holds_every_figure_and_escapes_text(report: Report) -> None:
    pytest.importorskip("matplotlib")
    from gguforge.runtime.report import page

    html = page(report)
    for one in report.candidates:
        assert f"{one.divergence:.5f}" in html
        assert one.path.name in html
    assert html.count("<svg") == 2 + len(report.candidates)
    assert not re.search(r'(src|href)="(http|//)', html), "self-contained"
    assert "currentColor" in html
    hostile = Report(
        report.reference, "<script>", report.reference_bytes, report.text, report.candidates, ("<b>x</b>",),
        ((Piece("<i>"),),), 2,
    )  # fmt: skip
    assert "<script>" not in page(hostile)
    assert "<b>x</b>" not in page(hostile)
