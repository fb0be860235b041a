"""A stopped run goes on where it was: to the same bytes, whatever was torn, and only if nothing has changed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguforge.quant import files, following, slabs, writer
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError
from gguforge.quant.journal import Journal, Record
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write, write_all

pytestmark = pytest.mark.skipif(files.fcntl is None, reason="without file locks nothing is taken over")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slabs, and a record after each that the thread sees."""
    monkeypatch.setattr(slabs, "ENCODE_SLAB", 1 << 13)
    monkeypatch.setattr(slabs, "COPY_SLAB", 1 << 10)
    monkeypatch.setattr(following, "RECORD_SECONDS", 0)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return retype(models.build(tmp_path, T.F16, layers=2), "Q8_0")


@pytest.fixture
def whole(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(following, "RECORD_SECONDS", 1000)
        write(plan, tmp_path / "whole.gguf", workers=1)
    return (tmp_path / "whole.gguf").read_bytes()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "m.gguf"


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def stop(plan: Plan, out: Path, share: float, workers: int = 1) -> KeyboardInterrupt:
    """A run that Ctrl-C ends after that share of its bytes, once something is recorded."""
    done, journal = 0, out.with_name("m.gguf.part.journal")

    def recorded() -> bool:
        return journal.read_bytes().count(b"\n") > 1

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        patience = time.monotonic() + 10
        while done > 0.9 * plan.data_bytes and not recorded() and time.monotonic() < patience:
            os.sched_yield()  # a busy machine: what came before is known to the thread, which will record it
        if done > share * plan.data_bytes and recorded():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        write(plan, out, workers=workers, progress=progress)
    return stopped.value


def finish(plan: Plan, out: Path, workers: int = 1) -> tuple[list[str], int]:
    """What the next run says, and how many bytes it reports; it leaves nothing but the file."""
    said: list[str] = []
    seen: list[int] = []
    write(plan, out, workers=workers, say=said.append, progress=seen.append)
    assert left(out) == ["m.gguf"]
    return said, sum(seen)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_stopped_run_goes_on(share: float, workers: int, plan: Plan, whole: bytes, out: Path) -> None:
    (note,) = stop(plan, out, share, workers).__notes__
    kept = re.fullmatch(r"(.*m\.gguf\.part) keeps (\d+ of 21 tensors): the same command goes on from there\.", note)
    assert kept is not None
    assert left(out) == ["m.gguf.part", "m.gguf.part.journal"]
    said, seen = finish(plan, out, workers)
    assert said == [f"resuming: {kept[2]} are done"]
    assert out.read_bytes() == whole
    assert seen >= sum(tensor.nbytes for tensor in plan.tensors)


def test_what_is_done_is_not_done_again(plan: Plan, whole: bytes, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(plan, out, 0.6)
    position = Journal(out.with_name("m.gguf.part")).records(following.fingerprint(plan))[-1].position
    assert position > 0.5 * plan.data_bytes
    filled, real = [], slabs.Filler.do

    def do(self: slabs.Filler, number: int) -> int:
        filled.append(slabs.end(plan, self.work[number]))
        return real(self, number)

    monkeypatch.setattr(slabs.Filler, "do", do)
    finish(plan, out)
    assert min(filled) > position
    assert out.read_bytes() == whole


def test_it_is_stopped_again_and_again(plan: Plan, whole: bytes, out: Path) -> None:
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        stop(plan, out, share)
    finish(plan, out)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("place", [0.02, 0.4, 1.0])
def test_a_torn_page_does_not_survive(place: float, plan: Plan, whole: bytes, out: Path) -> None:
    stop(plan, out, 0.6)
    part = out.with_name("m.gguf.part")
    first, *_, last = Journal(part).records(following.fingerprint(plan))
    torn = len(plan.header) + int(place * (last.position - len(plan.header) - 1))
    with part.open("r+b") as file:
        file.seek(torn)
        byte = file.read(1)
        file.seek(torn)
        file.write(bytes([byte[0] ^ 1]))
    said, _ = finish(plan, out)
    assert "is damaged: what follows byte" in said[0]
    assert len(said) == (1 if torn < first.position else 2)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 70, 9))
def test_a_torn_journal(cut: int, plan: Plan, whole: bytes, out: Path) -> None:
    stop(plan, out, 0.6)
    journal = out.with_name("m.gguf.part.journal")
    journal.write_bytes(journal.read_bytes()[:-cut])
    said, _ = finish(plan, out)
    assert said[0].startswith("resuming: ")
    assert out.read_bytes() == whole


def test_another_plan_starts_anew(plan: Plan, out: Path, tmp_path: Path) -> None:
    stop(plan, out, 0.6)
    other = retype(models.build(tmp_path, T.F16, layers=2), "Q4_0")
    said, _ = finish(other, out)
    assert said == [f"{out}.part is left from another plan, or its inputs have changed: starting anew"]
    write(other, out.with_name("other"), workers=1)
    assert out.read_bytes() == out.with_name("other").read_bytes()


