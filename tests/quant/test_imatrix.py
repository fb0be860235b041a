"""Importance matrices: both formats against the bytes that llama-imatrix writes, merging, coverage, damaged files."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gguforge.quant.errors import DataError, GGUFError, GGUForgeError, InputError, OutputError
from gguforge.quant.imatrix import Entry, ImportanceMatrix, merge, overlap_metadata, read_imatrix, write_imatrix
from gguforge.quant.reader import read_gguf


def entry(sums: list[list[float]], counts: list[int]) -> Entry:
    return Entry(np.array(sums, np.float32), np.array(counts, np.int64))


DENSE = entry([[8.0, 2.0, 0.0, 1.5]], [4])
EXPERTS = entry([[6.0, 3.0], [0.0, 0.0], [5.0, 1.0]], [3, 0, 2])


@pytest.fixture
def matrix() -> ImportanceMatrix:
    entries = {"blk.1.ffn_up_exps.weight": EXPERTS, "blk.0.attn_q.weight": DENSE}
    return ImportanceMatrix(entries, ("texts/wiki.txt",), 3, 4)


def legacy(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    """A .dat file byte by byte, as save_imatrix_legacy writes it."""
    data = struct.pack("<i", len(entries))
    for name, chunks, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", chunks, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


def test_weights_are_means_and_one_for_experts_never_used(matrix: ImportanceMatrix) -> None:
    assert matrix.weights("blk.0.attn_q.weight").tolist() == [[2.0, 0.5, 0.0, 0.375]]
    assert matrix.weights("blk.1.ffn_up_exps.weight").tolist() == [[2.0, 1.0], [1.0, 1.0], [2.5, 0.5]]
    assert matrix.weights("blk.0.attn_q.weight").dtype == np.float32
    assert matrix.weights("blk.7.attn_q.weight") is None


def test_coverage(matrix: ImportanceMatrix) -> None:
    dense, experts = matrix.coverage()
    assert (dense.name, dense.experts, dense.unused, dense.least) == ("blk.0.attn_q.weight", 1, (), 4)
    assert (experts.experts, experts.unused, experts.least, experts.most) == (3, (1,), 0, 3)


def test_gguf_bytes_are_those_of_gguf_py(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    """Keys and tensors in llama-imatrix's order, names sorted by bytes, sums before counts."""
    write_imatrix(matrix, tmp_path / "ours.gguf")
    writer = GGUFWriter(tmp_path / "theirs.gguf", "unused")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["texts/wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 4)
    for name in sorted(matrix.entries):
        found = matrix.entries[name]
        flat = (lambda x: x) if len(found.counts) > 1 else (lambda x: x[0])
        writer.add_tensor(f"{name}.in_sum2", flat(found.sums))
        writer.add_tensor(f"{name}.counts", flat(found.counts.astype(np.float32)[:, None]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_gguf_round_trip(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    hashes = ("ab" * 32,)
    full = ImportanceMatrix(matrix.entries, matrix.datasets, 3, 4, hashes, frozenset({2**64 - 1, 5}), "model")
    write_imatrix(full, tmp_path / "i.gguf")
    found = read_imatrix(tmp_path / "i.gguf")
    for name, was in matrix.entries.items():
        assert np.array_equal(found.entries[name].sums, was.sums)
        assert np.array_equal(found.entries[name].counts, was.counts)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("texts/wiki.txt",), 3, 4)
    assert (found.text_hashes, found.fingerprint, found.model) == (hashes, full.fingerprint, "model")
    assert list(overlap_metadata(full, "quantize.imatrix.")) == [
        "quantize.imatrix.text_sha256",
        "quantize.imatrix.fingerprint",
    ]


def test_legacy_bytes(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    """Means times ceil(tokens / chunk size), and 1 for experts never used, as llama-imatrix."""
    write_imatrix(matrix, tmp_path / "i.dat")
    wanted = legacy(
        (b"blk.0.attn_q.weight", 1, [2.0, 0.5, 0.0, 0.375]),
        (b"blk.1.ffn_up_exps.weight", 1, [2.0, 1.0, 1.0, 1.0, 2.5, 0.5]),
        tail=struct.pack("<ii", 3, 14) + b"texts/wiki.txt",
    )
    assert (tmp_path / "i.dat").read_bytes() == wanted


def test_legacy_reading(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy((b"a.weight", 3, [3.0, 4.5]), tail=struct.pack("<ii", 9, 1) + b"t"))
    found = read_imatrix(path)
    assert found.weights("a.weight").tolist() == [[1.0, 1.5]]
    assert (found.entries["a.weight"].counts.tolist(), found.chunk_count, found.datasets) == ([3 * 512], 9, ("t",))
    path.write_bytes(legacy((b"a.weight", 3, [3.0, 4.5])))  # as written before there was a tail
    assert (read_imatrix(path).chunk_count, read_imatrix(path).datasets) == (3, ())


def test_merging_adds(matrix: ImportanceMatrix) -> None:
    other = ImportanceMatrix({"blk.0.attn_q.weight": DENSE}, ("b",), 1, 4, ("h",), frozenset({7}))
    both = merge([matrix, other])
    assert both.entries["blk.0.attn_q.weight"].sums.tolist() == [[16.0, 4.0, 0.0, 3.0]]
    assert both.entries["blk.0.attn_q.weight"].counts.tolist() == [8]
    for field in ("sums", "counts"):
        assert getattr(both.entries["blk.1.ffn_up_exps.weight"], field) is getattr(EXPERTS, field)
    assert (both.datasets, both.chunk_count, both.fingerprint) == (("texts/wiki.txt", "b"), 2, {7})
    assert DENSE.sums[0, 0] == 8.0, "the inputs stay as they were"


def test_a_single_count_stands_for_all_experts() -> None:
    old = ImportanceMatrix({"x": entry([[1, 1, 1, 1, 1, 1]], [2])})
    both = merge([old, ImportanceMatrix({"x": EXPERTS})])
    assert both.entries["x"].counts.tolist() == [5, 2, 4]
    assert both.entries["x"].sums.tolist() == [[7, 4], [1, 1], [6, 2]]


def test_merging_refuses_another_model(matrix: ImportanceMatrix) -> None:
    other = ImportanceMatrix({"blk.0.attn_q.weight": entry([[1, 2]], [1])})
    with pytest.raises(InputError, match=r"^b: tensor 'blk\.0\.attn_q\.weight': is of another model .*2 values"):
        merge([matrix, other], ["a", "b"])
    experts = ImportanceMatrix({"blk.1.ffn_up_exps.weight": entry([[1, 2, 3], [4, 5, 6]], [1, 1])})
    with pytest.raises(InputError, match="2 experts instead of 3"):
        merge([matrix, experts])


def test_files_are_not_overwritten(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    for name in ("i.gguf", "i.dat"):
        write_imatrix(matrix, tmp_path / name)
        with pytest.raises(OutputError, match="file exists"):
            write_imatrix(matrix, tmp_path / name)
        write_imatrix(matrix, tmp_path / name, overwrite=True)


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN"):
        write_imatrix(ImportanceMatrix({"x": entry([[np.nan]], [1])}), tmp_path / "i.gguf")
    assert list(tmp_path.iterdir()) == []


def gguf_file(path: Path, tensors: dict[str, np.ndarray], **keys: object) -> Path:
    writer = GGUFWriter(path, "unused")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    for key, value in ({"datasets": ["t"], "chunk_count": 1, "chunk_size": 512} | keys).items():
        add = {list: writer.add_array, int: writer.add_uint32, str: writer.add_string}.get(type(value))
        if add:
            add(f"imatrix.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SUMS, ONE = np.ones(4, np.float32), np.ones(1, np.float32)
GOOD = {"x.in_sum2": SUMS, "x.counts": ONE}


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ({"x.in_sum2": SUMS}, {}, r"tensor 'x': is incomplete \(expected the tensor x\.counts\)"),
        ({"x.counts": ONE}, {}, r"expected the tensor x\.in_sum2"),
        ({"x.weight": SUMS}, {}, "is not an importance matrix"),
        ({"x.in_sum2": SUMS, "x.counts": np.ones(3, np.float32)}, {}, "do not fit each other"),
        ({"x.in_sum2": SUMS.astype(np.float16), "x.counts": ONE}, {}, "expected F32, found F16"),
        ({"x.in_sum2": -SUMS, "x.counts": ONE}, {}, "negative numbers"),
        ({"x.in_sum2": SUMS * np.nan, "x.counts": ONE}, {}, "NaN"),
        ({"x.in_sum2": SUMS, "x.counts": ONE * np.inf}, {}, "infinity"),
        (GOOD, {"chunk_size": 0}, r"imatrix\.chunk_size is missing or wrong .*found 0"),
        (GOOD, {"chunk_count": None}, r"imatrix\.chunk_count is missing or wrong"),
        (GOOD, {"datasets": "t"}, r"imatrix\.datasets is missing or wrong"),
    ],
)
def test_unsound_gguf(tensors: dict[str, np.ndarray], keys: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_imatrix(gguf_file(tmp_path / "i.gguf", tensors, **keys))
    assert "\n" not in str(caught.value)


def test_a_sound_gguf_of_another_writer(tmp_path: Path) -> None:
    assert read_imatrix(gguf_file(tmp_path / "i.gguf", GOOD)).weights("x").tolist() == [[1.0] * 4]


def test_every_truncated_gguf_is_refused(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    write_imatrix(matrix, tmp_path / "i.gguf")
    data = (tmp_path / "i.gguf").read_bytes()
    end = read_gguf(tmp_path / "i.gguf").tensors[-1]
    for size in range(0, end.offset + end.nbytes, 7):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(InputError):
            read_imatrix(tmp_path / "cut")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it ends inside the number of entries"),
        (struct.pack("<i", 0), "the number of entries is 0"),
        (struct.pack("<i", -1), "the number of entries is -1"),
        (struct.pack("<i", 2**31 - 1), "it ends inside the name length of entry 0"),
        (struct.pack("<ii", 1, -5), "the name length of entry 0 is -5"),
        (struct.pack("<ii", 1, 2**31 - 1), "it ends inside the name of entry 0"),
        (legacy((b"\xff", 1, [1.0])), "the name of entry 0 is no text"),
        (legacy((b"a", 0, [1.0])), "the chunk count of entry 0 is 0"),
        (legacy((b"a", 1, [])), "the size of entry 0 is 0"),
        (legacy((b"a", 1, [1.0]), (b"a", 1, [1.0])), "tensor 'a' appears twice"),
        (legacy((b"a", 1, [np.nan])), "NaN"),
        (legacy((b"a", 1, [1.0]), tail=struct.pack("<iii", 1, 0, 0)), "bytes follow its end"),
        (legacy((b"a", 1, [1.0]), tail=struct.pack("<ii", 1, 9)), "it ends inside the dataset's name"),
        (b"\x89PNG\r\n\x1a\n", "it ends inside"),
    ],
)
def test_unsound_legacy_files(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_imatrix(tmp_path / "i.dat")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a good file of each format."""
    folder = tmp_path_factory.mktemp("sound")
    full = ImportanceMatrix({"a": DENSE, "b": EXPERTS}, ("t",), 1, 4, ("h",), frozenset({1}))
    for suffix in (".gguf", ".dat"):
        write_imatrix(full, folder / f"i{suffix}")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), suffix=st.sampled_from([".gguf", ".dat"]))
@example(position=452, byte=0, suffix=".gguf")  # a tensor of no rows
def test_a_flipped_byte_never_crashes(
    sound: dict[str, bytes], tmp_path: Path, position: int, byte: int, suffix: str
) -> None:
    data = bytearray(sound[suffix])
    data[position % len(data)] = byte
    (tmp_path / "x").write_bytes(data)
    try:
        found = read_imatrix(tmp_path / "x")
    except GGUForgeError:
        return
    assert all(np.isfinite(one.sums).all() for one in found.entries.values())


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"is not an importance matrix.*gguforge calibrate"):
        read_imatrix(tmp_path / "m.gguf")


def test_the_rest_of_sums_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    rest = np.array([[[1e-9, -2e-9]], [[-3e-17, 0]]], np.float32)
    entry = Entry(np.ones((1, 2), np.float32), np.array([4]), rest)
    write_imatrix(ImportanceMatrix({"a": entry}), tmp_path / "a.gguf")
    found = read_imatrix(tmp_path / "a.gguf")
    np.testing.assert_array_equal(found.entries["a"].rest, rest)
    assert merge([found]).entries["a"].rest is None
    write_imatrix(ImportanceMatrix({"a": replace(entry, rest=rest[:1])}), tmp_path / "b.gguf")
    with pytest.raises(GGUFError, match=r"in_sum2_rest.*is damaged.*expected 4, found 2"):
        read_imatrix(tmp_path / "b.gguf")
