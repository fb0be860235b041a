"""Recipes of encoders from end to end: hidden words, attention relations, sentence embeddings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TEXT, like
from stand_ins import BERT, bert, roberta, sentences

from gguforge.convert import convert, plan
from gguforge.distill.encoders.files import evaluate_embeddings
from gguforge.distill.encoders.masking import encoder_batch
from gguforge.distill.encoders.measure import embeddings
from gguforge.distill.encoders.pooling import Pooling, read_pooling
from gguforge.distill.encoders.text import EncoderText
from gguforge.distill.recipe import Recipe, read_recipe
from gguforge.quant.errors import EngineError, InputError
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.reader import read_gguf
from gguforge.runtime.embedding import Embedder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguforge.distill.report import page, verdict  # noqa: E402
from gguforge.distill.students import open_model  # noqa: E402
from gguforge.distill.train import Trained, train_recipe  # noqa: E402

SMALLER = like(
    BERT, architectures=["BertModel"], hidden_size=16, intermediate_size=32, num_hidden_layers=2, hidden_dropout_prob=0
)
MASKED = "[student]\nlayers = 2\n[losses]\nforward_kl = 5\ncross_entropy = 2\nhidden_cosine = 1\ntemperature = 2"
MINILM = '[student]\nconfig = "smaller.json"\n[losses]\nattention_relation = 1\nteacher_layer = 3\nrelation_heads = 4'
OTHER = '[student]\ncheckpoint = "bert"\n[losses]\n'
EMBEDDER = '[student]\nconfig = "smaller.json"\n[losses]\nembedding_relation = 1'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, a smaller student's config, and sentences."""
    folder = tmp_path_factory.mktemp("encoder-recipes")
    for make in (bert, roberta, sentences):
        make(folder / make.__name__)
    (folder / "smaller.json").write_text(json.dumps(SMALLER))
    words = TEXT.split()
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(1, 60)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "held-out.txt").write_text("\n".join(lines[::-3]) + "\n")
    return folder


def recipe(home: Path, body: str, teacher: str = "bert", schedule: str = "steps = 4", rate: float = 2e-3) -> Recipe:
    path = home / "recipe.toml"
    path.write_text(
        f'[data]\ntext = ["text.txt"]\nheld_out = ["held-out.txt"]\ncontext = 24\n[hardware]\ndevice = "cpu"\n'
        f"threads = 1\n{body}\n[schedule]\nbatch = 4\nrate = {rate}\nevaluate = 2\nsave = 2\n{schedule}\n"
        + (f'[teacher]\ncheckpoint = "{teacher}"\n' if teacher else "")
    )
    return read_recipe(path)


def without_time(trained: Trained) -> Any:
    return {name: (run.history, run.start, run.end) for name, run in trained.runs.items()}


def test_a_masked_student_is_cut_trained_and_measured(home: Path, tmp_path: Path) -> None:
    trained = train_recipe(recipe(home, MASKED, schedule="steps = 12\nseeds = [0, 1]"), tmp_path)
    assert list(trained.runs) == ["student-0", "baseline-0", "student-1", "baseline-1"]
    run = trained.runs["student-0"]
    assert run.start is not None
    assert run.end is not None
    assert run.end.divergence < run.start.divergence
    assert 0 <= run.end.accuracy <= 1
    assert run.end.teacher_accuracy == run.start.teacher_accuracy
    assert run.end.cosine > run.start.cosine
    assert -1 <= run.end.rank_correlation <= 1
    assert math.isnan(run.end.loss)
    assert run.history.losses != trained.runs["student-1"].history.losses
    saved = open_model(tmp_path / "checkpoint")
    assert type(saved).__name__ == "BertForMaskedLM"
    assert saved.config.num_hidden_layers == 2
    assert not (tmp_path / "checkpoint" / "modules.json").exists()
    assert "held-out tokens" in page(trained)
    assert "cross-entropy" in verdict(run.end)


