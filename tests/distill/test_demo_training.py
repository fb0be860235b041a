"""The training script of the demo model learns; only where torch is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (the extra 'train')")

from gguforge.distill.demo.checkpoint import main as ship  # noqa: E402
from gguforge.distill.demo.checkpoint import read_safetensors  # noqa: E402
from gguforge.distill.demo.data import SHORT  # noqa: E402
from gguforge.distill.demo.model import Llama, Shape, grown  # noqa: E402
from gguforge.distill.demo.train import Stage, main, schedule, train  # noqa: E402
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


def test_schedule_rises_and_falls() -> None:
    factors = [schedule(step, 1000, 0.02) for step in range(1000)]
    assert factors.index(max(factors)) in range(20, 30)
    assert factors[0] < 0.1
    assert factors[-1] < 0.03


def test_a_grown_model_computes_the_same() -> None:
    torch.manual_seed(0)
    small, large = Llama(TINY), Llama(replace(TINY, num_hidden_layers=3))
    large.load_state_dict(grown(small.state_dict(), 3))
    tokens, visible = torch.arange(6)[None], torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    assert torch.equal(small.hidden(tokens, visible), large.hidden(tokens, visible))
    large.dropout.p = 0.5
    assert not torch.equal(large.hidden(tokens, visible), large.hidden(tokens, visible))


def test_the_teacher_needs_a_checkpoint_to_grow_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", "nowhere", "--teacher"])
    assert "--begin" in capsys.readouterr().err


def test_a_student_is_written_as_it_ships(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train(tmp_path / "made", TINY, [Stage(1, 2, 320, SHORT, 1.0)], seed=1)
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "tokenizer.model").write_bytes((tmp_path / "made" / "tokenizer.model").read_bytes())
    ship(["--output", str(tmp_path / "shipped"), str(tmp_path / "student")])
    made, shipped = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("made", "shipped"))
    assert {name: weights.tolist() for name, weights in made.items()} == {
        name: weights.tolist() for name, weights in shipped.items()
    }
    assert (tmp_path / "shipped" / "config.json").read_bytes() == (tmp_path / "made" / "config.json").read_bytes()
