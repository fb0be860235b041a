"""Students for a machine: exact in memory, within the limits, no worse with more room, and ready to be trained."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, MISTRAL, QWEN2, QWEN3, Case, build, like
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.cli.main import cli
from gguforge.convert.conversion import convert
from gguforge.convert.conversion import plan as plan_checkpoint
from gguforge.distill.planning import cost, search
from gguforge.distill.planning.cost import Budget, expected_loss, read_budget, usual_tokens
from gguforge.distill.planning.family import Family, family_of
from gguforge.distill.planning.search import Limits, Planner, propose
from gguforge.distill.planning.shapes import BILLION, Shape, cut_shapes, new_shapes
from gguforge.distill.recipe import read_recipe
from gguforge.quant.errors import GGUForgeError, InputError
from gguforge.quant.plan import Plan
from gguforge.runtime.memory import buffers
from gguforge.runtime.pace import Pace, Point, bytes_per_token

SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
TEACHER = like(LLAMA, **SIZES)
CONTEXT = 300
MEGABYTE = 10**6
SLOW = Pace("Q4_K_M", 1, (Point(2 * MEGABYTE, 0.02), Point(20 * MEGABYTE, 0.11)))


def teacher(parent: Path, config: dict[str, Any] = TEACHER) -> Path:
    """A checkpoint's folder as far as planning looks at it: its config and tokenizer."""
    folder = build(Case(like(config, num_hidden_layers=1, hidden_size=256, intermediate_size=256)), parent)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family_of(teacher(tmp_path_factory.mktemp("planning")))


@pytest.fixture(scope="module")
def planner(family: Family) -> Planner:
    """Keeps what it found out from test to test; its limits are set by each."""
    return Planner(family, Limits(10**9, context=CONTEXT), Budget())


def choices(family: Family, cut: bool) -> list[Shape]:
    return list(family.parts() if cut else new_shapes(family.shape))


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=lambda config: config["model_type"])
def test_forecast_memory_is_that_of_the_converted_student(tmp_path: Path, config: dict[str, Any]) -> None:
    family = family_of(teacher(tmp_path / "teacher", like(config, **SIZES)))
    planner = Planner(family, Limits(10**9, context=CONTEXT, preset="Q4_0"), Budget())
    for shape in (choices(family, cut=False)[0], choices(family, cut=True)[0]):
        found = planner.candidate(shape, None)
        made = build(Case(family.config_of(shape)), tmp_path / str(shape.cut))
        file = convert(made, tmp_path / "student.gguf", type="Q4_0", overwrite=True, workers=1)
        need = buffers(tmp_path / "student.gguf", CONTEXT)
        assert found.memory == file.data_bytes + need.total
        assert {t.name: (t.shape, t.type) for t in found.plan.tensors} == {
            t.name: (t.shape, t.type) for t in file.tensors
        }
        assert found.plan.elements == pytest.approx(shape.weights(family.vocabulary), rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(40, 140), st.floats(5, 200), st.booleans())
def test_what_is_proposed_keeps_to_the_limits(planner: Planner, megabytes: int, speed: float, cut: bool) -> None:
    planner.limits = replace(planner.limits, memory=megabytes * MEGABYTE, speed=speed)
    found = planner.best(choices(planner.family, cut), SLOW)
    for one in found:
        assert one.memory <= megabytes * MEGABYTE
        assert SLOW.speed(bytes_per_token(one.plan)) >= speed
    assert [one.loss for one in found] == sorted(one.loss for one in found)
    assert len({one.shape.hidden for one in found}) == len(found)


@settings(max_examples=20, deadline=None)
@given(st.integers(40, 140), st.integers(0, 60), st.floats(5, 200), st.floats(0, 50), st.booleans())
def test_more_memory_and_less_speed_give_no_smaller_student(
    planner: Planner, megabytes: int, more: int, speed: float, less: float, cut: bool
) -> None:
    def body(megabytes: int, speed: float) -> int:
        planner.limits = replace(planner.limits, memory=megabytes * MEGABYTE, speed=speed)
        return max((one.shape.body for one in planner.best(choices(planner.family, cut), SLOW)), default=0)

    assert body(megabytes + more, max(1, speed - less)) >= body(megabytes, speed)


def test_shapes_take_k_quants_are_smaller_than_the_teacher_and_deep_below_a_billion() -> None:
    family = family_of(None)
    shapes = choices(family, cut=False)
    assert len(shapes) > 300
    for shape in shapes:
        assert not (shape.hidden | shape.ffn | shape.heads * shape.head) % 256
        assert shape.heads % shape.kv_heads == 0
        assert shape.body < family.shape.body
        assert 16 <= shape.hidden / shape.layers <= (40 if shape.body < BILLION else 128)
    for shape in cut_shapes(family.shape):
        assert (shape.heads, shape.kv_heads, shape.head) == (64, 16, 64)
        assert shape.layers <= 32


def test_the_usual_training_makes_the_largest_student_the_best(family: Family) -> None:
    shapes = sorted(choices(family, cut=False), key=lambda shape: Budget().loss(shape, family))
    assert shapes[0].body == max(shape.body for shape in shapes)
    cut = choices(family, cut=True)[0]
    assert usual_tokens(replace(cut, cut=False)) // 40 == usual_tokens(cut) == cut.body // 2


def test_few_hours_make_a_smaller_student_the_best(family: Family) -> None:
    shapes = choices(family, cut=False)

    def best(hours: float) -> int:
        budget = Budget(hours=hours, flops=1e11)
        return min(shapes, key=lambda shape: budget.loss(shape, family)).body

    assert best(0.1) < best(10) <= best(10_000) == max(shape.body for shape in shapes)
    assert Budget(tokens=7).spent_on(shapes[0], family) == 7
    assert expected_loss(10**9, 10**9) > expected_loss(10**9, 2 * 10**9) > expected_loss(2 * 10**9, 2 * 10**9)


