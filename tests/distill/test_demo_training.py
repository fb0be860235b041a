"""The training script of the demo model learns; only where torch is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (the extra 'train')")

from gguforge.distill.demo.data import SHORT  # noqa: E402
from gguforge.distill.demo.model import Llama, Shape  # noqa: E402
from gguforge.distill.demo.train import Stage, answered, main, orthogonal, schedule, train  # noqa: E402
from gguforge.quant.errors import OutputError  # noqa: E402

TINY = Shape(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def test_a_few_steps_lower_the_loss_and_write_a_checkpoint(tmp_path: Path) -> None:
    short = train(tmp_path / "short", TINY, [Stage(2, 2, 320, SHORT, 1.0)], seed=1)
    longer = train(tmp_path / "longer", TINY, [Stage(20, 2, 320, SHORT, 1.0)], seed=1, begin=tmp_path / "short")
    assert longer.loss < short.loss
    assert not answered(short.model, short.tokenizer, "What is GGUF?", ["GGUF is a file."])
    assert json.loads((tmp_path / "longer" / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 64
    with pytest.raises(OutputError, match="already holds a checkpoint"):
        main(["--output", str(tmp_path / "longer")])


def test_a_token_sees_nothing_after_it_and_nothing_of_its_neighbour() -> None:
    torch.manual_seed(0)
    model = Llama(TINY)
    document = torch.tensor([[0, 0, 0, 3, 3, 3]])
    visible = ((document[:, :, None] == document[:, None, :]) & torch.ones(6, 6, dtype=torch.bool).tril())[:, None]
    one = torch.tensor([[5, 6, 7, 8, 9, 10]])
    two = torch.tensor([[5, 6, 99, 8, 9, 11]])
    first, second = model.hidden(one, visible), model.hidden(two, visible)
    same = (first == second).all(-1)[0].tolist()
    assert same == [True, True, False, True, True, False]


def test_orthogonal_step_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in ((64, 256), (256, 64)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(rows, columns)))
        assert 0.5 < values.min() <= values.max() < 1.4


def test_schedule_rises_and_falls() -> None:
    factors = [schedule(step, 1000) for step in range(1000)]
    assert factors.index(max(factors)) in range(20, 30)
    assert factors[0] < 0.1
    assert factors[-1] < 0.03
