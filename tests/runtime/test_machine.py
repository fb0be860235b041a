"""Cores and memory under affinity, quotas and limits, on made-up /proc and /sys trees; and whether a model fits."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
from tiny_model import DIMENSION, LAYERS, write_tiny_model

from gguforge.quant.errors import EngineError, GGUFError
from gguforge.quant.metadata import Value, string, uint32
from gguforge.quant.reader import read_gguf
from gguforge.runtime import machine
from gguforge.runtime.fit import choose_context, kv_bytes_per_token, needs

GB = 1 << 30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 4 cores with 2 threads each, 8 GB available."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for cpu in range(8):
        put(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    put(tmp_path, "proc/meminfo", f"MemTotal: 16777216 kB\nMemAvailable: {8 * GB // 1024} kB\n")
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_machine() -> None:
    assert 1 <= machine.physical_cores() <= (os.cpu_count() or 1)
    memory = machine.available_memory()
    assert memory is None or memory > 1 << 20


def test_hyper_threads_are_not_cores(root: Path) -> None:
    assert machine.physical_cores(root) == 4


def test_affinity(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 1}, raising=False)
    assert machine.physical_cores(root) == 2


def test_without_topology_or_affinity(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.physical_cores(root / "nothing") == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.physical_cores(root / "nothing") == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),
        ({"sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000"}, 3),
        ({"sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000"}, 4),
        ({"sys/fs/cgroup/cpu.max": "rubbish"}, 4),
    ],
)
def test_cpu_quotas(root: Path, files: dict[str, str], cores: int) -> None:
    put(root, "proc/self/cgroup", "0::/a/b\n3:cpu,cpuacct:/a/b\n")
    for name, text in files.items():
        put(root, name, text)
    assert machine.physical_cores(root) == cores


def test_memory_limits(root: Path) -> None:
    assert machine.available_memory(root) == 8 * GB
    put(root, "proc/self/cgroup", "0::/a\n")
    put(root, "sys/fs/cgroup/a/memory.max", "max\n")
    put(root, "sys/fs/cgroup/a/memory.current", "5\n")
    assert machine.available_memory(root) == 8 * GB
    put(root, "sys/fs/cgroup/memory.max", str(3 * GB))
    put(root, "sys/fs/cgroup/memory.current", str(2 * GB))
    put(root, "sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {GB // 2}\n")
    assert machine.available_memory(root) == 3 * GB // 2


def test_nobody_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert machine.available_memory(tmp_path) is None


def test_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    numbers = {"hw.memsize": 16 * GB, "hw.physicalcpu": 10, "hw.perflevel0.physicalcpu": 8}
    monkeypatch.setattr(machine, "_sysctl", numbers.get)
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: set(range(10)))
    assert machine.available_memory() == 12 * GB
    assert machine.physical_cores(Path("/nonexistent")) == 8
    del numbers["hw.perflevel0.physicalcpu"]
    assert machine.physical_cores(Path("/nonexistent")) == 10


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(status: object) -> int:
            status._obj.available = 5 * GB  # type: ignore[attr-defined]
            return 1

        @staticmethod
        def GetLogicalProcessorInformation(records: object, size: object) -> int:
            if records is None:
                size._obj.value = 3 * ctypes.sizeof(machine._Processor)  # type: ignore[attr-defined]
                return 0
            records[1].relationship = 3  # type: ignore[index]  # a cache
            return 1

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", type("windll", (), {"kernel32": Kernel}), raising=False)
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: set(range(8)))
    assert machine.available_memory() == 5 * GB
    assert machine.physical_cores(Path("/nonexistent")) == 2


def architecture(**numbers: int) -> dict[str, Value]:
    keys = {f"llama.{name.replace('__', '.')}": uint32(value) for name, value in numbers.items()}
    return {"general.architecture": string("llama"), **keys}


def test_kv_bytes() -> None:
    grouped = architecture(block_count=16, embedding_length=2048, attention__head_count=32, attention__head_count_kv=8)
    assert kv_bytes_per_token(grouped) == 16 * 8 * (64 + 64) * 2
    plain = architecture(block_count=2, embedding_length=64, attention__head_count=4)
    assert kv_bytes_per_token(plain) == 2 * 64 * 2 * 2
    wide = architecture(
        block_count=1, embedding_length=64, attention__head_count=4, attention__key_length=32, attention__value_length=8
    )
    assert kv_bytes_per_token(wide) == 4 * 40 * 2
    assert kv_bytes_per_token({}) == 0


def test_context(tmp_path: Path) -> None:
    small = read_gguf(write_tiny_model(tmp_path / "small.gguf", context=2048))
    large = read_gguf(write_tiny_model(tmp_path / "large.gguf", context=131072))
    per_token = LAYERS * 2 * (DIMENSION // 4) * 2 * 2
    assert kv_bytes_per_token(small.metadata) == per_token
    assert choose_context(small, None, None) == choose_context(small, None, GB) == 2048
    assert choose_context(large, None, GB) == 8192
    assert choose_context(large, 100_000, GB) == 100_000
    tight = needs(large).total(0) + 4000 * per_token
    assert choose_context(large, None, tight) == 3840  # in steps of 256
    with pytest.raises(EngineError, match=r"not enough memory .*largest context that fits is 3840"):
        choose_context(large, 4096, tight)
    with pytest.raises(EngineError, match=r"not enough memory .*Q4_K_M"):
        choose_context(large, None, needs(large).total(0))


def test_nonsense_in_the_metadata_is_one_error(tmp_path: Path) -> None:
    file = read_gguf(write_tiny_model(tmp_path / "m.gguf"))
    file.metadata["llama.context_length"] = string("long")
    with pytest.raises(GGUFError, match="context_length"):
        choose_context(file, None, None)
