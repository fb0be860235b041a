"""Workers: the same bytes however they are started, and one clear error when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest

from gguforge.quant import slabs as slabs_module
from gguforge.quant import workers, writer
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError, GGUForgeError, OutputError
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quantize import retype
from gguforge.quant.slabs import Filler, slabs
from gguforge.quant.sources import ArraySource
from gguforge.quant.workers import processors, start_method
from gguforge.quant.writer import default_workers, peak_memory, write

forked = pytest.mark.skipif(start_method() != "fork", reason="workers inherit the test's changes when forked")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Work for several processes: 83 tensors."""
    return retype(models.build(tmp_path, T.F16), "Q8_0")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "model.gguf"


def nothing_left(out: Path) -> bool:
    return list(out.parent.iterdir()) == [] and multiprocessing.active_children() == []


def test_slabs_cover_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs_module, "ENCODE_SLAB", 1000)
    monkeypatch.setattr(slabs_module, "COPY_SLAB", 3000)
    plan = retype(models.build(tmp_path, T.F16, layers=2), "Q4_K_M")
    rows = [0] * len(plan.tensors)
    for slab in slabs(plan):
        assert slab.start == rows[slab.index] < slab.stop
        rows[slab.index] = slab.stop
    assert rows == [tensor.rows for tensor in plan.tensors]
    assert len(list(slabs(plan))) > 100


def test_a_tensor_without_elements_has_no_slabs() -> None:
    empty = [ArraySource(np.zeros(shape, np.float32)) for shape in [(0,), (5, 0), (0, 4)]]
    plan = Plan({}, tuple(TensorPlan(str(i), source.shape, T.F32, source) for i, source in enumerate(empty)))
    assert list(slabs(plan)) == []
    assert plan.bits_per_weight == 0


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_every_way_to_start_workers_gives_the_same_file(
    method: str, plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "forkserver":
        pytest.skip("is not used: workers must be children of the first process")
    write(plan, out, workers=1)
    alone = out.read_bytes()
    monkeypatch.setattr(workers, "start_method", lambda: method)
    seen: list[int] = []
    write(plan, out, workers=2, overwrite=True, progress=seen.append)
    assert out.read_bytes() == alone
    assert sum(seen) == sum(tensor.nbytes for tensor in plan.tensors)
    assert multiprocessing.active_children() == []


def test_without_affinity_and_signal_masks(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(signal, "pthread_sigmask", raising=False)
    assert processors() == (os.cpu_count() or 1)
    write(plan, out, workers=2)
    assert out.exists()


def test_mere_copies_take_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "processors", lambda: 6)
    copying = models.build(tmp_path, T.F16, layers=2)
    assert default_workers(copying) == 2
    assert default_workers(retype(copying, "Q4_K_M")) == 6


def test_memory_grows_with_workers_and_not_with_the_model(tmp_path: Path) -> None:
    small, large = (models.build(tmp_path, T.F16, layers=layers) for layers in (2, 8))
    assert peak_memory(small, 4) > 3 * peak_memory(small, 1)
    assert peak_memory(large, 2) - peak_memory(small, 2) == 2 * (len(large.header) - len(small.header))


def in_worker(act: Callable[[], None], slab: int = 5) -> Callable[..., int]:
    """A `Filler.do` that does something else in the other processes, from some slab on."""
    first, real = os.getpid(), Filler.do

    def do(self: Any, number: int) -> int:
        if os.getpid() != first and number >= slab:
            act()
        if os.getpid() == first:
            time.sleep(0.001)  # leaves work for the others on a machine with one processor
        return real(self, number)

    return do


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_memory() -> None:
    raise MemoryError


def no_space() -> None:
    raise OSError(28, "No space left on device")


@forked
@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (kill_self, GGUForgeError, "a worker process was killed.*fewer --workers"),
        (no_memory, MemoryError, "^$"),
        (no_space, OSError, r"No space left on device: '.*model\.gguf'"),
    ],
)
def test_a_worker_that_fails(
    act: Callable[[], None],
    error: type[Exception],
    message: str,
    plan: Plan,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Filler, "do", in_worker(act))
    with pytest.raises(error, match=message):
        write(plan, out, workers=3)
    assert nothing_left(out)


@forked
def test_a_worker_killed_while_it_holds_the_lock(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, real = os.getpid(), workers._next

    def take_and_die(counter: Any, while_waiting: Callable[[], None]) -> int:
        if os.getpid() != first:
            counter.get_lock().acquire()
            kill_self()
        return real(counter, while_waiting)

    monkeypatch.setattr(workers, "_next", take_and_die)
    monkeypatch.setattr(workers, "LOCK_PATIENCE", 0.02)
    monkeypatch.setattr(Filler, "do", in_worker(lambda: None))
    with pytest.raises(GGUForgeError, match="was killed"):
        write(plan, out, workers=3)
    assert nothing_left(out)


ORPHANS = """
import multiprocessing, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import models
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant import slabs as slabs_module
from gguforge.quant import workers, writer
from gguforge.quant.quantize import retype

first, real = os.getpid(), workers._next

def next_or_die(counter, while_waiting):
    if os.getpid() == first:
        counter.get_lock().acquire()  # the lock dies with this process
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(first, signal.SIGKILL)
    return real(counter, while_waiting)

workers._next, workers.LOCK_PATIENCE = next_or_die, 0.02
folder = Path({folder!r})
writer.write(retype(models.build(folder, T.F16), "Q8_0"), folder / "out" / "model.gguf", workers=3)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
def test_workers_do_not_outlive_a_killed_parent(plan: Plan, out: Path, tmp_path: Path) -> None:
    script = ORPHANS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        workers = [int(pid) for pid in child.stdout.readline().split()]
        assert child.wait(30) == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers run on"
        time.sleep(0.01)
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.gguf.part", "model.gguf.part.journal"]
    write(plan, out, workers=1)
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


@forked
def test_workers_end_when_the_next_cannot_start(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = multiprocessing.get_context("fork").Process
    real, started = kind.start, []

    def start(self: Any) -> None:
        if len(started) == 2:
            raise OSError(11, "Resource temporarily unavailable")
        real(self)
        started.append(self)

    monkeypatch.setattr(kind, "start", start)
    with pytest.raises(OSError, match="temporarily unavailable"):
        write(plan, out, workers=4)
    assert [process.is_alive() for process in started] == [False, False]
    assert nothing_left(out)


def test_an_error_of_ours_survives_the_way_between_processes() -> None:
    error = DataError("holds NaN", path="a/b", tensor="t", expected=1, found=2, remedy="Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert str(again) == str(error) == "a/b: tensor 't': holds NaN (expected 1, found 2). Mend it."


def test_the_written_file_is_read_back(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(plan, tensors=plan.tensors[1:])
    monkeypatch.setattr(writer, "write_at", lambda *_: None)  # the header never arrives
    with pytest.raises(GGUForgeError, match="not a GGUF file"):
        write(plan, out, workers=1)
    monkeypatch.undo()
    write(plan, out, workers=1)
    with pytest.raises(OutputError, match="not what was planned"):
        writer.verify(other, out)


def test_a_row_is_a_matrix_of_one_row(out: Path) -> None:
    """ggml drops dimensions of one at the end, so the file says (4,): that is no damage."""
    source = ArraySource(np.ones((1, 1, 4), np.float32))
    write(Plan({}, (TensorPlan("row", (1, 1, 4), T.F32, source),)), out, workers=1)
