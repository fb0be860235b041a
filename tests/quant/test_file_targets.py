"""What a file may replace, and who may write it: locks, part files, links, inputs."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from faults import posix

from gguforge.quant import files
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import OutputError
from gguforge.quant.files import replacing
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import FileSource
from gguforge.quant.writer import write


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no fcntl, as on Windows"])
def test_two_runs_at_once(locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks:
        monkeypatch.setattr(files, "fcntl", None)
    target = tmp_path / "m.gguf"
    with replacing(target, 4) as part:
        part.write_bytes(b"good")
        with (
            pytest.raises(OutputError, match=r"^\S+m\.gguf\.part: another run is writing this file"),
            replacing(target, 4),
        ):
            pytest.fail("the second run got in")
    assert target.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_a_run_that_opens_the_part_while_another_finishes_makes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock comes free in the very moment in which the part file gets its final name."""
    target = tmp_path / "m.gguf"
    real = files.lock

    def finish_then_lock(descriptor: int) -> None:
        monkeypatch.setattr(files, "lock", real)
        os.replace(tmp_path / "m.gguf.part", target)  # what the other run does with it
        real(descriptor)

    (tmp_path / "m.gguf.part").write_bytes(b"whole")
    monkeypatch.setattr(files, "lock", finish_then_lock)
    with contextlib.suppress(ZeroDivisionError), replacing(target, 4, overwrite=True):
        assert target.read_bytes() == b"whole"
        raise ZeroDivisionError
    assert target.read_bytes() == b"whole"


@pytest.mark.parametrize("journal", [b"", b"\0" * 512, b"gguforge journal 1 ", b"gguforge journal 1 0123\n5 torn"])
def test_a_stale_part_is_taken_over(journal: bytes, plan: Plan, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.part").write_bytes(b"x" * 100_000)
    (tmp_path / "out.gguf.part.journal").write_bytes(journal)
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.bin", "out.gguf"]


def test_an_empty_part_is_taken_over(plan: Plan, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.part").touch()
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole


@pytest.mark.parametrize(("name", "what"), [("part", "no part file of ours"), ("part.journal", "no journal of ours")])
def test_files_of_others_are_not_touched(name: str, what: str, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / f"out.gguf.{name}").write_bytes(b"precious")
    with pytest.raises(OutputError, match=what):
        write(plan, tmp_path / "out.gguf", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.bin", f"out.gguf.{name}"]
    assert (tmp_path / f"out.gguf.{name}").read_bytes() == b"precious"


@posix
def test_a_part_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "m.gguf.part").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic link"), replacing(tmp_path / "m.gguf", 4):
        pass
    assert (tmp_path / "precious").read_bytes() == b"precious"


@posix
def test_a_link_as_target_stays_a_link(plan: Plan, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.gguf").symlink_to("elsewhere/real.gguf")
    write(plan, tmp_path / "link.gguf", workers=1)
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "elsewhere" / "real.gguf").read_bytes() == whole
    with pytest.raises(OutputError, match="exists"):
        write(plan, tmp_path / "link.gguf", workers=1)


def test_targets_that_cannot_be(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "exists").touch()
    cases = [("folder", "this is a folder"), ("no/where", "no such folder"), ("exists", "Pass --overwrite")]
    for name, message in cases:
        with pytest.raises(OutputError, match=message):
            write(plan, tmp_path / name, workers=1)
    if os.name == "posix":
        with pytest.raises(OutputError, match="device or pipe"):
            write(plan, "/dev/full", workers=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exists", "folder", "input.bin"]


@pytest.mark.parametrize("name", ["same", "symlink", "hard link", "part"])
def test_the_output_is_never_an_input(name: str, plan: Plan, tmp_path: Path) -> None:
    source, output = tmp_path / "input.bin", tmp_path / "out.gguf"
    before = source.read_bytes()
    if name == "same":
        output = source
    elif name == "symlink":
        output.symlink_to(source)
    elif name == "hard link":
        output.hardlink_to(source)
    else:  # the part file of the output is the input: it would be emptied
        source = source.rename(tmp_path / "out.gguf.part")
        moved = FileSource(str(source), 0, (64,), T.F32)
        plan = Plan({}, (TensorPlan("a", (64,), T.F32, moved),))
    with pytest.raises(OutputError, match="same file"):
        write(plan, output, workers=1, overwrite=True)
    assert source.read_bytes() == before


def test_a_target_that_comes_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"

    def run() -> None:
        with replacing(target, 4) as part:
            part.write_bytes(b"mine")
            target.write_bytes(b"theirs")

    with pytest.raises(OutputError, match="exists"):
        run()
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_too_small_is_found_at_once(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"not enough disk space \(expected [\d,]+ bytes, found 100 free\)"):
        write(plan, tmp_path / "out.gguf", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["input.bin"]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_not_renamed(change: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="changed its size"), replacing(tmp_path / "m.gguf", 8) as part:
        os.truncate(part, 8 + change)
    assert list(tmp_path.iterdir()) == []


def test_nothing_can_be_written_too(tmp_path: Path) -> None:
    with replacing(tmp_path / "empty", 0):
        pass
    assert (tmp_path / "empty").read_bytes() == b""
