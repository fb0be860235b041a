"""The journal beside a part file: whose it is, and how far it has come.

`NAME.part.journal` is text. The first line names the work by a fingerprint; every further one says that the bytes up to
a position are final and on the disk, with a hash by which that can be checked:

    gguforge journal 1 6b86b273ff34fce1...
    73400320 d4735e3a265e16ee...

Lines are only ever appended, each after its data was synced. A journal also marks its part file as ours: a part file
without one is somebody's property.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguforge.quant.errors import OutputError

MAGIC = b"gguforge journal 1"
LARGEST = 1 << 26  # bytes; days of work
_RECORD = re.compile(rb"(\d{1,19}) ([0-9a-f]{64})")


@dataclass(frozen=True)
class Record:
    """The bytes up to `position` are final, and `digest` is their hash."""

    position: int
    digest: str


class Journal:
    """The journal of a part file.

    Attributes:
        path: where it lies.
    """

    def __init__(self, part: Path) -> None:
        self.path = part.with_name(part.name + ".journal")

    def exists(self) -> bool:
        """Whether there is one, of whatever work.

        Raises:
            OutputError: there is a file of this name that we have not written.
        """
        data = self._read()
        if data is not None and data.strip(b"\0") and not data.startswith(MAGIC):  # a power cut may leave zeros
            raise OutputError(
                "this is no journal of ours",
                path=self.path,
                remedy="Move it away, or write to another name.",
            )
        return data is not None

    def records(self, fingerprint: str) -> list[Record]:
        """What the journal says of the work of that fingerprint, in order; a line that was cut ends it."""
        head, *lines = (self._read() or b"").split(b"\n")
        if not fingerprint or head != _first_line(fingerprint):
            return []
        found = []
        for line in lines[:-1]:
            match = _RECORD.fullmatch(line)
            if match is None:
                break
            found.append(Record(int(match[1]), match[2].decode()))
        return found

    def is_of_another(self, fingerprint: str) -> bool:
        """Whether it holds records of some other work."""
        head, _, rest = (self._read() or b"").partition(b"\n")
        return bool(rest) and head != _first_line(fingerprint)

    def begin(self, fingerprint: str, records: Sequence[Record] = ()) -> None:
        """Start anew, with these records."""
        self._write(os.O_TRUNC, _first_line(fingerprint) + b"\n" + b"".join(map(_line, records)))

    def append(self, record: Record) -> None:
        """Add a record and sync it; its data must have been synced before."""
        self._write(os.O_APPEND, _line(record))

    def _read(self) -> bytes | None:
        try:
            with self.path.open("rb") as file:
                return file.read(LARGEST)
        except FileNotFoundError:
            return None

    def _write(self, flag: int, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | flag | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o666)
        try:
            os.write(descriptor, data)
            if flag == os.O_APPEND:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(fingerprint: str) -> bytes:
    return MAGIC + b" " + fingerprint.encode()


def _line(record: Record) -> bytes:
    return f"{record.position} {record.digest}\n".encode()
