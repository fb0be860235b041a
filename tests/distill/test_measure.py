"""What a student is worth, what training needs, and how a report says it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gguforge.distill.batches import untaught
from gguforge.distill.footprint import footprint
from gguforge.distill.measure import Measured, calibration_error
from gguforge.distill.recipe import Losses, Recipe, StudentPart
from gguforge.distill.report import described, gaps, page, plot, smoothed, summary
from gguforge.distill.train import Run, Trained
from gguforge.distill.trainer import History

CONFIG = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500}


def worth(loss: float, divergence: float = math.nan, teacher: float = math.nan) -> Measured:
    return Measured(1000, loss, divergence, 0.9, teacher, 0.01)


def trained(runs: dict[str, tuple[Measured | None, Measured | None]], unquantized: Measured | None = None) -> Trained:
    recipe = Recipe(StudentPart(), Losses(cross_entropy=1))
    made = {
        name: Run(name, int(name[-1]), History([3.0, 2.0, 1.0], [(2, 2.5)]), start, end)
        for name, (start, end) in runs.items()
    }
    return Trained(recipe, made, unquantized, footprint(1000, CONFIG, 64), 1000)


def test_measuring_agrees_with_the_formulas() -> None:
    torch = pytest.importorskip("torch")
    from gguforge.distill.measure import measured

    generator = np.random.default_rng(0)
    tables = [torch.from_numpy(generator.normal(size=(20, 20)).astype(np.float32)) for _ in range(2)]

    def model(table: Any) -> Any:
        """Scores that depend on the last token alone."""

        class Table(torch.nn.Module):  # type: ignore[misc]
            def forward(self, input_ids: Any, attention_mask: Any, output_hidden_states: bool) -> Any:
                return SimpleNamespace(logits=table[input_ids])

        return Table()

    documents = [untaught(generator.integers(20, size=n).astype(np.int32), np.arange(n) > 0) for n in (5, 9, 7, 8, 6)]
    found = measured(model(tables[0]), model(tables[1]), documents, "cpu")
    before = np.concatenate([d.input_ids[:-1] for d in documents])
    after = np.concatenate([d.input_ids[1:] for d in documents])
    q, p = (table.numpy()[before] - np.log(np.exp(table.numpy()[before]).sum(1, keepdims=True)) for table in tables)
    assert found.positions == len(after) == 30
    assert found.cross_entropy == pytest.approx(-q[np.arange(30), after].mean(), rel=1e-5)
    assert found.teacher_cross_entropy == pytest.approx(-p[np.arange(30), after].mean(), rel=1e-5)
    assert found.divergence == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-4)
    assert found.same_top == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    alone = measured(model(tables[0]), None, documents, "cpu")
    assert alone.cross_entropy == pytest.approx(found.cross_entropy)
    assert math.isnan(alone.divergence)


def test_a_calibrated_model_has_no_calibration_error() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.random(200_000)
    assert calibration_error(confidence, generator.random(200_000) < confidence) < 0.01
    assert calibration_error(confidence, generator.random(200_000) < confidence**2) > 0.1


def test_memory_grows_with_what_needs_it() -> None:
    plain = footprint(1_000_000, CONFIG, 1024)
    assert plain.weights == 4_000_000
    assert plain.optimizer == 12_000_000
    assert footprint(1_000_000, CONFIG, 2048).activations == 2 * plain.activations
    assert footprint(1_000_000, CONFIG, 1024, on_blocks=True).total > plain.total
    assert footprint(1_000_000, CONFIG, 1024, teacher_parameters=10).scores > plain.scores
    assert footprint(1_000_000, CONFIG, 1024, bfloat16=True).activations == plain.activations // 2


def test_gaps_are_shares_of_the_way() -> None:
    found = gaps(
        trained(
            {
                "student-0": (worth(3.4, 0.4), worth(3.1, 0.1, teacher=3.0)),
                "baseline-0": (worth(3.4, 0.4), worth(3.2, 0.3, teacher=3.0)),
            },
            unquantized=worth(3.0, 0.0),
        )
    )
    assert {name: [round(value, 6) for value in values] for name, values in found.items()} == {
        "gap to the teacher closed": [0.5],
        "loss of plain quantization recovered": [0.75],
        "divergence of plain quantization recovered": [0.75],
    }


def test_a_claim_needs_three_seeds() -> None:
    def runs(count: int) -> Trained:
        return trained(
            {
                f"{kind}-{seed}": (None, worth(loss + 0.01 * seed, 0.1, teacher=3.0))
                for seed in range(count)
                for kind, loss in (("student", 3.1), ("baseline", 3.2))
            }
        )

    assert summary(runs(1)) == ["gap to the teacher closed: 50 % (1 seed; a claim needs 3)"]
    assert "claim" not in summary(runs(3))[0]
    assert "±" in summary(runs(3))[0]


def test_nothing_to_win_is_said() -> None:
    runs = {"student-0": (None, worth(2.9, 0.1, teacher=3.0)), "baseline-0": (None, worth(2.8, 0.1, teacher=3.0))}
    assert summary(trained(runs)) == ["gap to the teacher closed: there was nothing to win"]


def test_the_page_escapes_names_and_the_json_holds_no_nan() -> None:
    import json

    made = trained({"student-0": (worth(3.0), worth(2.5))})
    assert json.loads(json.dumps(described(made), allow_nan=False))["runs"]["student-0"]["end"]["divergence"] is None
    text = page(made)
    assert "2.5000" in text
    assert "nan" not in text
    assert "<script" not in plot({"<script>": [(0, 1.0), (1, 2.0)]}, "step", "loss")


def test_plots_survive_infinities_and_single_points() -> None:
    assert plot({"a": [(1, math.inf)]}, "x", "y") == ""
    assert "polyline" in plot({"a": [(1, 2.0)], "b": [(1, math.nan)]}, "x", "y")
    assert smoothed([1.0] * 1000)[-1] == (1000, 1.0)
