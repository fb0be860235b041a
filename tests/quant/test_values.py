"""Metadata values as bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from plans import values

from gguforge.quant.constants import GGUFValueType
from gguforge.quant.metadata import STRUCT_CODES, Value, array, boolean, float32, int32, pack_string, string, uint32


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (uint32(1), "04000000 01000000"),
        (int32(-1), "05000000 ffffffff"),
        (float32(0.5), "06000000 0000003f"),
        (boolean(True), "07000000 01"),
        (string("é"), "08000000 0200000000000000 c3a9"),
        (string("\udcff"), "08000000 0100000000000000 ff"),
        (array(GGUFValueType.INT8, [1, -1]), "09000000 01000000 0200000000000000 01ff"),
        (
            array(GGUFValueType.STRING, ["a", ""]),
            "09000000 08000000 0200000000000000 010000000000000061 00000000 00000000",
        ),
        (array(GGUFValueType.FLOAT64, []), "09000000 0c000000 0000000000000000"),
        (Value(GGUFValueType.UINT64, 2**64 - 1), "0a000000 ffffffffffffffff"),
    ],
)
def test_bytes(value: Value, data: str) -> None:
    assert value.pack() == bytes.fromhex(data)


def test_every_fixed_type_has_its_size() -> None:
    sizes = {kind.name: struct.calcsize("<" + code) for kind, code in STRUCT_CODES.items()}
    assert sizes == {
        "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "UINT32": 4, "INT32": 4, "FLOAT32": 4, "BOOL": 1,
        "UINT64": 8, "INT64": 8, "FLOAT64": 8,
    }  # fmt: skip
    assert set(GGUFValueType) - set(STRUCT_CODES) == {GGUFValueType.STRING, GGUFValueType.ARRAY}


@settings(deadline=None)
@given(value=values())
def test_the_type_comes_first(value: Value) -> None:
    data = value.pack()
    assert struct.unpack_from("<I", data)[0] == value.kind
    if value.item is not None:
        assert isinstance(value.value, list)
        assert struct.unpack_from("<IQ", data, 4) == (value.item, len(value.value))


def test_a_number_that_does_not_fit_is_never_wrapped() -> None:
    with pytest.raises(struct.error):
        uint32(2**32).pack()
    with pytest.raises(struct.error):
        uint32(-1).pack()


def test_raw_bytes_survive() -> None:
    raw = bytes(range(256))
    assert pack_string(raw.decode("utf-8", "surrogateescape"))[8:] == raw