def test_a_run_that_was_killed_hides_the_same_words_again(home: Path, tmp_path: Path) -> None:
    read = recipe(home, MASKED + "\n[report]\nbaseline = false")

    def killed(name: str, step: int, losses: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = train_recipe(read, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_recipe(read, tmp_path / "killed", killed)
    steps: list[int] = []
    again = train_recipe(read, tmp_path / "killed", lambda name, step, losses: steps.append(step))
    assert steps == [3, 4]
    assert without_time(again) == without_time(whole)


def test_relations_of_a_chosen_layer_shape_a_student_of_another_width(home: Path, tmp_path: Path) -> None:
    for teacher in ("bert", "roberta"):
        config = SMALLER
        if teacher == "roberta":
            found = json.loads((home / "roberta" / "config.json").read_text())
            config = like(found, architectures=["RobertaModel"], hidden_size=16, num_hidden_layers=2)
        (home / "smaller.json").write_text(json.dumps(config))
        trained = train_recipe(recipe(home, MINILM, teacher, "steps = 20", 1e-2), tmp_path / teacher)
        (home / "smaller.json").write_text(json.dumps(SMALLER))
        (run,) = trained.runs.values()
        assert run.start is not None
        assert run.end is not None
        assert run.end.loss < 0.9 * run.start.loss
        assert math.isnan(run.end.cross_entropy)
        assert math.isnan(run.end.cosine)
        assert -1 <= run.end.rank_correlation <= 1
        assert "held-out texts" in page(trained)
        assert open_model(tmp_path / teacher / "checkpoint").config.hidden_size == 16


def test_another_layer_of_the_teacher_is_another_lesson(home: Path, tmp_path: Path) -> None:
    losses = [
        train_recipe(recipe(home, MINILM.replace("= 3", f"= {layer}")), tmp_path / str(layer)).runs["student-0"].history
        for layer in (0, 4, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(InputError, match=r"losses\.teacher_layer \(expected at most the teacher's 4, found 5\)"):
        train_recipe(recipe(home, MINILM.replace("= 3", "= 5")), tmp_path / "5")


def test_a_narrower_student_learns_how_alike_the_teachers_embeddings_are(home: Path, tmp_path: Path) -> None:
    (run,) = train_recipe(recipe(home, EMBEDDER, "sentences", "steps = 40", 1e-2), tmp_path).runs.values()
    assert run.start is not None
    assert run.end is not None
    assert run.end.positions == 20
    assert run.end.loss < 0.8 * run.start.loss
    assert run.end.rank_correlation > run.start.rank_correlation
    folder = tmp_path / "checkpoint"
    assert read_pooling(folder) is Pooling.CLS
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 16


def test_embeddings_of_one_width_are_drawn_to_the_teachers(home: Path, tmp_path: Path) -> None:
    body = "[student]\nlayers = 2\n[losses]\nembedding_cosine = 1\nembedding_relation = 1"
    (run,) = train_recipe(recipe(home, body, "sentences", "steps = 12"), tmp_path).runs.values()
    assert run.start is not None
    assert run.end is not None
    assert run.end.cosine > run.start.cosine


def test_a_student_keeps_its_own_pooling(home: Path, tmp_path: Path) -> None:
    student = bert(tmp_path / "student", architectures=["BertModel"], num_hidden_layers=1)
    (student / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "1_Pooling"}]))
    (student / "1_Pooling").mkdir()
    (student / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    body = f'[student]\ncheckpoint = "{student}"\n[losses]\nembedding_relation = 1'
    train_recipe(recipe(home, body, "sentences", "steps = 2"), tmp_path / "out")
    assert read_pooling(tmp_path / "out" / "checkpoint") is Pooling.MEAN


def test_a_teacher_without_a_head_teaches_its_states(home: Path, tmp_path: Path) -> None:
    body = f"{OTHER}cross_entropy = 1\nhidden_cosine = 1"
    (run, _) = train_recipe(recipe(home, body, "sentences"), tmp_path).runs.values()
    assert run.start is not None
    assert run.end is not None
    assert math.isnan(run.end.divergence)
    assert run.history.held_out[-1] == (4, run.end.cross_entropy)
    assert run.end.rank_correlation > 0


def test_an_encoder_is_trained_on_the_blocks_of_its_file(home: Path, tmp_path: Path) -> None:
    body = f'{OTHER}forward_kl = 1\n[blocks]\npreset = "Q8_0"\n[report]\nbaseline = false'
    (run,) = train_recipe(recipe(home, body), tmp_path).runs.values()
    assert run.start is not None
    assert run.start.divergence > 0
    file = plan_of_file(read_gguf(tmp_path / "model.gguf"))
    rows = {one.name: one.source.rows(0, one.rows) for one in plan(tmp_path / "checkpoint", "F32").tensors}
    assert {tensor.name for tensor in file.tensors} == rows.keys()
    assert {tensor.type.name for tensor in file.tensors} == {"F32", "Q8_0"}
    for tensor in file.tensors:
        assert np.array_equal(tensor.source.rows(0, tensor.rows), rows[tensor.name]), tensor.name


def test_llama_cpp_embeds_as_the_student_does(home: Path, tmp_path: Path) -> None:
    train_recipe(recipe(home, EMBEDDER, "sentences", "steps = 4", 1e-2), tmp_path)
    convert(tmp_path / "checkpoint", tmp_path / "student.gguf", type="F32", workers=1)
    text = EncoderText(tmp_path / "checkpoint")
    documents = text.documents([home / "held-out.txt"], 24, lines=True)
    ours = embeddings(open_model(tmp_path / "checkpoint"), [encoder_batch(documents, text.pad)], Pooling.CLS)
    lines = (home / "held-out.txt").read_text().splitlines()
    with Embedder.open(tmp_path / "student.gguf", context=24, threads=1) as model:
        theirs = np.stack([model.embed(line) for line in lines])
        assert model.embed("").shape == (16,)
    assert np.abs((ours * theirs).sum(1) - 1).max() < 1e-3
    assert np.abs(ours @ ours.T - theirs @ theirs.T).max() < 0.02
    steps: list[int] = []
    found = evaluate_embeddings(
        tmp_path / "student.gguf", [home / "held-out.txt"], {"itself": tmp_path / "student.gguf"}, 24, 7, 1,
        lambda done, total: steps.append(done),
    )  # fmt: skip
    assert steps == list(range(1, 15))
    assert found["against"]["itself"] == {"cosine": pytest.approx(1), "rank_correlation": 1.0}


def test_a_longer_text_is_cut_off_as_in_training(home: Path, tmp_path: Path) -> None:
    convert(home / "sentences", tmp_path / "teacher.gguf", type="F32", workers=1)
    words = ["the", "fox", "jumps", "over", "the", "lazy", "dog"]
    with Embedder.open(tmp_path / "teacher.gguf", context=6, threads=1) as model:
        assert np.array_equal(model.embed(" ".join(words)), model.embed(" ".join(words[:4])))
        assert not np.array_equal(model.embed(" ".join(words[:4])), model.embed(" ".join(words[:3])))
    with pytest.raises(EngineError, match="longer than the model's table of positions"):
        Embedder.open(tmp_path / "teacher.gguf", context=65)


def test_words_are_learned_without_a_teacher_too(home: Path, tmp_path: Path) -> None:
    body = '[student]\ncheckpoint = "bert"\n[losses]\ncross_entropy = 1'
    (run,) = train_recipe(recipe(home, body, teacher="", schedule="steps = 12"), tmp_path).runs.values()
    assert run.start is not None
    assert run.end is not None
    assert run.end.cross_entropy < run.start.cross_entropy
    assert math.isnan(run.end.rank_correlation)


@pytest.mark.parametrize(
    ("body", "teacher", "message"),
    [
        (MINILM.replace("attention_relation", "forward_kl"), "bert", "needs a student with a head for hidden words"),
        (EMBEDDER.replace("relation", "cosine"), "sentences", "needs models of one width"),
        (EMBEDDER.replace('.json"', '.json"\ntokenizer = "bert"'), "roberta", "tokenizer is not its teacher's"),
        (MASKED, "sentences", "needs a student with a head for hidden words"),
        (f"{OTHER}forward_kl = 1", "sentences", r"losses\.forward_kl needs a teacher with such a head, too"),
        (f"{MASKED}\n[on_policy]", "bert", r"\[on_policy\] is for students that write"),
    ],
)
def test_what_an_encoder_cannot_learn_is_refused(
    home: Path, tmp_path: Path, body: str, teacher: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_recipe(recipe(home, body, teacher), tmp_path)


def test_relations_need_more_than_one_text(home: Path, tmp_path: Path) -> None:
    read = recipe(home, EMBEDDER, "sentences", "steps = 2")
    with pytest.raises(InputError, match=r"needs a schedule\.batch of at least 2"):
        train_recipe(replace(read, schedule=replace(read.schedule, batch=1)), tmp_path)
    for count in (1, 17):  # held-out texts: alone, and more than are read at once
        some = replace(read, data=replace(read.data, held_out_documents=count))
        (run,) = train_recipe(some, tmp_path / str(count)).runs.values()
        assert run.end is not None
        assert (run.end.loss > 0) == (count > 1)


def test_texts_longer_than_the_models_positions_are_refused(home: Path, tmp_path: Path) -> None:
    read = recipe(home, MASKED)
    with pytest.raises(InputError, match=r"data\.context \(expected at most 64, found 65\)"):
        train_recipe(replace(read, data=replace(read.data, context=65)), tmp_path)