def test_budgets_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measured_flops", lambda: 1e9)
    assert read_budget("12h") == Budget(hours=12.0, flops=1e9)
    assert read_budget("1.5M") == Budget(tokens=1_500_000)
    assert read_budget(None) == Budget()
    for wrong in ("0", "12 days", "-5h", "h"):
        with pytest.raises(InputError, match="is no budget"):
            read_budget(wrong)


def test_a_choice_that_turns_out_too_slow_is_made_again(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    planner.limits = replace(planner.limits, memory=10**9, speed=20.0)
    true = [Point(point.bytes, 1.5 * point.seconds) for point in SLOW.points]  # half as slow again as it looked
    run: list[int] = []

    def measured(plan: Plan, threads: int) -> Point:
        run.append(bytes_per_token(plan))
        return Point(run[-1], Pace("Q4_K_M", 1, tuple(true)).seconds(run[-1]))

    monkeypatch.setattr(search, "measured", measured)
    shapes = choices(planner.family, cut=False)
    found = propose(planner, shapes, SLOW, here=True, say=lambda line: None)
    assert len(run) == 2
    assert run[1] < run[0]
    assert found[0].measured is not None
    assert found[0].measured >= 20
    assert propose(planner, shapes, SLOW, here=False, say=lambda line: None)[0].measured is None


def planned(*words: object) -> Any:
    return CliRunner().invoke(cli, ["distill", "plan", *map(str, words)], catch_exceptions=True)


@pytest.mark.parametrize("start", ["cut", "scratch"])
def test_the_recipe_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gguforge.distill.train import train_recipe

    monkeypatch.setattr(cost, "measured_flops", lambda: 1e10)
    whole = build(Case(like(LLAMA, hidden_size=256, intermediate_size=512, num_hidden_layers=9)), tmp_path)
    (tmp_path / "text.txt").write_text("she sells sea shells on the shore. " * 90)
    path = tmp_path / "plans" / "recipe.toml"
    path.parent.mkdir()
    done = planned(
        "--teacher", whole, "--memory", "110MB", "--ctx", CONTEXT, "-f", tmp_path / "text.txt", "--from", start,
        "--budget", "9000", "-o", path, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["students"][0]
    assert found["training"]["tokens"] == 9000
    recipe = read_recipe(path)
    assert (recipe.schedule.steps, recipe.output.types) == (2, ("Q4_K_M",))
    once = replace(
        recipe, schedule=replace(recipe.schedule, steps=1, batch=1), report=replace(recipe.report, baseline=False)
    )
    trained = train_recipe(once, tmp_path / "out")
    assert trained.parameters == found["parameters"]
    made = plan_checkpoint(tmp_path / "out" / "checkpoint", "Q4_K_M")
    assert made.metadata["llama.block_count"].value == found["layers"]
    assert recipe.schedule.rate == (1e-4 if start == "cut" else 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "much"], "'much' is no size"),
        (["--memory", "1GB", "--cache-type", "q9"], "unknown cache type 'q9'. Known: f32, f16"),
        (["--memory", "1GB", "--from", "cut"], "only a checkpoint can be cut"),
        (["--memory", "1GB", "-f", "a.txt", "-o", "no/such/folder/recipe.toml"], "no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused(words: list[str], message: str) -> None:
    done = planned(*words)
    assert isinstance(done.exception, GGUForgeError)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_a_gguf_teacher_gives_a_recipe_that_collects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measured_flops", lambda: None)
    whole = build(Case(like(QWEN3, hidden_size=256, intermediate_size=512, num_hidden_layers=9)), tmp_path)
    convert(whole, tmp_path / "teacher.gguf", type="Q8_0", workers=1)
    text = tmp_path / "text.txt"
    text.write_text("what it learns from")
    words = ["--teacher", tmp_path / "teacher.gguf", "--memory", "110MB", "--ctx", CONTEXT, "-f", text]
    (tmp_path / "m.json").write_text(json.dumps({"format": 1, "preset": "Q4_K_M", "threads": 1, "points": [
        {"bytes": 10**9, "seconds": 0.1}]}))  # fmt: skip
    done = planned(*words, "-o", tmp_path / "r.toml", "--tokenizer", whole, "--speed-of", tmp_path / "m.json")
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.stdout
    recipe = read_recipe(tmp_path / "r.toml")
    assert recipe.losses.weights() == {"sampled_kl": 0.9, "cross_entropy": 0.1}
    config = json.loads((tmp_path / "r.config.json").read_text())
    assert (config["architectures"], config["head_dim"]) == (["Qwen3ForCausalLM"], 32)
    again = planned(*words, "-o", tmp_path / "r.toml", "--tokenizer", whole)
    assert "file exists" in str(again.exception)
    missing = planned(*words, "-o", tmp_path / "s.toml")
    assert isinstance(missing.exception, InputError)
    assert "--tokenizer" in str(missing.exception)
    text.unlink()
    missing = planned(*words, "-o", tmp_path / "s.toml", "--tokenizer", whole)
    assert "there is no such file" in str(missing.exception)
    assert not (tmp_path / "s.toml").exists()


def test_the_pace_is_measured_on_models_that_fit(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measure_decoding", partial(search.measure_decoding, seconds=0))
    planner.limits = replace(planner.limits, memory=30 * MEGABYTE, speed=1.0)
    said: list[str] = []
    pace = search.pace_here(planner, choices(planner.family, cut=False), 1, said.append)
    sizes = [point.bytes for point in pace.points]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) < 25 * MEGABYTE
    assert len(said) == len(sizes) > 1
    assert all(point.seconds > 0 for point in pace.points)
