"""`gguforge demo` through the installed script: table, files, one answer from a pipe."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gguforge.cli.demo import ANSWER_COLUMN, _row
from gguforge.distill.demo.demonstration import CHECKPOINT, QUESTION, Version
from gguforge.distill.demo.lessons import read_course

SCRIPT = Path(sysconfig.get_path("scripts")) / ("gguforge.exe" if sys.platform == "win32" else "gguforge")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    if not SCRIPT.exists():
        pytest.skip("the gguforge script is not installed")
    return subprocess.run(
        [SCRIPT, "demo", *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def joined(text: str) -> str:
    return " ".join(text.split())


def answers(question: str) -> list[str]:
    from gguforge.distill.demo.data import Talk, plain

    return Talk(read_course(), 0).known[plain(question)].answers


def test_demo_shows_the_table_and_answers_the_piped_question() -> None:
    done = run(stdin="What is your name?\n")
    assert (done.returncode, "rror" in done.stderr) == (0, False), done.stderr
    table, _, rest = done.stdout.partition("Q2_K ")
    assert joined(table).count(answers(QUESTION)[0]) == 2, "BF16 and Q4_K_M say it as they learned it"
    assert "16.01" in table
    assert joined(rest).endswith(answers("What is your name?")[0])


def test_demo_keeps_the_files_where_it_is_told_and_does_not_overwrite(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "new"), "--prompt", "What is GGUF?")
    assert done.returncode == 0, done.stderr
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").glob("*.gguf")}
    assert sorted(sizes) == [f"gguforge-demo-{kind}.gguf" for kind in ("BF16", "Q2_K", "Q4_K_M")]
    full, small, medium = (sizes[name] for name in sorted(sizes))
    assert full > 3 * medium > 3 * small
    assert (tmp_path / "new" / "checkpoint" / "model.safetensors").is_file()
    assert joined(done.stdout).endswith(answers("What is GGUF?")[0])
    again = run("--output", str(tmp_path / "new"))
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "file exists" in again.stderr


def test_demo_names_the_checkpoint_that_ships() -> None:
    assert (CHECKPOINT / "config.json").is_file()


def test_row_folds_a_long_answer_under_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    row = _row(Version("Q4_K_M", Path("m.gguf"), 3_265_312, 4.904, 0.5, "A student learns. " * 6))
    first, *others = row.splitlines()
    assert first.startswith("Q4_K_M      3,265,312      4.90     0.50   A student learns.")
    assert others
    assert all(line.startswith(" " * ANSWER_COLUMN + "A") or line[ANSWER_COLUMN] != " " for line in others)
    assert all(len(line) < 90 for line in row.splitlines())
