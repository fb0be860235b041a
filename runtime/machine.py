"""What this machine offers: physical cores and memory that may be used, container limits included.

Linux is read from /proc and /sys, macOS through sysctl, Windows through kernel32; each falls back to what the standard
library knows. It does not tell fast cores from slow ones on Linux and Windows.
Sources: kernel docs admin-guide/cgroup-v2.rst, ABI/stable/sysfs-devices-system-cpu; sysctl(3); Microsoft Learn.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def physical_cores(root: Path = Path("/")) -> int:
    """Cores to compute on: physical ones, within this process's affinity and its container's quota; at least 1."""
    allowed = _allowed_cpus()
    cores = _cores_of_platform(root, allowed) or len(allowed)
    quota = _cgroup_cpus(root)
    return max(1, cores if quota is None else min(cores, quota))


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, within the container's limit; None where nobody can tell."""
    if sys.platform == "win32":
        return _windows_memory()
    if sys.platform == "darwin":
        total = _sysctl("hw.memsize")
        return (
            None if total is None else total * 3 // 4
        )  # macOS publishes no estimate; it keeps about a quarter for itself
    limits = [limit for limit in (_meminfo_available(root), _cgroup_memory(root)) if limit is not None]
    return min(limits, default=None)


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cores_of_platform(root: Path, allowed: set[int]) -> int | None:
    if sys.platform == "win32":
        return _windows_cores()
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
    return _linux_cores(root, allowed)


def _linux_cores(root: Path, allowed: set[int]) -> int | None:
    """Sets of hyper-threads that share a core and have an allowed member; None when /sys does not say."""
    siblings = set()
    for cpu in allowed:
        text = _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if text is None:
            return None
        siblings.add(text.strip())
    return len(siblings) or None


def _meminfo_available(root: Path) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's control group and its ancestors, version 2 and then version 1, innermost first.

    Inside a container the path in /proc/self/cgroup may be the host's; folders that do not exist are harmless.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, names, path = ([*line.split(":", 2), "", ""])[:3]
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = PurePosixPath(path)
        for folder in (inner, *inner.parents):
            yield base / str(folder).lstrip("/")


def _cgroup_cpus(root: Path) -> int | None:
    """The smallest CPU quota, rounded up to whole CPUs; None when there is none."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        words = (_text(folder / "cpu.max") or "").split()
        if not words:
            words = [(_text(folder / f"cpu.cfs_{part}_us") or "").strip() for part in ("quota", "period")]
        if all(word.isdigit() for word in words) and len(words) == 2 and int(words[1]):
            quotas.append(-(-int(words[0]) // int(words[1])))
    return min(quotas, default=None)


def _cgroup_memory(root: Path) -> int | None:
    """The least room left under a memory limit; file pages that can be dropped at once count as room."""
    rooms = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                rooms.append(max(0, limit - usage + _inactive_file(folder)))
    return min(rooms, default=None)


def _inactive_file(folder: Path) -> int:
    for line in (_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _sysctl(name: str) -> int | None:
    """A number from macOS's sysctl, None when it has no such name."""
    library = ctypes.CDLL(None)
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    if library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)):
        return None
    return value.value


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )


def _windows_memory() -> int | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  (exists on Windows only)
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


class _Processor(ctypes.Structure):
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION."""

    _fields_ = (("mask", ctypes.c_size_t), ("relationship", ctypes.c_int), ("rest", ctypes.c_uint64 * 2))


def _windows_cores() -> int | None:
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  (exists on Windows only)
    size = ctypes.c_uint32(0)
    kernel.GetLogicalProcessorInformation(None, ctypes.byref(size))
    records = (_Processor * (size.value // ctypes.sizeof(_Processor)))()
    if not kernel.GetLogicalProcessorInformation(records, ctypes.byref(size)):
        return None
    return sum(record.relationship == 0 for record in records) or None  # 0: RelationProcessorCore
