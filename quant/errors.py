"""Every error that gguforge raises on purpose.

    GGUForgeError            one clear line for the user, exit code 1
    ├── InputError           a file or folder that was given is missing, damaged or not understood
    │   ├── GGUFError        ... and it is a GGUF file
    │   └── CheckpointError  ... and it is a Hugging Face checkpoint (config, weights or tokenizer)
    ├── DataError            the numbers inside a tensor cannot be encoded (NaN, infinity)
    ├── OutputError          the result cannot be written (exists, no space, no permission)
    ├── MissingExtraError    an optional package is needed and not installed
    └── EngineError          llama.cpp refused a model, a context or a batch

It lives on the ground floor so that every stage can raise it without leaning upwards.
"""

from __future__ import annotations

import os


class GGUForgeError(Exception):
    """What went wrong, where, what was expected and found, and what to do: one line.

    Args:
        what: the fault in a few words.
        path: the file it is in.
        tensor: the tensor it is in.
        expected, found: the two sides of a comparison that failed.
        remedy: what the user can do about it, as a full sentence.

    Example:
        >>> print(InputError("file is cut short", path="m.gguf", expected="64 bytes", found="12 bytes"))
        m.gguf: file is cut short (expected 64 bytes, found 12 bytes)
    """

    def __init__(
        self,
        what: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        line = self.what
        if self.tensor is not None:
            line = f"tensor {self.tensor!r}: {line}"
        if self.path is not None:
            line = f"{self.path}: {line}"
        sides = [
            f"{word} {side}" for word, side in (("expected", self.expected), ("found", self.found)) if side is not None
        ]
        if sides:
            line += f" ({', '.join(sides)})"
        if self.remedy is not None:
            line += f". {self.remedy}"
        return printable(line)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep every field when the error crosses from a worker process."""
        return _rebuild, (
            type(self),
            self.what,
            self.path,
            self.tensor,
            self.expected,
            self.found,
            self.remedy,
        )


class InputError(GGUForgeError):
    """A file or folder that was given is missing, damaged or not understood."""


class GGUFError(InputError):
    """A GGUF file breaks the format's rules."""


class CheckpointError(InputError):
    """A Hugging Face checkpoint is incomplete, damaged or not understood."""


class DataError(GGUForgeError):
    """The numbers inside a tensor cannot be encoded."""


class OutputError(GGUForgeError):
    """The result cannot be written."""


class MissingExtraError(GGUForgeError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}", remedy=f"Install it with: pip install 'gguforge[{extra}]'"
        )
        self._arguments = (package, extra)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._arguments


class EngineError(GGUForgeError):
    """llama.cpp refused a model, a context or a batch."""


def _rebuild(kind: type[GGUForgeError], what: str, path: str, tensor: str, *rest: object) -> GGUForgeError:
    expected, found, remedy = rest
    return kind(what, path=path, tensor=tensor, expected=expected, found=found, remedy=remedy)  # type: ignore[arg-type]


def printable(text: str) -> str:
    r"""One line whatever a hostile file put into a name: control characters are shown, never sent to the terminal.

    >>> print(printable("\x1b[2J naïve"))
    \x1b[2J naïve
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
