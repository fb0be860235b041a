"""The strict reader: what is written is read, as libggml and gguf-py read it; what is damaged is refused at once."""

from __future__ import annotations

import ctypes
import math
import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ggml
import models
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import Pattern, plans

from gguforge.quant.constants import GGML_QUANT_SIZES, GGUFValueType
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import GGUFError, InputError
from gguforge.quant.metadata import STRUCT_CODES, Value, array, float32, string, uint32
from gguforge.quant.plan import Plan, TensorPlan, dimensions_on_disk
from gguforge.quant.reader import GGUFFile, read_gguf
from gguforge.quant.writer import write

quick = settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def tensor_bytes(path: Path, plan: Plan, file: GGUFFile) -> bool:
    """Whether every tensor's bytes stand where the reader says."""
    data = path.read_bytes()
    return all(
        data[info.offset : info.offset + info.nbytes] == tensor.source.raw_rows(0, tensor.rows).tobytes()
        for info, tensor in zip(file.tensors, plan.tensors, strict=True)
        if tensor.elements
    )


class Parameters(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def functions() -> Any:
    """libggml with the signatures of its GGUF functions."""
    lib = ggml.library()
    p, n, u = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("init_from_file", p, [ctypes.c_char_p, Parameters]), ("free", None, [p]), ("get_n_kv", n, [p]),
        ("get_key", ctypes.c_char_p, [p, n]), ("get_kv_type", u, [p, n]), ("get_arr_type", u, [p, n]),
        ("get_arr_n", ctypes.c_size_t, [p, n]), ("get_arr_data", p, [p, n]), ("get_val_data", p, [p, n]),
        ("get_arr_str", ctypes.c_char_p, [p, n, ctypes.c_size_t]), ("get_val_str", ctypes.c_char_p, [p, n]),
        ("get_n_tensors", n, [p]), ("get_tensor_name", ctypes.c_char_p, [p, n]), ("get_tensor_type", u, [p, n]),
        ("get_tensor_offset", ctypes.c_size_t, [p, n]), ("get_data_offset", ctypes.c_size_t, [p]),
        ("get_tensor_size", ctypes.c_size_t, [p, n]), ("get_alignment", ctypes.c_size_t, [p]),
    ):  # fmt: skip
        function = getattr(lib, f"gguf_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


@contextmanager
def libggml_context(path: Path) -> Iterator[Any]:
    found = functions().gguf_init_from_file(os.fsencode(path), Parameters(True, None))
    assert found, f"libggml refuses {path}"
    try:
        yield found
    finally:
        functions().gguf_free(found)


def c_string(text: str) -> bytes:
    """What is left of a string in C: a zero byte ends it."""
    return text.encode("utf-8", "surrogateescape").split(b"\0")[0]


def libggml_value(context: Any, index: int) -> tuple[int, int | None, Any]:
    """Type, element type and value; numbers as the bytes that hold them."""
    lib = functions()
    kind, item = lib.gguf_get_kv_type(context, index), None
    if kind == GGUFValueType.STRING:
        return kind, item, lib.gguf_get_val_str(context, index)
    if kind != GGUFValueType.ARRAY:
        size = struct.calcsize("<" + STRUCT_CODES[GGUFValueType(kind)])
        return kind, item, ctypes.string_at(lib.gguf_get_val_data(context, index), size)
    item, count = lib.gguf_get_arr_type(context, index), lib.gguf_get_arr_n(context, index)
    if item == GGUFValueType.STRING:
        return kind, item, [lib.gguf_get_arr_str(context, index, i) for i in range(count)]
    size = struct.calcsize("<" + STRUCT_CODES[GGUFValueType(item)])
    return kind, item, ctypes.string_at(lib.gguf_get_arr_data(context, index), count * size) if count else b""


def our_value(value: Value) -> tuple[int, int | None, Any]:
    """The same of ours."""
    kind = value.item if value.item is not None else value.kind
    items = value.value if isinstance(value.value, list) else [value.value]
    if kind == GGUFValueType.STRING:
        found: Any = [c_string(str(item)) for item in items]
        return value.kind, value.item, found if value.item is not None else found[0]
    return value.kind, value.item, struct.pack(f"<{len(items)}{STRUCT_CODES[kind]}", *items)


@quick
@given(plan=plans())
def test_what_is_written_is_read(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "any.gguf"
    write(plan, path, workers=1, overwrite=True)
    file = read_gguf(path)
    assert file.metadata == plan.metadata
    assert list(file.metadata) == list(plan.metadata)
    assert file.alignment == plan.alignment
    assert file.data_offset == len(plan.header)
    assert file.size == plan.size == path.stat().st_size
    assert [(t.name, dimensions_on_disk(t.shape), t.type) for t in file.tensors] == [
        (t.name, dimensions_on_disk(t.shape), t.type) for t in plan.tensors
    ]
    assert tensor_bytes(path, plan, file)


@settings(quick, max_examples=60)
@given(plan=plans())
def test_libggml_reads_the_same(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "any.gguf"
    write(plan, path, workers=1, overwrite=True)
    file, lib = read_gguf(path), functions()
    with libggml_context(path) as context:
        assert lib.gguf_get_n_kv(context) == len(file.metadata)
        for index, (key, value) in enumerate(file.metadata.items()):
            assert lib.gguf_get_key(context, index) == c_string(key)
            assert libggml_value(context, index) == our_value(value)
        assert lib.gguf_get_alignment(context) == file.alignment
        assert lib.gguf_get_n_tensors(context) == len(file.tensors)
        for index, tensor in enumerate(file.tensors):
            assert lib.gguf_get_tensor_name(context, index) == c_string(tensor.name)
            assert lib.gguf_get_tensor_type(context, index) == tensor.type
            assert lib.gguf_get_data_offset(context) + lib.gguf_get_tensor_offset(context, index) == tensor.offset
            assert lib.gguf_get_tensor_size(context, index) == tensor.nbytes


def test_every_type_has_the_size_that_ggml_gives_it() -> None:
    lib = ggml.library()
    lib.ggml_blck_size.restype, lib.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    theirs = {kind.name: (lib.ggml_blck_size(int(kind)), lib.ggml_type_size(int(kind))) for kind in GGML_QUANT_SIZES}
    assert theirs == {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def test_gguf_py_reads_the_same(tmp_path: Path) -> None:
    from gguf import GGUFReader

    plan = models.build(tmp_path, T.F16, layers=1)
    write(plan, tmp_path / "m.gguf", workers=1)
    ours, theirs = read_gguf(tmp_path / "m.gguf"), GGUFReader(tmp_path / "m.gguf")
    assert {key: value.value for key, value in ours.metadata.items()} == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert [(t.name, t.shape[::-1], t.type, t.offset, t.nbytes) for t in ours.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file with a bit of everything, to be damaged."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    metadata = {
        "general.architecture": string("llama"),
        "general.alignment": uint32(32),
        "a": array(GGUFValueType.STRING, ["x", "yz", ""]),
        "b": array(GGUFValueType.FLOAT32, [1.0, -2.5]),
        "c": float32(math.pi),
        "d": Value(GGUFValueType.BOOL, True),
    }
    shapes = {"one": ((3,), T.F32), "two": ((2, 32), T.Q4_0), "three": ((2, 1, 4, 1), T.F16)}
    tensors = tuple(TensorPlan(name, shape, kind, Pattern(shape, kind)) for name, (shape, kind) in shapes.items())
    write(Plan(metadata, tensors), path, workers=1)
    return path.read_bytes()


BOUNDARIES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
positions = st.integers(0, 600)
mutations = st.one_of(
    st.tuples(st.just("replace"), positions, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("number"), positions, st.sampled_from([struct.pack("<Q", number) for number in BOUNDARIES])),
    st.tuples(st.just("number"), positions, st.sampled_from([struct.pack("<I", n) for n in BOUNDARIES if n < 2**32])),
    st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("remove"), positions, st.integers(1, 40).map(bytes)),
    st.tuples(st.just("cut"), positions, st.just(b"")),
    st.tuples(st.just("double"), positions, st.integers(1, 80).map(bytes)),
)


def mutated(data: bytes, mutation: tuple[str, int, bytes]) -> bytes:
    how, at, new = mutation
    head, span, tail = data[:at], data[at : at + len(new)], data[at + len(new) :]
    match how:
        case "insert":
            return head + new + span + tail
        case "remove":
            return head + tail
        case "cut":
            return head
        case "double":
            return head + span + span + tail
        case _:
            return head + new + tail


@settings(quick, max_examples=600)
@given(mutation=mutations)
def test_one_mutation_is_accepted_or_refused_in_our_words(
    mutation: tuple[str, int, bytes], small: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.gguf"
    path.write_bytes(mutated(small, mutation))
    start = time.perf_counter()
    try:
        file = read_gguf(path)
    except GGUFError as error:
        line = str(error)
    else:
        line = ""
        assert all(t.offset + t.nbytes <= file.size for t in file.tensors)
    assert line == "" or line.isprintable()
    assert time.perf_counter() - start < 1


def test_costs_are_those_of_an_honest_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    count = 2**32
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    path.write_bytes(head + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, count))
    os.truncate(path, 5 << 30)  # a file with holes: it takes no space, and the array is inside it
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match="too long"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_long_header_is_read_window_by_window(tmp_path: Path) -> None:
    tokens = array(GGUFValueType.STRING, [f"token number {i}" * 20 for i in range(20_000)])
    plan = Plan({"a": tokens, "b": uint32(1)}, (TensorPlan("t", (4,), T.F32, Pattern((4,), T.F32)),))
    write(plan, tmp_path / "long.gguf", workers=1)
    assert len(plan.header) > 4 << 20
    assert read_gguf(tmp_path / "long.gguf").metadata == plan.metadata


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="not a file"):
        read_gguf(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "absent.gguf")
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path(os.devnull)):  # a pipe would block, a device never end
            with pytest.raises(GGUFError, match="not a file"):
                read_gguf(path)


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    plan = models.build(tmp_path, T.F16, layers=1)
    write(plan, tmp_path / "m.gguf", workers=1)
    file = read_gguf(tmp_path / "m.gguf")
    last = file.tensors[-1]
    os.truncate(file.path, last.offset + 10)
    with pytest.raises(InputError, match="cut short"):
        file.source(last).raw_rows(0, 1)
