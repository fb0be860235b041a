"""The attacks on the GGUF reader, a numbered line each: id, verdict, bytes, and whether the file must be accepted.

1-34 are the cases of llama.cpp's tests/test-gguf.cpp, made again here; 35 and on come from published vulnerabilities
of llama.cpp, Ollama and gguf-py, and from the corners of the format. `ggml` says what libggml answers where it differs
from ours on purpose; the verdict says why.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    FLOAT32,
    I8,
    INT8,
    INT32,
    Q4_0,
    Q4_K,
    STRING,
    UINT8,
    UINT32,
    array,
    gguf,
    pair,
    tensor,
    text,
    u32,
    u64,
)


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        name: number and name.
        verdict: what must happen and why.
        data: the file.
        ok: whether the reader accepts it.
        ggml: whether libggml does, reading metadata alone; None where it agrees.
    """

    name: str
    verdict: str
    data: bytes
    ok: bool = False
    ggml: bool | None = None


MINUS_ONE = 2**64 - 1
ALIGN = "general.alignment"
FIVE = pair("five", UINT32, u32(5))
TWO = (tensor("a", (8,), F32, 0), tensor("b", (4, 2), F32, 32))  # 64 bytes of data
ODD = (tensor("a", (3,), F32, 0), tensor("b", (5,), F32, 12))  # packed: sound only with alignment 4 or less


def align(value: int) -> bytes:
    return pair(ALIGN, UINT32, u32(value))


TEST_GGUF = (
    Case("1 bad magic", "refused: not GGUF", gguf(magic=b"FUGG")),
    Case("2 version 0", "refused: no such version", gguf(version=0)),
    Case("3 version 1", "refused: its lengths had 32 bits", gguf(version=1)),
    Case("4 version of the future", "refused: its layout is not known", gguf(version=4)),
    Case("5 tensor count -1", "refused: more than the file can hold", gguf(n_tensors=MINUS_ONE)),
    Case("6 metadata count -1", "refused: more than the file can hold", gguf(n_pairs=MINUS_ONE)),
    Case("7 empty", "accepted: a file may hold nothing", gguf(), ok=True),
    Case("8 key length -1", "refused: longer than the file", gguf([pair("k", UINT8, b"\1", MINUS_ONE)])),
    Case("9 empty key", "refused: nothing could look it up", gguf([pair("", UINT8, b"\1")])),
    Case("10 unknown value type", "refused: its length is not known", gguf([pair("k", 13, u32(1))])),
    Case("11 key twice", "refused: readers would disagree on the value", gguf([FIVE, FIVE])),
    Case("12 alignment 13", "refused: no power of two", gguf([align(13)])),
    Case("13 alignment of another type", "refused: must be UINT32", gguf([pair(ALIGN, INT32, u32(32))])),
    Case("14 sound metadata", "accepted", gguf([FIVE, pair("s", STRING, text("x")), array("a", INT8, 2, b"ab")]), True),
    Case("15 name of 64 bytes", "refused: ggml has room for 63", gguf([], [tensor("n" * 64)], 32)),
    Case("16 five dimensions", "refused: ggml has four", gguf([], [tensor("a", (1, 1, 1, 1, 8))], 32)),
    Case("17 dimension -1", "refused: no int64", gguf([], [tensor("a", (MINUS_ONE,))], 32)),
    Case("18 dimension 0", "accepted: a tensor without elements", gguf([], [tensor("a", (8, 0))]), ok=True),
    Case("19 too many elements", "refused: the product wraps int64", gguf([], [tensor("a", (2**32, 2**31))], 32)),
    Case("20 too many bytes", "refused: elements fit int64, bytes do not", gguf([], [tensor("a", (2**62,))], 32)),
    Case(
        "21 bytes wrap when padded",
        "refused: the size is 2^64 - 4, which rounds up to 0",
        gguf([], [tensor("a", (4, 2**30 - 1, 2**30 + 1))], 32),
    ),
    Case("22 unknown tensor type", "refused: its size is not known", gguf([], [tensor("a", (8,), 4096)], 32)),
    Case("23 offset -1", "refused: not where the data begins", gguf([], [tensor("a", (8,), F32, MINUS_ONE)], 32)),
    Case("24 name twice", "refused", gguf([], [tensor("a"), tensor("a", (8,), F32, 32)], 64)),
    Case("25 alignment 13 with tensors", "refused", gguf([align(13)], TWO, 64)),
    Case("26 offsets of another alignment", "refused: packed, where 32 is declared", gguf([align(32)], ODD, 64)),
    Case("27 sound tensors", "accepted", gguf([FIVE], TWO, 64), ok=True),
    Case("28 alignment 1", "accepted: packed and declared so", gguf([align(1)], ODD, 32, align=1), ok=True),
    Case(
        "29 data missing",
        "refused, although libggml says yes: it looks at the data only when it loads them",
        gguf([], TWO, 63),
        ggml=True,
    ),
    Case("30 alignment 13 with data", "refused", gguf([align(13), FIVE], ODD, 128)),
    Case(
        "31 data of another alignment",
        "refused: padded, where 1 is declared",
        gguf([align(1)], [tensor("a", (3,)), tensor("b", (5,), F32, 32)], 64, align=1),
    ),
    Case(
        "32 sizes whose sum wraps",
        "refused: twice 2^63 - 64 bytes",
        gguf([], [tensor("a", (2**63 - 64,), I8), tensor("b", (2**63 - 64,), I8, 2**63 - 64)], 64),
        ggml=True,  # nothing is allocated for the metadata alone
    ),
    Case("33 sound data", "accepted", gguf([FIVE], TWO, bytes(range(64))), ok=True),
    Case("34 data of alignment 4", "accepted: declared so", gguf([align(4)], ODD, bytes(range(32)), align=4), ok=True),
)

