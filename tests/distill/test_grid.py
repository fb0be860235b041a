"""Training on the blocks of a plan: what the last step computed with is what the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SMALL_K, Case, build, like
from learned_checkpoints import GPT2_K, gpt2

from gguforge.convert.safetensors import read_safetensors
from gguforge.distill.grid import Grid, Placement, Weight, placements, plan_blocks
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError, InputError
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quantize import Guide, plan_of_file
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write

torch = pytest.importorskip("torch")

PRESETS = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q4_K_M",
    "Q5_K_S",
    "Q6_K",
    "Q2_K",
    "Q3_K_M",
    "IQ4_NL",
    "F16",
    "BF16",
)
CONFIG = like(SMALL_K, num_hidden_layers=1, intermediate_size=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 256 x 256, whose rows k-quants divide."""
    return build(Case(CONFIG), tmp_path_factory.mktemp("grid"))


def parameters(checkpoint: Path) -> dict[str, Any]:
    """The stored weights as torch parameters of full precision, with a little noise that no block can hold."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, stored in read_safetensors(checkpoint / "model.safetensors").items():
        raw = Path(stored.path).read_bytes()[stored.offset :][: 2 * int(np.prod(stored.shape))]
        values = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).float().view(stored.shape)
        found[name] = torch.nn.Parameter(values + 1e-3 * torch.randn(stored.shape, generator=generator))
    return found


def made(checkpoint: Path, preset: str, **settings: Any) -> tuple[dict[str, Any], Grid]:
    plan = plan_blocks(checkpoint, preset)
    weights = parameters(checkpoint)
    return weights, Grid(weights, plan, placements(plan, checkpoint), **settings)


def train(weights: dict[str, Any], grid: Grid, steps: int, rate: float = 1e-2, seed: int = 1) -> None:
    """Steps towards random weights: a loss that has a gradient everywhere."""
    generator = torch.Generator().manual_seed(seed)
    wanted = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    optimizer = torch.optim.Adam(grid.masters, lr=rate)
    for _ in range(steps):
        sum(((weight - wanted[name]) ** 2).mean() for name, weight in weights.items()).backward()
        grid.pull()
        optimizer.step()
        grid.push()


def rows_of_file(path: Path, checkpoint: Path, preset: str) -> dict[str, np.ndarray]:
    """Every parameter as its tensor in the file decodes, back in the checkpoint's order of rows."""
    tensors = {tensor.name: tensor for tensor in plan_of_file(read_gguf(path)).tensors}
    found = {}
    for place in placements(plan_blocks(checkpoint, preset), checkpoint):
        tensor = tensors[place.tensor.name]
        rows = tensor.source.rows(0, tensor.rows)
        if place.order is not None:
            rows = rows[np.argsort(place.order)]
        found[place.parameter] = np.ascontiguousarray(rows.T) if place.transposed else rows
    return found


