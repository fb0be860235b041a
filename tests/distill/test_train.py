"""Recipes from end to end: text and teacher in, checkpoint, blocks and report out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SMALL_K, Case, build, like
from learned_checkpoints import GPT2_K, gpt2
from target_sets import manifest, random_document

from gguforge.convert.conversion import plan
from gguforge.distill.recipe import Recipe, TeacherPart, read_recipe
from gguforge.distill.shards import write_shard
from gguforge.distill.targets import KEY, write_manifest
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError
from gguforge.quant.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.reader import read_gguf
from gguforge.runtime.forward import Forward

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguforge.distill.report import summary  # noqa: E402
from gguforge.distill.students import open_model  # noqa: E402
from gguforge.distill.train import Trained, train_recipe  # noqa: E402

CONFIG = like(SMALL_K, num_hidden_layers=2, intermediate_size=256)
TEXT = "the quick brown fox jumps over the lazy dog; she sells sea shells on the shore. "
SCHEDULE = "steps = 4\nbatch = 2\nrate = 2e-4\nevaluate = 2\nsave = 2"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and text to train and to measure on."""
    folder = tmp_path_factory.mktemp("train")
    build(Case(CONFIG), folder).rename(folder / "teacher")
    (folder / "text.txt").write_text(TEXT * 20)
    (folder / "held-out.txt").write_text(TEXT * 4)
    return folder


def recipe(home: Path, body: str, data: str = 'text = ["text.txt"]') -> Recipe:
    path = home / "recipe.toml"
    path.write_text(
        f'[data]\n{data}\nheld_out = ["held-out.txt"]\ncontext = 32\n[teacher]\ncheckpoint = "teacher"\n'
        f'[hardware]\ndevice = "cpu"\nthreads = 1\n{body}\n[schedule]\n{SCHEDULE}\n'
    )
    return read_recipe(path)


ONLINE = "[student]\nlayers = 1\n[losses]\nforward_kl = 0.9\ncross_entropy = 0.1\n"
BLOCKS = '[student]\ncheckpoint = "teacher"\n[losses]\nforward_kl = 1\n[report]\nbaseline = false\n'