VULNERABILITIES = (
    Case("35 CVE-2024-21836", "refused: tensor count times record size wraps", gguf(n_tensors=2**61 + 1)),
    Case("36 CVE-2024-23605", "refused: metadata count times record size wraps", gguf(n_pairs=2**60 + 1)),
    Case("37 CVE-2024-25664", "refused: metadata count one too large", gguf([FIVE], n_pairs=2)),
    Case("38 CVE-2024-25666", "refused: tensor count one too large", gguf([], TWO, 32, n_tensors=3)),
    Case("39 CVE-2024-23496", "refused: length + 1 wraps", gguf([pair("s", STRING, text("x", MINUS_ONE))])),
    Case("40 CVE-2024-25665", "refused: a string one byte too long", gguf([pair("s", STRING, text("x", 2))])),
    Case("41 CVE-2024-21825", "refused: count times item size wraps", gguf([array("a", UINT32, 2**62 + 1, u32(1))])),
    Case("42 CVE-2024-25667", "refused: array one element too long", gguf([array("a", UINT32, 2, u32(1))])),
    Case("43 CVE-2024-25668", "refused: string array that claims 2^61", gguf([array("a", STRING, 2**61, text("x"))])),
    Case("44 CVE-2024-21802", "refused: 2^32 - 1 dimensions", gguf([], [tensor("a", (8,), n_dimensions=-1)], 32)),
    Case("45 CVE-2024-32878", "refused: file ends inside a value", gguf([pair("k", UINT32, b"")], n_pairs=1)),
    Case("46 CVE-2024-41130", "refused: file ends inside a name", gguf([], [tensor("a", length=99)])),
    Case(
        "47 CVE-2025-53630",
        "refused: the sum of sizes wraps",
        gguf(
            [],
            [
                tensor("a", (2**62 - 8,), F32),
                tensor("b", (8,), F32, 2**64 - 32),
                tensor("c", (8,), F32, 0),
            ],
            64,
        ),
    ),
    Case(
        "48 CVE-2026-27940",
        "refused: the sum just fits, with the overhead it wraps; libggml adds that only when it loads the data",
        gguf([], [tensor("a", (2**63 - 64,), I8), tensor("b", (2**63 - 2**10,), I8, 2**63 - 64)], 64),
        ggml=True,
    ),
    Case("49 CVE-2026-33298", "refused: 2^64 + 64 bytes", gguf([], [tensor("a", (2**62 + 16,), F32)], 64)),
    Case(
        "50 zero hides a product that wraps",
        "accepted, stored as nothing: no size is ever computed from a product that wraps here; libggml refuses",
        gguf([], [tensor("a", (2**62, 2**62, 0))]),
        ok=True,
        ggml=False,
    ),
    Case("51 zero in front", "accepted: INT64_MAX / 0 was a crash", gguf([], [tensor("a", (0, 2**62, 2**62))]), True),
    Case(
        "52 alignment 2^31",
        "refused, although libggml says yes: a header would be padded to 2 GiB",
        gguf([align(2**31)]),
        ggml=True,
    ),
    Case("53 alignment 0", "refused: division by zero in Ollama (CVE-2025-0317)", gguf([align(0)])),
    Case("54 alignment of 65536", "accepted: the largest that is", gguf([align(65536)]), ok=True),
    Case("55 alignment is an array", "refused: another type", gguf([array(ALIGN, UINT32, 1, u32(32))])),
    Case("56 CVE-2024-39720", "refused: the magic and nothing else", b"GGUF"),
    Case("57 nothing", "refused: no bytes at all", b""),
    Case(
        "58 CVE-2026-7482",
        "refused: the tensor ends behind the file (heap bytes went into the new model); libggml looks when it loads",
        gguf([], [tensor("a", (2**20,))], 32),
        ggml=True,
    ),
    Case("59 CVE-2026-7482 by offset", "refused: begins behind the file", gguf([], [tensor("a", (8,), F32, 4096)], 32)),
    Case(
        "60 gguf-py hangs",
        "refused at once: 51 bytes that claim 4 000 000 bytes",
        gguf([array("abcdef", UINT8, 4_000_000)])[:51].ljust(51, b"\0"),
    ),
    Case("61 offset into the header", "refused: -32 as uint64", gguf([], [tensor("a", (8,), F32, -32)], 32)),
    Case("62 array of arrays", "refused: no reader knows a depth", gguf([array("a", ARRAY, 1, u32(UINT8) + u64(1))])),
    Case(
        "63 arrays in arrays, deep",
        "refused before it can recurse",
        gguf([pair("a", ARRAY, (u32(ARRAY) + u64(1)) * 60)]),
    ),
    Case("64 overlap", "refused: b inside a", gguf([], [tensor("a"), tensor("b", (8,), F32, 0)], 64)),
    Case("65 hole", "refused: bytes that no tensor owns", gguf([], [tensor("a"), tensor("b", (8,), F32, 64)], 96)),
    Case("66 unaligned offset", "refused", gguf([], [tensor("a", (1,)), tensor("b", (8,), F32, 4)], 64)),
    Case("67 order of tensors", "refused: b in front of a", gguf([], TWO[::-1], 64)),
    Case("68 half a block", "refused: 48 elements of blocks of 32", gguf([], [tensor("a", (48,), Q4_0)], 64)),
    Case(
        "69 blocks across rows",
        "refused: 4 rows of 64 are 256 elements, but no row holds a block",
        gguf([], [tensor("a", (64, 4), Q4_K)], 160),
    ),
    Case("70 removed tensor type", "refused: type 4 (Q4_2) is no more", gguf([], [tensor("a", (32,), 4)], 32)),
    Case("71 tensor type -1", "refused", gguf([], [tensor("a", (8,), -1)], 32)),
    Case("72 value type -1", "refused", gguf([pair("k", -1, u64(0))])),
    Case("73 element type -1", "refused", gguf([array("k", -1, 1, u64(0))])),
    Case("74 big-endian", "refused, and named", gguf(version=3 << 24)),
    Case("75 version 2", "accepted: the same layout", gguf([FIVE], TWO, 64, version=2), ok=True),
    Case("76 name not UTF-8", "accepted: kept byte for byte", gguf([], [tensor(b"\xff\xfe")], 32), ok=True),
    Case("77 key not UTF-8", "accepted: kept byte for byte", gguf([pair(b"\x80", UINT8, b"\1")]), ok=True),
    Case("78 string not UTF-8", "accepted", gguf([pair("s", STRING, text(b"\xed\xa0\x80"))]), ok=True),
    Case("79 name of 63 bytes", "accepted: the longest", gguf([], [tensor("n" * 63)], 32), ok=True),
    Case("80 64 bytes in 32 letters", "refused: bytes count", gguf([], [tensor("ä" * 32)], 32)),
    Case("81 no dimensions", "accepted: a scalar", gguf([], [tensor("a", ())], 4), ok=True),
    Case("82 no padding at the end", "accepted: every tensor is whole", gguf([], [tensor("a", (1,))], 4), ok=True),
    Case("83 no data section", "refused: cut before it", gguf([], [tensor("a", (0,))])[:-1]),
    Case("84 a bool of 2", "accepted as true, like libggml", gguf([pair("b", BOOL, b"\2")]), ok=True),
    Case("85 NaN", "accepted: metadata may hold it", gguf([pair("f", FLOAT32, u32(0x7FC00000))]), ok=True),
    Case("86 empty array", "accepted", gguf([array("a", STRING, 0)]), ok=True),
    Case("87 empty name", "accepted, like libggml: the runtime looks for names", gguf([], [tensor("")], 32), ok=True),
    Case("88 escape codes", "accepted: shown escaped", gguf([pair("\x1b[2J", STRING, text("\x07"))]), ok=True),
    Case("89 bytes behind the data", "accepted: they belong to nobody", gguf([], TWO, 999), ok=True),
    Case("90 zip, as torch.save writes", "refused: not GGUF", b"PK\3\4" + bytes(60)),
    Case("91 safetensors", "refused: not GGUF", u64(2) + b"{}"),
    Case(
        "92 type of token scores",
        "accepted: u8 where f32 belongs is the runtime's to refuse",
        gguf([array("tokenizer.ggml.scores", UINT8, 4, b"abcd")]),
        ok=True,
    ),
    Case(
        "93 block count 2^32 - 1",
        "accepted: the runtime's to refuse",
        gguf([pair("llama.block_count", UINT32, u32(-1))]),
        ok=True,
    ),
)

WHOLE = gguf(
    [pair("general.name", STRING, text("tiny")), array("a", STRING, 2, text("x") + text("yz")), FIVE],
    [tensor("a", (8,)), tensor("b", (32, 2), Q4_0, 32)],
    68,
)
CUTS = tuple(
    Case(f"cut {n}", "refused: cut short", WHOLE[:n], ggml=n >= len(WHOLE) - 68) for n in range(len(WHOLE) - 1)
)
"""A sound file cut at every byte; libggml does not look at the data section when it reads the metadata alone."""

CASES = (*TEST_GGUF, *VULNERABILITIES)
