"""The header parser: files that must be read, attacks that must be refused, and whatever Hypothesis thinks of."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.convert.safetensors import MAX_HEADER_BYTES, read_safetensors
from gguforge.quant.errors import CheckpointError


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header: str | bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def file(data: bytes = b"\0" * 8, **tensors: Any) -> bytes:
    return raw(json.dumps(tensors), data)


SOUND = {
    "one tensor": file(a=entry()),
    "two tensors": file(bytes(12), a=entry(), b=entry("F32", (1,), (8, 12))),
    "in another order": file(bytes(12), b=entry("F32", (1,), (8, 12)), a=entry()),
    "scalar": file(bytes(4), a=entry("F32", (), (0, 4))),
    "empty tensor": file(b"", a=entry("F32", (0, 5), (0, 0))),
    "no tensors": raw("{}", b""),
    "metadata": file(a=entry(), __metadata__={"format": "pt"}),
    "trailing spaces": raw(json.dumps({"a": entry()}) + "   "),
    "four-bit": file(bytes(1), a=entry("F4", (2,), (0, 1))),
    "unicode name": file(größe=entry()),
}

ATTACKS = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header cut": raw(json.dumps({"a": entry()}))[:20],
    "length beyond the file": raw("{}", b"", length=1000),
    "length wraps": raw("{}", b"", length=2**64 - 1),
    "length zero": raw("", b"\0" * 8, length=0),
    "not JSON": raw("{]"),
    "array": raw("[]"),
    "leading space": raw(" {}", b""),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "lone surrogate in a name": raw('{"\\ud800": ' + json.dumps(entry()) + "}"),
    "deep nesting": raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "name twice": raw(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'),
    "field twice": raw('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    "metadata twice": raw('{"__metadata__": {}, "__metadata__": {}}', b""),
    "metadata of numbers": raw('{"__metadata__": {"a": 1}}', b""),
    "metadata no table": raw('{"__metadata__": "x"}', b""),
    "entry is a list": file(a=[]),
    "field missing": raw('{"a": {"dtype": "F32", "shape": [2]}}'),
    "field unknown": file(a=entry() | {"more": 1}),
    "dtype unknown": file(a=entry("F33")),
    "dtype a number": file(a=entry(4)),  # type: ignore[arg-type]
    "dtype lower case": file(a=entry("f32")),
    "shape negative": file(a=entry("F32", (-2,), (0, 8))),
    "shape twice negative": file(a=entry("F32", (-1, -2), (0, 8))),
    "shape a float": file(a=entry("F32", (2.0,), (0, 8))),
    "shape true": file(bytes(4), a=entry("F32", (True,), (0, 4))),
    "shape a string": file(a=entry() | {"shape": "2"}),
    "shape NaN": raw('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'),
    "shape huge": file(a=entry("F32", (2**62, 4), (0, 8))),
    "shape of 2^64": file(a=entry("F32", (2**64,), (0, 8))),
    "a thousand dimensions": file(a=entry("F32", (2**62,) * 1000, (0, 8))),
    "5000 digits": raw('{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % ("9" * 5000)),
    "three offsets": file(a=entry("F32", (2,), (0, 8, 8))),
    "offsets negative": file(a=entry("F32", (2,), (-8, 0))),
    "offsets reversed": file(a=entry("F32", (2,), (8, 0))),
    "offsets a float": file(a=entry("F32", (2,), (0, 8.0))),
    "offsets true": file(bytes(1), a=entry("U8", (1,), (False, True))),
    "offsets beyond the file": file(a=entry("F32", (4,), (0, 16))),
    "size disagrees": file(a=entry("F32", (3,), (0, 8))),
    "half a byte": file(bytes(1), a=entry("F4", (1,), (0, 1))),
    "hole at the start": file(bytes(16), a=entry("F32", (2,), (8, 16))),
    "hole between": file(bytes(24), a=entry(), b=entry("F32", (2,), (16, 24))),
    "overlap": file(bytes(12), a=entry(), b=entry("F32", (2,), (4, 12))),
    "the same bytes twice": file(a=entry(), b=entry()),
    "file cut": file(bytes(7), a=entry()),
    "bytes after the end": file(bytes(9), a=entry()),
    "name empty": file(**{"": entry()}),
    "name with a line break": file(**{"a\nb": entry()}),
    "name with an escape": file(**{"\x1b[2J": entry()}),
    "name too long": file(**{"n" * 600: entry()}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(SOUND[name])
    tensors = read_safetensors(path)
    assert list(tensors) == sorted(tensors)
    for tensor in tensors.values():
        assert tensor.offset + tensor.nbytes <= len(SOUND[name])


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(ATTACKS[name])
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert time.process_time() - start < 1
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_header_of_the_largest_allowed_length_is_not_read_before_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as out:  # sparse: the file is as long as the header claims
        out.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        out.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="header is too long"):
        read_safetensors(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = file(bytes(12), a=entry(), b=entry("F32", (1,), (8, 12)))
    path = tmp_path / "m.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_safetensors(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_safetensors(path)


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors({"x": ("F32", (2, 3), bytes(24)), "b": ("F16", (4,), bytes(range(8)))}))
    tensors = read_safetensors(path)
    assert list(tensors) == ["b", "x"]
    assert (tensors["b"].dtype, tensors["b"].shape, tensors["b"].nbytes) == ("F16", (4,), 8)
    data = path.read_bytes()
    assert data[tensors["b"].offset :][: tensors["b"].nbytes] == bytes(range(8))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
almost_entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "X"]), "shape": st.lists(st.integers(-1, 5), max_size=3),
     "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3)}
)  # fmt: skip
headers = st.dictionaries(st.text(max_size=6), almost_entries | json_values, max_size=4)


@settings(max_examples=300, deadline=None)
@given(header=headers, data=st.binary(max_size=48), shift=st.sampled_from([0, 0, 0, 1, -1]))
def test_any_header_is_read_or_refused(header: dict[str, Any], data: bytes, shift: int, tmp_path_factory: Any) -> None:
    text = json.dumps(header).encode()
    read_or_refuse(struct.pack("<Q", max(0, len(text) + shift)) + text + data, tmp_path_factory)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 200), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_is_read_or_refused(position: int, byte: int, cut: bool, tmp_path_factory: Any) -> None:
    whole = bytearray(file(bytes(12), a=entry(), b=entry("F32", (1,), (8, 12))))
    position %= len(whole)
    whole[position] = byte
    read_or_refuse(bytes(whole[:position] if cut else whole), tmp_path_factory)


def read_or_refuse(data: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    try:
        tensors = read_safetensors(path)
    except CheckpointError:
        return
    position = 8 + int.from_bytes(data[:8], "little")
    assert position + sum(tensor.nbytes for tensor in tensors.values()) == len(data)


def test_refusing_needs_neither_torch_nor_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no such header")
    code = (
        "import sys\nfrom pathlib import Path\nfrom gguforge.convert.safetensors import read_safetensors\n"
        f"try:\n    read_safetensors(Path({str(path)!r}))\nexcept Exception as error:\n"
        "    print(type(error).__name__, *sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["CheckpointError"]
