"""The cache: never another byte, only what is needed is done again, and nobody else's files are touched."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest

from gguforge.quant import cache as cache_module
from gguforge.quant import slabs
from gguforge.quant.cache import Cache
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import OutputError
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import retype
from gguforge.quant.sources import Bytes
from gguforge.quant.writer import Written, write


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """14 + 2 tensors to encode, 5 to copy."""
    return retype(models.build(tmp_path, T.F16, layers=2), "Q4_0")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30)


def run(plan: Plan, path: Path, cache: Cache | None, workers: int = 1) -> tuple[bytes, Written]:
    written = write(plan, path, workers=workers, overwrite=True, cache=cache)
    return path.read_bytes(), written


def entries(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.glob("??/*"))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_second_run_encodes_nothing(
    workers: int, plan: Plan, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, without = run(plan, tmp_path / "whole", None)
    first, written = run(plan, tmp_path / "first", cache, workers)
    assert (written.encoded, written.cached) == (without.encoded, without.cached) == (16, 0)
    monkeypatch.setattr(slabs, "encoded", None)
    second, written = run(plan, tmp_path / "second", cache, workers)
    assert (written.encoded, written.cached) == (0, 16)
    assert first == second == whole


def test_only_what_a_rule_changes_is_done_again(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    run(plan, tmp_path / "first", cache)
    tensors = [replace(t, type=T.Q8_0) if "ffn_down" in t.name else t for t in plan.tensors]
    changed = replace(plan, tensors=tuple(tensors))
    data, written = run(changed, tmp_path / "second", cache)
    assert (written.encoded, written.cached) == (2, 14)
    assert data == run(changed, tmp_path / "whole", None)[0]


@pytest.mark.parametrize("what", ["importance", "source", "encoders"])
def test_all_that_bytes_depend_on_is_in_the_key(
    what: str, plan: Plan, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plan, tmp_path / "first", cache)
    if what == "importance":
        ramp = np.linspace(0, 9, 512, dtype=np.float32)
        tensors = [t if t.is_copy else replace(t, importance=ramp[None, : t.row_length]) for t in plan.tensors]
        plan = replace(plan, tensors=tuple(tensors))
    elif what == "source":
        (path,) = {path for tensor in plan.tensors for path in tensor.source.paths}
        data = np.fromfile(path, np.uint8)
        data[::2] ^= 1  # the lowest bit of every weight
        data.tofile(path)
    else:
        monkeypatch.setattr(cache_module, "encoders", lambda: "others")
    data, written = run(plan, tmp_path / "second", cache)
    assert written.cached == 0
    assert data == run(plan, tmp_path / "whole", None)[0]


def test_equal_rows_share_an_entry(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    one = next(tensor for tensor in plan.tensors if not tensor.is_copy)
    twins = replace(plan, tensors=(replace(one, name="blk.0.ffn_up.weight"), replace(one, name="blk.1.ffn_up.weight")))
    _, written = run(twins, tmp_path / "twins", cache)
    assert (written.encoded, written.cached) == (1, 1)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "folder"])
def test_a_damaged_entry_is_made_again(damage: str, plan: Plan, cache: Cache, tmp_path: Path) -> None:
    whole, _ = run(plan, tmp_path / "first", cache)
    sizes = {path: path.stat().st_size for path in entries(cache)}
    one, other, *_ = [path for path in sizes if sizes[path] == max(sizes.values())]
    data = one.read_bytes()
    if damage == "flip":
        one.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        one.write_bytes(data[:-1])
    elif damage == "empty":
        one.write_bytes(b"")
    elif damage == "swap":
        one.write_bytes(other.read_bytes())
    else:
        one.unlink()
        one.mkdir()
    data, written = run(plan, tmp_path / "second", cache)
    assert (data, written.encoded) == (whole, 1)
    if damage != "folder":
        assert run(plan, tmp_path / "third", cache)[1].encoded == 0


def test_the_limit_is_kept_and_what_was_used_last_stays(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    run(plan, tmp_path / "first", cache)
    found = entries(cache)
    (cache.folder / "notes.txt").write_text("precious")
    (found[0].parent / "precious").write_text("precious")
    for age, path in enumerate(found):
        os.utime(path, (1000 - age, 1000 - age))
    total = sum(path.stat().st_size for path in found)
    replace(cache, limit=total).trim()
    assert [path for path in found if path.exists()] == found
    replace(cache, limit=total // 2).trim()
    kept = [path for path in found if path.exists()]
    assert kept == found[: len(kept)]
    assert 0 < sum(path.stat().st_size for path in kept) <= total // 2
    assert (cache.folder / "notes.txt").exists()
    assert (found[0].parent / "precious").exists()


def test_a_run_keeps_within_a_small_limit(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    small = replace(cache, limit=300_000)
    whole, _ = run(plan, tmp_path / "first", small, workers=2)
    assert sum(path.stat().st_size for path in entries(small)) <= 300_000
    assert run(plan, tmp_path / "second", small)[0] == whole


def test_use_counts_as_last_use(plan: Plan, cache: Cache, tmp_path: Path) -> None:
    run(plan, tmp_path / "first", cache)
    for path in entries(cache):
        os.utime(path, (1000, 1000))
    run(plan, tmp_path / "second", cache)
    assert all(path.stat().st_mtime > 1000 for path in entries(cache))


def test_unfinished_entries_go_when_they_are_old(cache: Cache) -> None:
    folder = cache.folder / "ab"
    folder.mkdir(parents=True)
    for name, age in (("1-1.tmp", 1000), ("2-2.tmp", None)):
        (folder / name).touch()
        if age is not None:
            os.utime(folder / name, (age, age))
    cache.trim()
    assert [path.name for path in folder.iterdir()] == ["2-2.tmp"]


def test_a_cache_that_cannot_be_written_costs_time_only(
    plan: Plan, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    whole, _ = run(plan, tmp_path / "whole", None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert run(plan, tmp_path / "first", cache)[0] == whole
    assert entries(cache) == []


def test_a_file_is_no_cache(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="must be a folder"):
        run(plan, tmp_path / "out", Cache(tmp_path / "file", 1))
    assert not (tmp_path / "out").exists()


def test_what_is_fetched_is_what_was_stored(cache: Cache) -> None:
    cache.open()
    data: Bytes = np.arange(100, dtype=np.uint8).reshape(10, 10)
    key = "ab" * 32
    cache.store(key, data)
    cache.store(key, data)
    found = cache.fetch(key, 100)
    assert found is not None
    assert found.tobytes() == data.tobytes()
    assert cache.fetch(key, 99) is None
    assert cache.fetch("cd" * 32, 100) is None
    assert (cache.folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