def test_changed_inputs_start_anew_even_if_they_look_as_before(plan: Plan, whole: bytes, out: Path) -> None:
    stop(plan, out, 0.6)
    (path,) = {path for tensor in plan.tensors for path in tensor.source.paths}
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(bytes(8))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    said, _ = finish(plan, out)
    assert "starting anew" in said[0]
    assert out.read_bytes() != whole


def test_data_that_cannot_be_encoded_leaves_nothing(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(plan, out, 0.3)

    def fails(self: slabs.Filler, number: int) -> int:
        raise DataError("holds NaN")

    monkeypatch.setattr(slabs.Filler, "do", fails)
    with pytest.raises(DataError):
        write(plan, out, workers=1)
    assert left(out) == []


def test_ctrl_c_while_what_was_done_is_checked(plan: Plan, whole: bytes, out: Path) -> None:
    stop(plan, out, 0.6)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        write(plan, out, workers=1, progress=interrupt)
    assert "keeps the work of an earlier run" in stopped.value.__notes__[0]
    finish(plan, out)
    assert out.read_bytes() == whole


def test_short_runs_leave_nothing(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RECORD_SECONDS", 1000)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(plan, out, workers=1, progress=interrupt)
    assert left(out) == []


def test_of_several_files_those_that_are_done_are_kept(plan: Plan, whole: bytes, out: Path) -> None:
    names = [out.with_name(f"{i}.gguf") for i in range(3)]
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if done > 1.5 * plan.data_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        write_all([(name, plan) for name in names], workers=1, progress=progress)
    assert len(stopped.value.__notes__) == 1
    assert {"0.gguf.part", "0.gguf.part.journal"} <= set(left(out))
    said: list[str] = []
    write_all([(name, plan) for name in names], workers=1, say=said.append)
    assert said[0] == "resuming: 21 of 21 tensors are done"
    assert [name.read_bytes() for name in names] == [whole] * 3
    assert left(out) == [name.name for name in names]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import models
from gguforge.quant import following, slabs
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import GGUForgeError
from gguforge.quant.quantize import retype
from gguforge.quant.writer import write

slabs.ENCODE_SLAB, slabs.COPY_SLAB, following.RECORD_SECONDS = 1 << 13, 1 << 10, 0
folder, random = Path({folder!r}), random.Random({seed})
plan, target = retype(models.build(folder, T.F16, layers=2), "Q4_0"), folder / "m.gguf"
write(plan, folder / "whole.gguf", workers=1)
real = slabs.Filler.do
run = 0
while run < 100:
    lives = random.randrange(1, 25 + 5 * run)  # longer and longer, so that it ends on a busy machine too

    def do(filler, number):
        global lives
        lives -= 1
        if not lives:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(filler, number)

    slabs.Filler.do = do
    child = os.fork()
    if not child:
        try:
            write(plan, target, workers=random.choice([1, 2]), say=lambda line: print(line, flush=True))
        except GGUForgeError as error:  # a worker was killed, or one of the killed run has not noticed yet
            os._exit(2 if "another run" in error.what else 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert not target.exists()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
        time.sleep(0.05)  # and look again: it notices within a second
    else:
        run += 1
print(run)
assert target.read_bytes() == (folder / "whole.gguf").read_bytes()
assert sorted(path.name for path in folder.iterdir()) == ["m.gguf", "weights.bin", "whole.gguf"]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and kill")
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments(seed: int, tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), seed=seed)
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    *said, runs = child.stdout.splitlines()
    assert int(runs) > 2
    counts = [int(line.split()[1]) for line in said if line.startswith("resuming: ")]
    assert len(counts) > 1
    assert counts == sorted(counts), "a later run knew of less"


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32)), max_size=5), st.data())
def test_a_journal_cut_anywhere_gives_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    records = [Record(position, digest.hex()) for position, digest in found]
    journal = Journal(tmp_path_factory.mktemp("journal") / "part")
    journal.begin("name", records[:2])
    for record in records[2:]:
        journal.append(record)
    assert journal.records("name") == records
    text = journal.path.read_bytes()
    cut = data.draw(st.integers(0, len(text)))
    journal.path.write_bytes(text[:cut])
    assert journal.records("name") == records[: max(0, text[:cut].count(b"\n") - 1)]
    assert journal.records("other") == journal.records("") == []


def test_hashes_are_those_of_the_tensors(plan: Plan, out: Path) -> None:
    written = write(plan, out, workers=2)
    data, file = out.read_bytes(), read_gguf(out)
    tensors = [hashlib.sha256(data[t.offset : t.offset + t.nbytes]) for t in file.tensors]
    assert written.tensors == tuple(tensor.hexdigest() for tensor in tensors)
    header = hashlib.sha256(data[: file.data_offset]).digest()
    assert written.digest == hashlib.sha256(header + b"".join(tensor.digest() for tensor in tensors)).hexdigest()


def test_the_header_of_a_run_that_was_stopped_at_the_end_goes_first(
    plan: Plan, whole: bytes, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    part = out.with_name("m.gguf.part")
    for owner, name, header in ((writer, "verify", plan.header), (writer.Team, "run", bytes(len(plan.header)))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write(plan, out, workers=1)
        assert part.read_bytes() == header + whole[len(header) :]
    finish(plan, out)
    assert out.read_bytes() == whole
