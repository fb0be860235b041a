"""`gguforge distill run` through the installed script, killed and taken up again, alone and in two processes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import SMALL_K, TEMPLATE, Case, build, like
from running import COMMAND, refused, run, start, wait_until

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEXT = "the quick brown fox jumps over the lazy dog; she sells sea shells on the shore. "
RECIPE = """
[data]
text = ["train.txt"]
held_out = ["held-out.txt"]
context = 32
held_out_documents = 4
[teacher]
checkpoint = "teacher"
[student]
layers = 1
[collect]
draws = 20
shard_bytes = 1000
[losses]
sampled_kl = 0.9
cross_entropy = 0.1
[schedule]
steps = 12
batch = 2
save = 2
[finish]
steps = 4
[blocks]
preset = "Q4_K_M"
[hardware]
device = "cpu"
threads = 1
"""
FILE = "student-Q4_K_M.gguf"
LAUNCHERS = {
    "torchrun": ["--no-python", "--nproc-per-node", "2", "--standalone"],
    "accelerate": ["launch", "--multi_gpu", "--num_processes", "2", "--no_python"],
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    config = like(SMALL_K, num_hidden_layers=2, intermediate_size=256)
    files = {"tokenizer_config.json": {"chat_template": TEMPLATE}}
    build(Case(config, files=files), tmp_path).rename(tmp_path / "teacher")
    (tmp_path / "train.txt").write_text(TEXT * 60)
    (tmp_path / "held-out.txt").write_text(TEXT * 4)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that tells no times; what training goes on from is pickled, which has many bytes for one content."""
    told = ("run.json", "report.json", "report.html", "state.pt")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in told)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_dry_run_plans_and_writes_nothing(home: Path) -> None:
    done = run("distill", "run", home / "recipe.toml", "-o", home / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    stages = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
    assert stages[:3] == ["teacher", "collect", "train"]
    assert stages[-1] == "evaluate Q4_K_M"
    assert done.stdout.count("to do") == len(stages)
    assert "MiB" in done.stdout
    assert not (home / "out").exists()


def test_a_missing_text_is_one_line(home: Path) -> None:
    (home / "train.txt").unlink()
    refused(run("distill", "run", home / "recipe.toml", "-o", home / "out"), "train.txt: there is no such file")
    assert not (home / "out").exists()


@pytest.mark.slow
def test_killed_in_every_costly_stage_it_ends_with_the_same_bytes_and_a_chat(home: Path) -> None:
    whole = run("distill", "run", home / "recipe.toml", "-o", home / "whole", "--json", timeout=180)
    assert whole.returncode == 0, whole.stderr
    assert [stage["stage"] for stage in json.loads(whole.stdout)["stages"]][-1] == "evaluate Q4_K_M"
    for moment in ("targets/manifest.json", "train/runs/student-0/state.pt", "finish/runs/student-0/state.pt"):
        process = start("distill", "run", home / "recipe.toml", "-o", home / "killed")
        wait_until(lambda path=home / "killed" / moment: path.exists(), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = run("distill", "run", home / "recipe.toml", "-o", home / "killed", timeout=180)
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stderr
    assert "(done before)" in done.stderr
    assert contents(home / "killed") == contents(home / "whole")
    sentence = done.stdout.splitlines()[-1]
    assert sentence == f"chat with it: gguforge chat {home / 'killed' / FILE}"
    words = shlex.split(sentence.partition(": gguforge ")[2])
    assert run(*words, "-p", "the fox?").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "name"), [("torchrun", "run"), ("torchrun", "train"), ("accelerate", "run")])
def test_two_processes_share_the_training(home: Path, launcher: str, name: str) -> None:
    script = shutil.which(launcher, path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip(f"{launcher} is not installed")
    body = RECIPE if name == "run" else RECIPE.replace("[finish]\nsteps = 4\n", "")
    if name == "train":
        body = body.replace("[collect]\ndraws = 20\nshard_bytes = 1000\n", "").replace("sampled_kl", "forward_kl")
    (home / "recipe.toml").write_text(body)
    launch = [script, *LAUNCHERS[launcher]]
    counted = [*launch, sys.executable, "-c", "import os; print(os.environ['WORLD_SIZE'])"]
    assert subprocess.run(counted, capture_output=True, text=True, timeout=60).stdout.split() == ["2", "2"]
    command = [*launch, *COMMAND]
    words = ["distill", name, str(home / "recipe.toml"), "-o", str(home / "out")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chat with it: gguforge chat") == 1  # the first process alone speaks
    again = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(done before)") == (8 if name == "run" else 0)
