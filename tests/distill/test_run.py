"""The whole way in one process: from a tiny teacher to files that llama.cpp runs, and what a changed recipe does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SMALL_K, TEMPLATE, Case, build, like
from learned_checkpoints import GPT2_K, gpt2
from stand_ins import bert

from gguforge.cli.distill_run import plan_table, planned
from gguforge.distill.recipe import read_recipe
from gguforge.quant.errors import GGUForgeError, InputError, OutputError
from gguforge.quant.quality import QUALITY_KEY
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.reader import read_gguf
from gguforge.runtime.forward import Forward

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguforge.distill.run import follow, stages_of  # noqa: E402
from gguforge.distill.train import train_recipe  # noqa: E402

TEXT = "the quick brown fox jumps over the lazy dog; she sells sea shells on the shore. "
COMMON = """
[data]
text = ["train.txt"]
held_out = ["held-out.txt", "more.txt"]
context = 32
held_out_documents = 4
[hardware]
device = "cpu"
threads = 1
[schedule]
steps = 4
batch = 2
save = 2
"""
WHOLE = f"""{COMMON}
[teacher]
checkpoint = "teacher"
[student]
layers = 1
[collect]
draws = 20
shard_bytes = 2000
[losses]
sampled_kl = 0.9
cross_entropy = 0.1
[finish]
steps = 2
[blocks]
preset = "Q4_K_M"
[output]
name = "tiny"
types = ["Q8_0"]
imatrix = true
calibration_chunks = 1
"""
STAGES = (
    "teacher", "collect", "train", "convert", "calibrate", "finish", "quantize Q8_0", "quantize Q4_K_M",
    "evaluate F16", "evaluate Q8_0", "evaluate Q4_K_M",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = like(SMALL_K, num_hidden_layers=2, intermediate_size=256)
    files = {"tokenizer_config.json": {"chat_template": TEMPLATE}}
    build(Case(config, files=files), folder).rename(folder / "teacher")
    (folder / "train.txt").write_text(TEXT * 30)
    (folder / "held-out.txt").write_text(TEXT[::-1] * 4)
    (folder / "more.txt").write_text(TEXT * 4)
    return folder


def run(home: Path, body: str, output: Path, redo: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The report, and the stages that were done now."""
    (home / "recipe.toml").write_text(body)
    done: list[str] = []
    report = follow(
        read_recipe(home / "recipe.toml"),
        output,
        lambda name, record, kept: None if kept else done.append(name),
        lambda name, done, total, remark: None,
        redo=redo,
    )
    assert report is not None
    return report, done


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    output = tmp_path_factory.mktemp("made") / "out"
    return output, *run(home, WHOLE, output)