def test_a_student_is_cut_trained_measured_and_saved(home: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    trained = train_recipe(recipe(home, ONLINE), tmp_path, lambda name, step, losses: told.append((name, step)))
    assert told == [(name, step) for name in ("student-0", "baseline-0") for step in range(1, 5)]
    made = plan(tmp_path / "checkpoint", "Q4_K_M")
    assert made.metadata["llama.block_count"].value == 1
    found = json.loads((tmp_path / "report.json").read_text())
    end = found["runs"]["student-0"]["end"]
    assert end["positions"] > 20
    assert 0 < end["divergence"] < found["runs"]["student-0"]["start"]["divergence"]
    assert len(found["gaps"]["gap to the teacher closed"]) == 1
    assert trained.memory.total > 4 * trained.parameters
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2
    assert "student-0, after" in text
    assert "http" not in text


def test_a_finished_recipe_is_not_trained_again_and_takes_more_seeds(home: Path, tmp_path: Path) -> None:
    first = train_recipe(recipe(home, ONLINE), tmp_path)
    told: list[str] = []
    second = train_recipe(recipe(home, ONLINE), tmp_path, lambda name, step, losses: told.append(name))
    assert not told
    read = recipe(home, ONLINE)
    more = replace(read, schedule=replace(read.schedule, seeds=(0, 1)))
    train_recipe(more, tmp_path, lambda name, step, losses: told.append(name))
    assert set(told) == {"student-1", "baseline-1"}
    assert second.runs["student-0"].history == first.runs["student-0"].history
    assert second.runs["student-0"].end == first.runs["student-0"].end


def test_another_recipe_does_not_go_on_in_the_same_folder(home: Path, tmp_path: Path) -> None:
    train_recipe(recipe(home, ONLINE), tmp_path)
    with pytest.raises(InputError, match="checkpoint is of another recipe"):
        train_recipe(recipe(home, ONLINE.replace("0.9", "0.8")), tmp_path)


@pytest.mark.parametrize("scales_only", ["false", "true"])
def test_blocks_that_are_trained_are_the_blocks_of_the_file(home: Path, tmp_path: Path, scales_only: str) -> None:
    body = f'{BLOCKS}[blocks]\npreset = "Q4_K_M"\nrefresh = 3\nscales_only = {scales_only}\n'
    read = recipe(home, body)
    longer = replace(read, schedule=replace(read.schedule, steps=20, batch=4))
    trained = train_recipe(longer, tmp_path)
    file = plan_of_file(read_gguf(tmp_path / "model.gguf"))
    checkpoint = plan(tmp_path / "checkpoint", "F32")
    assert {tensor.type.name for tensor in file.tensors} == {"F32", "Q4_K", "Q6_K"}
    assert {tensor.name for tensor in file.tensors} == {tensor.name for tensor in checkpoint.tensors}
    rows = {tensor.name: tensor.source.rows(0, tensor.rows) for tensor in checkpoint.tensors}
    for tensor in file.tensors:
        assert np.array_equal(tensor.source.rows(0, tensor.rows), rows[tensor.name]), tensor.name
    run = trained.runs["student-0"]
    assert trained.unquantized is not None
    assert trained.unquantized.divergence < 1e-6
    assert run.start is not None
    assert run.end is not None
    assert run.end.divergence < run.start.divergence
    assert any("recovered" in line for line in summary(trained))


def test_an_importance_matrix_guides_the_blocks_and_is_named_in_the_file(home: Path, tmp_path: Path) -> None:
    sums = np.linspace(0, 1, 256, dtype=np.float32)[None] ** 4
    matrix = ImportanceMatrix({"blk.0.ffn_gate.weight": Entry(sums, np.array([1]))}, ("text.txt",), 1)
    write_imatrix(matrix, tmp_path / "some.imatrix")
    body = f'{BLOCKS}[blocks]\npreset = "Q4_0"\nimatrix = "{tmp_path / "some.imatrix"}"\n'
    train_recipe(recipe(home, body), tmp_path / "out")
    file = read_gguf(tmp_path / "out" / "model.gguf")
    assert file.metadata["quantize.imatrix.entries_count"].value == 1


def test_gpt_2_is_trained_on_its_transposed_blocks(home: Path, tmp_path: Path) -> None:
    build(gpt2(like(GPT2_K, n_layer=1), folder="gpt2"), tmp_path)
    body = f'{BLOCKS}[blocks]\npreset = "Q4_0"\n'.replace("teacher", str(tmp_path / "gpt2"))
    read = recipe(home, body)
    train_recipe(replace(read, teacher=TeacherPart(tmp_path / "gpt2")), tmp_path / "out")
    file = plan_of_file(read_gguf(tmp_path / "out" / "model.gguf"))
    tensors = {tensor.name: tensor for tensor in plan(tmp_path / "out" / "checkpoint", "F32").tensors}
    assert {tensor.type.name for tensor in file.tensors} == {"F32", "Q4_0", "Q6_K"}
    for tensor in file.tensors:
        trained = tensors[tensor.name].source.rows(0, tensor.rows)
        assert np.array_equal(tensor.source.rows(0, tensor.rows), trained), tensor.name


def test_a_student_writes_a_share_of_its_text_itself_and_its_baseline_does_not(home: Path, tmp_path: Path) -> None:
    body = f"{ONLINE}[on_policy]\nshare = 0.5\nprompt = 4\ntokens = 5\nrefresh = 2\n"
    told: dict[str, list[set[str]]] = {}
    trained = train_recipe(
        recipe(home, body), tmp_path, lambda name, step, losses: told.setdefault(name, []).append(set(losses))
    )
    data, own = {"loss", "forward_kl", "cross_entropy"}, {"loss", "on_policy"}
    assert told["student-0"] == [data, own, data, own]
    assert told["baseline-0"] == 4 * [{"loss", "cross_entropy"}]
    assert trained.memory.writing > 0
    assert train_recipe(recipe(home, body), tmp_path).runs["student-0"].history == trained.runs["student-0"].history


def test_llama_cpp_computes_what_was_trained(home: Path, tmp_path: Path) -> None:
    train_recipe(recipe(home, f'{BLOCKS}[blocks]\npreset = "Q8_0"\n'), tmp_path)
    student = open_model(tmp_path / "checkpoint").eval()
    with Forward.open(tmp_path / "model.gguf", chunk=32, outputs=32, threads=1) as model:
        tokens = model.tokenize(TEXT.encode())[:32]
        theirs = np.concatenate([scores.copy() for _, scores in model.read(tokens, 0, 32)])
    with torch.no_grad():
        ours = student(input_ids=torch.from_numpy(tokens).long()[None]).logits[0].numpy()
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.9
    assert (ours - theirs).std() < 0.05 * ours.std()  # llama.cpp rounds activations to 8 bits


def random_targets(home: Path, folder: Path, tokenizer: str | None = None) -> None:
    """Targets that stand for the teacher's tokenizer, of random contents."""
    with Tokenizer.open(home / "teacher") as opened:
        sha256 = opened.identity.sha256 if tokenizer is None else tokenizer
    made = replace(manifest(vocabulary=CONFIG["vocab_size"]), tokenizer_sha256=sha256)
    folder.mkdir()
    write_manifest(folder, made)
    draw = np.random.default_rng(0)
    documents = [random_document(draw, made.layout, 24) for _ in range(5)]
    write_shard(folder / made.shard_name(0), documents, made.layout, {KEY: made.key})


OFFLINE = '[student]\nconfig = "teacher/config.json"\n[losses]\nsampled_kl = 0.9\ncross_entropy = 0.1\n'


def trained_offline(home: Path, output: Path, targets: Path, **changes: Any) -> Trained:
    body = recipe(home, OFFLINE, f'targets = "{targets}"')
    return train_recipe(replace(body, schedule=replace(body.schedule, **changes)), output)


def test_a_student_learns_from_stored_targets_with_several_seeds(home: Path, tmp_path: Path) -> None:
    random_targets(home, tmp_path / "targets")
    trained = trained_offline(home, tmp_path / "out", tmp_path / "targets", seeds=(1, 2, 3), steps=6, rate=1e-3)
    assert list(trained.runs) == [f"{kind}-{seed}" for seed in (1, 2, 3) for kind in ("student", "baseline")]
    losses = [trained.runs[f"student-{seed}"].history.losses for seed in (1, 2, 3)]
    assert losses[0] != losses[1]
    assert all(run[-1] < run[0] for run in losses)


def test_targets_of_another_tokenizer_are_refused(home: Path, tmp_path: Path) -> None:
    random_targets(home, tmp_path / "targets", tokenizer="33" * 32)
    with pytest.raises(InputError, match="another tokenizer"):
        trained_offline(home, tmp_path / "out", tmp_path / "targets")
    random_targets(home, tmp_path / "imported", tokenizer="")
    with pytest.raises(InputError, match="do not say which tokenizer"):
        trained_offline(home, tmp_path / "out", tmp_path / "imported")


def test_a_teacher_in_memory_that_reads_other_tokens_is_refused(home: Path, tmp_path: Path) -> None:
    build(gpt2(GPT2_K), tmp_path).rename(tmp_path / "gpt2")
    found = recipe(home, BLOCKS)
    with pytest.raises(InputError, match=r"tokenizer is not its teacher's .*gpt2"):
        train_recipe(replace(found, teacher=TeacherPart(tmp_path / "gpt2")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_losses_of_embeddings_are_for_encoders(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="embedding_cosine is for encoders"):
        train_recipe(recipe(home, "[student]\nlayers = 1\n[losses]\nembedding_cosine = 1\n"), tmp_path)


def test_states_of_another_width_are_refused(home: Path, tmp_path: Path) -> None:
    body = "[student]\nhidden_size = 64\n[losses]\nhidden_mse = 1\n"
    with pytest.raises(InputError, match="models of one width"):
        train_recipe(recipe(home, body), tmp_path)
