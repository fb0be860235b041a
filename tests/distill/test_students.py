"""Students from configs, from checkpoints, and cut from a teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, Case, build, like

from gguforge.convert.conversion import plan
from gguforge.distill.recipe import StudentPart
from gguforge.quant.errors import InputError, OutputError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguforge.distill import students  # noqa: E402

CONFIG = like(LLAMA, num_hidden_layers=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of five layers."""
    return build(Case(CONFIG), tmp_path_factory.mktemp("students"))


@pytest.fixture(scope="module")
def teacher(checkpoint: Path) -> Any:
    return students.open_model(checkpoint)


def batches() -> Iterator[Any]:
    yield torch.arange(60).reshape(3, 20)


def cut(teacher: Any, **part: Any) -> Any:
    return students.cut(teacher, CONFIG, StudentPart(**part), Path("config.json"), batches())


def test_a_cut_student_keeps_the_layers_that_were_named(teacher: Any) -> None:
    student = cut(teacher, layers=(0, 3, 4))
    assert student.config.num_hidden_layers == 3
    for new, old in enumerate((0, 3, 4)):
        ours, theirs = student.model.layers[new].state_dict(), teacher.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)


def test_cutting_nothing_gives_the_teacher(teacher: Any) -> None:
    tokens = next(batches())
    for part in ({"layers": 5}, {"hidden_size": 64, "intermediate_size": 96}):
        assert torch.equal(cut(teacher, **part)(input_ids=tokens).logits, teacher(input_ids=tokens).logits)


def test_width_keeps_the_channels_that_are_active(teacher: Any) -> None:
    before = teacher.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight[::2] = 0  # half of the feed-forward never does anything
    try:
        student = cut(teacher, intermediate_size=48)
        assert torch.equal(student.model.layers[0].mlp.up_proj.weight, before[1::2])
        assert student.model.layers[0].mlp.down_proj.weight.shape == (64, 48)
        hidden = cut(teacher, hidden_size=32, layers=2)
        assert hidden.model.embed_tokens.weight.shape == (320, 32)
        assert hidden(input_ids=next(batches())).logits.isfinite().all()
    finally:
        with torch.no_grad():
            teacher.model.layers[0].mlp.up_proj.weight.copy_(before)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"layers": 6}, "expected of the teacher's 5 layers, found 6"),
        ({"layers": (0, 5)}, "expected of the teacher's 5 layers"),
        ({"layers": (1, 1)}, "expected of the teacher's 5 layers"),
        ({"hidden_size": 65}, "student.hidden_size (expected at most the teacher's 64, found 65)"),
    ],
)
def test_more_than_the_teacher_has_is_refused(teacher: Any, part: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        cut(teacher, **part)
    assert message in str(caught.value)


def test_width_of_other_architectures_is_refused(teacher: Any) -> None:
    config = like(CONFIG, model_type="gpt2")
    with pytest.raises(InputError, match="cannot be cut"):
        students.cut(teacher, config, StudentPart(hidden_size=8), Path("config.json"), batches())


def test_a_config_gives_random_weights_that_its_seed_decides() -> None:
    one, same, other = (
        students.fresh_model(CONFIG, Path("config.json"), seed).state_dict()["lm_head.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("architectures", [["NoSuchModel"], [], None, ["load_tool"]])
def test_architectures_that_transformers_has_not_are_refused(architectures: Any) -> None:
    with pytest.raises(InputError, match="unknown to transformers"):
        students.fresh_model(like(CONFIG, architectures=architectures), Path("config.json"), 0)


def test_folders_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        students.open_model(tmp_path)


def test_what_is_saved_can_be_converted_and_replaces_what_was_there(
    teacher: Any, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    for layers in (2, 3):
        students.save_model(cut(teacher, layers=layers), folder, checkpoint)
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == layers
        made = plan(folder, "Q8_0")
        assert made.metadata["llama.block_count"].value == layers
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_channels_of_a_qwen2_stay_as_many_as_its_heads_need(teacher: Any) -> None:
    config = like(CONFIG, model_type="qwen2")
    with pytest.raises(InputError, match=r"llama\.cpp cannot run a Qwen2 that is narrower"):
        students.cut(teacher, config, StudentPart(hidden_size=32), Path("config.json"), batches())
    part = StudentPart(intermediate_size=16)
    assert students.cut(teacher, CONFIG, part, Path("config.json"), batches()).config.intermediate_size == 16


def test_a_folder_with_something_else_is_not_replaced(teacher: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="no checkpoint"):
        students.save_model(teacher, tmp_path, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 4,
    "n_positions": 32, "vocab_size": 60,
}  # fmt: skip
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 16, "intermediate_size": 32,
    "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 60, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("config", [GPT2, BERT], ids=lambda config: config["model_type"])
def test_layers_of_other_families_are_cut_alike(config: dict[str, Any]) -> None:
    teacher = students.fresh_model(config, Path("config.json"), 0).eval()
    student = students.cut(teacher, config, StudentPart(layers=2), Path("config.json"), batches()).eval()
    names = {name.replace(".3.", ".1.") for name in teacher.state_dict() if ".1." not in name and ".2." not in name}
    assert set(student.state_dict()) == names
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, teacher.state_dict()[name.replace(".1.", ".3.")]), name