@pytest.fixture
def copy(made: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> Path:
    """What a finished run left, in another place: only contents count."""
    shutil.copytree(made[0], tmp_path / "out")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell times."""
    names = ("run.json", "report.json", "report.html")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in names
    }


def test_the_whole_way_ends_with_files_and_figures(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    output, report, done = made
    assert tuple(done) == STAGES
    assert [Path(file["file"]).name for file in report["files"]] == [
        "tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "tiny-F16.gguf"
    ]  # fmt: skip
    for file in report["files"]:
        against = file["evaluation"]["against"]
        assert set(against) == ({"teacher"} if file["type"] == "F16" else {"F16", "teacher"})
        assert file["evaluation"]["perplexity"]["value"] > 1
        assert not file["evaluation"]["notes"]
    assert report["files"][0]["evaluation"]["against"]["F16"]["kld"]["value"] < 0.01
    assert report["summary"][-1] == f"chat with it: gguforge chat {output / 'tiny-Q8_0.gguf'}"
    assert json.loads((output / "report.json").read_text()) == report
    page = (output / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in STAGES)
    assert page.count("<svg") == 4
    assert "the teacher's perplexity is" in page
    assert "http" not in page


def test_the_file_of_the_blocks_holds_the_blocks_that_were_trained(
    made: tuple[Path, dict[str, Any], list[str]],
) -> None:
    output = made[0]
    ours, theirs = (read_gguf(output / name) for name in ("tiny-Q4_K_M.gguf", "finish/model.gguf"))
    for one, other in zip(plan_of_file(ours).tensors, plan_of_file(theirs).tensors, strict=True):
        assert (one.name, one.type) == (other.name, other.type)
        assert np.array_equal(one.source.raw_rows(0, one.rows), other.source.raw_rows(0, other.rows))
    assert ours.metadata["general.name"].value == "tiny"
    assert ours.metadata["quantize.imatrix.file"].value == "imatrix.gguf"
    with Forward.open(output / "tiny-Q4_K_M.gguf", chunk=8, outputs=1, threads=1) as model:
        assert model.vocabulary_size == SMALL_K["vocab_size"]


def test_nothing_is_done_twice_wherever_the_folder_lies(home: Path, copy: Path) -> None:
    before = contents(copy)
    report, done = run(home, WHOLE, copy)
    assert done == []
    assert contents(copy) == before
    assert report["summary"][-1].endswith(str(copy / "tiny-Q8_0.gguf"))


def test_another_type_is_added(home: Path, copy: Path) -> None:
    before = contents(copy)
    done = run(home, WHOLE.replace('["Q8_0"]', '["Q8_0", "Q5_K_S"]'), copy)[1]
    assert done == ["quantize Q5_K_S", "evaluate Q5_K_S"]
    after = contents(copy)
    assert (after.pop("tiny-Q5_K_S.gguf")[:4], after) == (b"GGUF", before)


def test_a_plan_tells_what_is_done_and_what_memory_the_rest_needs(home: Path, copy: Path) -> None:
    (copy / "tiny-Q8_0.gguf").unlink()
    (home / "recipe.toml").write_text(WHOLE)
    stages, state = stages_of(read_recipe(home / "recipe.toml"), copy)
    lines = plan_table(stages, state).splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == list(STAGES)
    assert [" to go on" in line for line in lines] == [name == "quantize Q8_0" for name in STAGES]
    needs = {one["stage"]: one["memory_bytes"] for one in planned(stages, state)["stages"]}
    assert {name for name, need in needs.items() if need is not None} == {"collect", "train", "finish"}
    assert needs["finish"] > needs["train"] > 400 << 20


def test_a_changed_loss_is_refused_and_done_again_on_request(home: Path, copy: Path) -> None:
    before, changed = contents(copy), WHOLE.replace("0.9", "0.5")
    with pytest.raises(OutputError, match=r"stage train: .*losses.sampled_kl was 0\.9, is 0\.5\. .*of train, finish"):
        run(home, changed, copy)
    assert contents(copy) == before
    (home / "recipe.toml").write_text(changed)
    stages, state = stages_of(read_recipe(home / "recipe.toml"), copy)
    assert [state.standing(stage) for stage in stages] == ["done"] * 2 + ["changed"] * 9
    assert plan_table(stages, state).count("changed: only with --redo") == 2
    assert tuple(run(home, changed, copy, redo=True)[1]) == STAGES[2:]
    after = contents(copy)
    assert {name for name in after if before.get(name) == after[name]} >= {"teacher.gguf", "targets/manifest.json"}
    assert after["tiny-Q8_0.gguf"] != before["tiny-Q8_0.gguf"]


def test_another_text_under_the_same_name_is_a_change(home: Path, copy: Path) -> None:
    text = (home / "train.txt").read_text()
    (home / "train.txt").write_text(text + TEXT)
    try:
        with pytest.raises(OutputError, match=r"stage collect: .*data\.text is another"):
            run(home, WHOLE, copy)
    finally:
        (home / "train.txt").write_text(text)


def test_two_runs_do_not_meet_in_a_folder(home: Path, copy: Path) -> None:
    from gguforge.distill.stages import alone

    with alone(copy), pytest.raises(OutputError, match="another run is working"):
        run(home, WHOLE, copy)


def test_train_does_not_leave_stages_out(home: Path, tmp_path: Path) -> None:
    (home / "recipe.toml").write_text(WHOLE)
    with pytest.raises(InputError, match=r"has \[collect\]\. Follow it with: gguforge distill run"):
        train_recipe(read_recipe(home / "recipe.toml"), tmp_path / "out")


DEMO = Path(__file__).parents[2] / "distill" / "demo_model"
ANSWERED = f"""
{COMMON.replace('text = ["train.txt"]', "")}
[generate]
prompts = "prompts.jsonl"
teacher = "{DEMO.as_posix()}"
temperature = 0.8
max_tokens = 96
[student]
config = "small.json"
tokenizer = "{DEMO.as_posix()}"
[losses]
cross_entropy = 1
[output]
types = ["Q4_0"]
quality = "high"
calibration = "long.txt"
calibration_chunks = 1
[report]
teacher = false
"""


def test_a_student_learns_from_answers(home: Path, tmp_path: Path) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    small = {"num_hidden_layers": 1, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    (home / "small.json").write_text(json.dumps(like(config, **small)))
    (home / "prompts.jsonl").write_text('{"prompt": "What is gguforge?"}\n{"prompt": "Who are you?"}\n')
    (home / "long.txt").write_text(TEXT * 60)
    report, done = run(home, ANSWERED, tmp_path / "out")
    assert done == ["teacher", "generate", "train", "convert", "quantize Q4_0", "evaluate F16", "evaluate Q4_0"]
    assert "gguforge turns" in (tmp_path / "out" / "chats.jsonl").read_text()
    assert set(report["files"][0]["evaluation"]["against"]) == {"F16"}
    file = read_gguf(tmp_path / "out" / "student-Q4_0.gguf")
    assert file.metadata[QUALITY_KEY].value == "high"
    assert not list((tmp_path / "out").glob("*.tune"))


def test_an_encoder_ends_with_a_file_that_embeds(home: Path, tmp_path: Path) -> None:
    bert(home / "bert")
    body = COMMON.replace("context = 32", "context = 24") + (
        '[teacher]\ncheckpoint = "bert"\n[student]\nlayers = 2\n[losses]\nforward_kl = 1\n[output]\ntypes = ["Q8_0"]\n'
    )
    report, done = run(home, body, tmp_path / "out")
    assert done == ["teacher", "train", "convert", "quantize Q8_0", "evaluate F16", "evaluate Q8_0"]
    worth = report["files"][0]["evaluation"]["against"]
    assert worth["F16"]["cosine"] > 0.99
    assert -1 <= worth["teacher"]["cosine"] <= 1
    assert "<th>cosine to F16</th>" in (tmp_path / "out" / "report.html").read_text()
    assert report["summary"][-1].startswith("embed with it: python3 -c ")
    refused(home, body + "imatrix = true\n", tmp_path / "other", "students that predict the next token")


def refused(home: Path, body: str, output: Path, message: str) -> None:
    with pytest.raises(GGUForgeError, match=re.escape(message)) as caught:
        run(home, body, output)
    assert "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.replace('"train.txt"', '"absent.txt"'), "absent.txt: there is no such file"),
        (lambda body: body.replace('"teacher"', '"absent"'), "absent"),
        (lambda body: body.replace('["Q8_0"]', '["IQ2_XS"]').replace("imatrix = true", ""), "needs an importance"),
        (lambda body: body.replace('[blocks]\npreset = "Q4_K_M"', ""), "[finish] needs [blocks]"),
        (lambda body: body.replace('name = "tiny"', 'name = "../tiny"'), "output.name"),
    ],
)
def test_what_cannot_be_done_is_known_before_any_work(
    home: Path, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    refused(home, change(WHOLE), tmp_path / "out", message)


def test_a_teacher_that_reads_other_tokens_is_known_before_it_is_asked(home: Path, tmp_path: Path) -> None:
    build(gpt2(GPT2_K), tmp_path).rename(tmp_path / "gpt2")
    body = COMMON + f'[collect]\nteachers = ["{tmp_path / "gpt2"}"]\n[student]\ncheckpoint = "teacher"\n'
    refused(home, body + "[losses]\nsampled_kl = 1\n", tmp_path / "out", "tokenizer is not its teacher's")


def test_a_student_that_cannot_be_converted_is_known_before_it_is_trained(home: Path, tmp_path: Path) -> None:
    (home / "opt.json").write_text('{"architectures": ["OPTForCausalLM"], "model_type": "opt"}')
    body = COMMON + '[student]\nconfig = "opt.json"\ntokenizer = "teacher"\n[losses]\ncross_entropy = 1\n'
    refused(home, body, tmp_path / "out", "cannot become a GGUF file")