@pytest.mark.parametrize("scales_only", [False, True], ids=["weights", "scales"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_decodes_to_the_weights_of_the_last_step(
    checkpoint: Path, tmp_path: Path, preset: str, scales_only: bool
) -> None:
    weights, grid = made(checkpoint, preset, refresh=3, scales_only=scales_only)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    if grid.masters:
        train(weights, grid, 5)
        assert any(not torch.equal(before[name], weight) for name, weight in weights.items())
    write(grid.plan(), tmp_path / "model.gguf", workers=1)
    for name, rows in rows_of_file(tmp_path / "model.gguf", checkpoint, preset).items():
        trained = weights[name].detach().numpy().reshape(rows.shape)
        assert np.array_equal(rows.view(np.uint32), trained.view(np.uint32)), name


@pytest.mark.parametrize("scales_only", [False, True], ids=["weights", "scales"])
@pytest.mark.parametrize("preset", ["Q4_0", "Q4_K_M", "IQ4_NL"])
def test_transposed_tensors_decode_to_the_weights_of_the_last_step_too(
    tmp_path: Path, preset: str, scales_only: bool
) -> None:
    checkpoint = build(gpt2(like(GPT2_K, n_layer=1)), tmp_path)
    weights, grid = made(checkpoint, preset, refresh=3, scales_only=scales_only)
    fused = next(w for w in grid.weights if w.place.parameter.endswith("c_attn.weight"))
    assert (fused.place.transposed, tuple(fused.parameter.shape)) == (True, (256, 768))
    before = fused.parameter.detach().clone()
    if grid.masters:
        train(weights, grid, 5)
    write(grid.plan(), tmp_path / "model.gguf", workers=1)
    found = rows_of_file(tmp_path / "model.gguf", checkpoint, preset)
    assert found.keys() == weights.keys()
    for name, rows in found.items():
        trained = weights[name].detach().numpy().reshape(rows.shape)
        assert np.array_equal(rows.view(np.uint32), trained.view(np.uint32)), name
    assert torch.equal(before, fused.parameter) == (preset == "IQ4_NL" and scales_only)  # which holds no scales


def test_leading_rows_that_the_file_does_not_have_are_left_as_they_are() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    source = ArraySource(np.zeros((4, 2), np.float32))
    place = Placement("positions", TensorPlan("position_embd.weight", (4, 2), T.F32, source), skip=2)
    weight = Weight(torch.nn.Parameter(values.clone()), place, scales_only=False)
    weight.refresh()
    weight.parameter.grad = torch.ones(6, 2)
    weight.pull()
    weight.master -= weight.master.grad
    weight.push()
    assert torch.equal(weight.parameter.detach()[:2], values[:2])
    assert torch.equal(weight.parameter.detach()[2:], values[2:] - 1)
    weight.lattice.settle()
    assert torch.equal(weight.lattice.values(weight.rows(weight.parameter.detach())), values[2:] - 1)


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_M", "Q4_0"])
def test_before_any_step_the_blocks_are_those_of_quantize(checkpoint: Path, tmp_path: Path, preset: str) -> None:
    plan = plan_blocks(checkpoint, preset)
    places = placements(plan, checkpoint)
    weights = {name: torch.nn.Parameter(torch.zeros(1)) for name in parameters(checkpoint)}
    for place in places:
        rows = torch.from_numpy(place.tensor.source.rows(0, place.tensor.rows).copy())
        rows = rows if place.order is None else rows[torch.from_numpy(np.argsort(place.order))]
        weights[place.parameter] = torch.nn.Parameter(rows)
    write(Grid(weights, plan, places).plan(), tmp_path / "grid.gguf", workers=1)
    write(plan, tmp_path / "plain.gguf", workers=1)
    ours, theirs = (plan_of_file(read_gguf(tmp_path / name)) for name in ("grid.gguf", "plain.gguf"))
    assert ours.header == theirs.header
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        a, b = one.source.rows(0, one.rows), other.source.rows(0, other.rows)
        assert np.array_equal(a, b), one.name


def test_every_tensor_has_the_type_that_quantize_gives_it(checkpoint: Path) -> None:
    plan = plan_blocks(checkpoint, "Q4_K_M")
    grid = made(checkpoint, "Q4_K_M")[1]
    assert [(t.name, t.type, t.shape) for t in grid.plan().tensors] == [(t.name, t.type, t.shape) for t in plan.tensors]
    assert {t.type for t in plan.tensors} == {T.F32, T.Q4_K, T.Q6_K}


def test_held_scales_stay_and_are_found_anew_every_so_many_steps(checkpoint: Path) -> None:
    weights, grid = made(checkpoint, "Q4_0", refresh=4)
    weight = next(w for w in grid.weights if w.place.tensor.type == T.Q4_0)
    scales = [weight.lattice.structured()["d"].copy()]
    for _ in range(4):
        train(weights, grid, 1)
        scales.append(weight.lattice.structured()["d"].copy())
    assert all((scales[0] == scale).all() for scale in scales[:4])
    assert not (scales[0] == scales[4]).all()


@pytest.mark.parametrize("preset", ["Q2_K", "Q4_K_M", "Q4_0"])
def test_learning_scales_leaves_the_levels(checkpoint: Path, preset: str) -> None:
    weights, grid = made(checkpoint, preset, scales_only=True)
    before = {w.place.parameter: w.lattice.kind.levels(w.lattice.structured()).copy() for w in grid.learning}
    first = sum(float(weight.detach().square().sum()) for weight in weights.values())
    train(weights, grid, 20, rate=5e-2)
    grid.plan()
    assert sum(float(weight.detach().square().sum()) for weight in weights.values()) != first
    for w in grid.learning:
        assert (w.lattice.kind.levels(w.lattice.structured()) == before[w.place.parameter]).all()


@pytest.mark.parametrize("preset", ["Q2_K", "Q4_0", "Q3_K_M", "Q4_1"])
def test_gradients_of_factors_are_those_of_autograd(checkpoint: Path, preset: str) -> None:
    _, grid = made(checkpoint, preset, scales_only=True)
    weight = grid.learning[0]
    lattice, of_values = weight.lattice, torch.randn(weight.rows(weight.parameter).shape)
    factors = lattice.factors.clone().requires_grad_()
    step, minimum = lattice.integers
    scales = lattice.start * factors
    values = (scales[0][:, None] * step)[..., None] * lattice.frozen
    if minimum is not None:
        values = values - (scales[1][:, None] * minimum)[..., None]
    (values.reshape(of_values.shape) * of_values).sum().backward()
    torch.testing.assert_close(lattice.gradient(of_values), factors.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scales_only", [False, True], ids=["weights", "scales"])
def test_training_goes_on_from_its_state_as_if_never_stopped(checkpoint: Path, scales_only: bool) -> None:
    straight_weights, straight = made(checkpoint, "Q4_K_M", refresh=4, scales_only=scales_only)
    train(straight_weights, straight, 3, rate=1e-3)
    resumed_weights, resumed = made(checkpoint, "Q4_K_M", refresh=4, scales_only=scales_only)
    resumed.load_state(straight.state())
    for name, weight in straight_weights.items():
        assert torch.equal(weight, resumed_weights[name]), name
    train(straight_weights, straight, 3, seed=2)
    train(resumed_weights, resumed, 3, seed=2)
    for name, weight in straight_weights.items():
        assert torch.equal(weight, resumed_weights[name]), name


@pytest.mark.parametrize("preset", ["Q4_0", "Q4_K_M", "Q2_K"])
def test_weights_out_of_reach_are_not_pushed_further(checkpoint: Path, preset: str) -> None:
    weights, grid = made(checkpoint, preset, refresh=1000)
    weight = next(w for w in grid.weights if w.order is None and w.place.tensor.name.endswith("ffn_up.weight"))
    start = weight.master.clone()
    optimizer = torch.optim.SGD(grid.masters, lr=1.0)
    for _ in range(100):  # upwards by 0.05 a step, towards what no level reaches
        for name, parameter in weights.items():
            parameter.grad = torch.full_like(parameter, -0.05 if name == weight.place.parameter else 0.0)
        grid.pull()
        optimizer.step()
        grid.push()
    assert (weight.master >= start).all()
    assert float((weight.master - weight.parameter).detach().max()) < 0.3  # less than half a step and two moves
    assert float((weight.master - start).mean()) > 0.1
    for parameter in weights.values():
        parameter.grad = torch.full_like(parameter, 0.05)  # and back it comes at once
    before = weight.master.clone()
    grid.pull()
    optimizer.step()
    assert torch.allclose(weight.master, before - 0.05)


def test_importance_guides_the_scales(checkpoint: Path) -> None:
    columns = np.zeros((1, 256), np.float32)
    columns[0, :16] = 1
    guide = Guide({"blk.0.ffn_gate.weight": columns}, "m.imatrix")
    plan = plan_blocks(checkpoint, "Q4_0", guide=guide)
    weights = parameters(checkpoint)
    exact = weights["model.layers.0.mlp.gate_proj.weight"].detach().clone()
    Grid(weights, plan, placements(plan, checkpoint))
    plain_weights, _ = made(checkpoint, "Q4_0")

    def error(found: dict[str, Any]) -> float:
        return float((found["model.layers.0.mlp.gate_proj.weight"] - exact)[:, :16].detach().square().sum())

    assert error(weights) < 0.9 * error(plain_weights)


def test_weights_that_became_nan_are_refused(checkpoint: Path) -> None:
    _, grid = made(checkpoint, "Q4_K_M", refresh=1)
    grid.masters[3].fill_(float("nan"))
    with pytest.raises(DataError, match="NaN"):
        grid.push()


def test_a_model_without_a_parameter_of_the_plan_is_refused(checkpoint: Path) -> None:
    plan = plan_blocks(checkpoint, "Q4_0")
    weights = parameters(checkpoint)
    del weights["model.norm.weight"]
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        Grid(weights, plan, placements(plan, checkpoint))


def test_the_plan_that_is_given_is_not_changed(checkpoint: Path) -> None:
    weights, grid = made(checkpoint, "Q4_0")
    before = grid.plan()
    assert isinstance(before, Plan)
    held = [tensor.source.raw_rows(0, 1).copy() for tensor in before.tensors]
    train(weights, grid, 2)
    assert all((tensor.source.raw_rows(0, 1) == rows).all() for tensor, rows in zip(before.tensors, held, strict=True))
