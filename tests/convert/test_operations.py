"""Transforming sources against slow readable twins, and slab by slab against all at once."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.convert import operations
from gguforge.convert.operations import CastToFloat, PermuteHeads, SkipRows, Transpose
from gguforge.quant import sources
from gguforge.quant.sources import FileSource


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Element i of a head's first half goes to 2i, of its second half to 2i + 1."""
    d = len(rows) // heads
    result = rows.copy()
    for head in range(heads):
        for i in range(d // 2):
            result[head * d + 2 * i] = rows[head * d + i]
            result[head * d + 2 * i + 1] = rows[head * d + d // 2 + i]
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operations")


def stored(folder: Path, array: np.ndarray, kind: T = T.F32) -> FileSource:
    path = folder / "tensor"
    path.write_bytes(b"odd" + array.tobytes())
    return FileSource(str(path), 3, array.shape, kind)


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(1, 4), data=st.data())
def test_permutation_is_the_same_in_any_slab(
    heads: int, half: int, width: int, data: st.DataObject, folder: Path
) -> None:
    array = np.arange(heads * 2 * half * width, dtype="<f4").reshape(-1, width)
    source = PermuteHeads(stored(folder, array), heads)
    start = data.draw(st.integers(0, len(array) - 1))
    stop = data.draw(st.integers(start + 1, len(array)))
    expected = permuted(array, heads)
    assert np.array_equal(source.rows(start, stop), expected[start:stop])
    assert source.raw_rows(start, stop).tobytes() == expected[start:stop].tobytes()


@pytest.mark.parametrize(("kind", "dtype"), [(T.F32, "<f4"), (T.F16, "<f2")])
def test_a_bias_is_permuted_by_elements(folder: Path, kind: T, dtype: str) -> None:
    array = np.arange(24, dtype=dtype)
    source = PermuteHeads(stored(folder, array, kind), 3)
    assert np.array_equal(source.rows(0, 1)[0], permuted(array, 3))


def test_one_head_of_two_is_already_in_order(folder: Path) -> None:
    array = np.arange(8, dtype="<f4").reshape(2, 4)
    assert np.array_equal(PermuteHeads(stored(folder, array), 1).rows(0, 2), array)


def test_sources_cross_process_borders(folder: Path) -> None:
    source = PermuteHeads(stored(folder, np.arange(16, dtype="<f4").reshape(8, 2)), 2)
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert np.array_equal(again.rows(2, 5), source.rows(2, 5))
    assert source.extent is None, "permuted rows must never be copied by the kernel"


@pytest.mark.parametrize("dtype", ["<f8", "<i8", "<i4", "<i2", "i1", "u1"])
def test_other_numbers_are_read_as_float32(folder: Path, dtype: str) -> None:
    array = (np.arange(12).reshape(4, 3) * 1.25).astype(dtype)
    path = folder / "cast"
    path.write_bytes(b"#" + array.tobytes())
    source = CastToFloat(str(path), 1, array.shape, dtype)
    assert np.array_equal(source.rows(1, 3), array[1:3].astype(np.float32))
    assert np.array_equal(PermuteHeads(source, 2).rows(0, 4), permuted(array.astype(np.float32), 2))


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 9), rows=st.integers(1, 9), window=st.integers(1, 100), data=st.data(),
    dtype=st.sampled_from(["<f4", "<f2", "<f8"]),
)  # fmt: skip
def test_a_transposed_matrix_is_the_same_in_any_slab_and_window(
    columns: int, rows: int, window: int, dtype: str, data: st.DataObject, folder: Path
) -> None:
    array = np.arange(columns * rows).reshape(columns, rows).astype(dtype)
    base: FileSource | CastToFloat = stored(folder, array, T.F16 if dtype == "<f2" else T.F32)
    if dtype == "<f8":
        base = CastToFloat(str(folder / "tensor"), 3, array.shape, dtype)
    source = Transpose(base)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "WINDOW", window)
        assert np.array_equal(source.rows(start, stop), array.T[start:stop].astype(np.float32))


def test_gathering_columns_maps_little_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Transpose(stored(folder, np.arange(512 * 300, dtype="<f4").reshape(512, 300)))
    sizes: list[int] = []
    real = sources.map_window

    def counted(path: str, offset: int, nbytes: int) -> sources.Bytes:
        sizes.append(nbytes)
        return real(path, offset, nbytes)

    monkeypatch.setattr(sources, "map_window", counted)
    monkeypatch.setattr(operations, "WINDOW", 10_000)
    assert source.rows(7, 11).shape == (4, 512)
    assert max(sizes) <= 10_000
    assert sum(sizes) == 512 * 300 * 4
    assert source.extent is None


def test_the_first_rows_are_skipped(folder: Path) -> None:
    array = np.arange(20, dtype="<f4").reshape(5, 4)
    source = SkipRows(stored(folder, array), 2)
    assert source.shape == (3, 4)
    assert np.array_equal(source.rows(1, 3), array[3:])
    assert source.extent is None
