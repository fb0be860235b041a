"""Block types whose weights are evenly spaced: step * level - minimum, both shared by a group of neighbours.

What they have in common is said once here: the values of a block, from its scales and its levels. It also opens them
up to whoever wants to move the levels and leave the scales alone (`gguforge.distill.grid`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Block, Blocks, Bytes, Floats


class GroupedBlock(Block, abstract=True):
    """A block whose weights are d * scale * (code - zero) - dmin * minimum.

    Attributes:
        group: weights that share a scale; the whole block if nothing else is said.
        low, high: the levels, code - zero.
        zero: the stored code of level 0; that of the lowest level is 0 if nothing else is said.
        offset: the field that the minimums are multiples of; "" where there are none.
    """

    group: ClassVar[int]
    low: ClassVar[int]
    high: ClassVar[int]
    zero: ClassVar[int]
    offset: ClassVar[str]

    def __init_subclass__(
        cls,
        *,
        levels: tuple[int, int] = (0, 0),
        group: int = 0,
        zero: int | None = None,
        offset: str = "",
        **rest: Any,
    ) -> None:
        super().__init_subclass__(**rest)
        (cls.low, cls.high), cls.offset = levels, offset
        cls.group = group or rest.get("size", 0)
        cls.zero = -cls.low if zero is None else zero

    @classmethod
    def scales(cls, b: Blocks) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """The integers that `d` and the offset are multiplied with in each group, shape (n, groups) or (n, 1)."""
        ones = np.ones((len(b), 1), np.float32)
        return ones, ones if cls.offset else None

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        """The stored codes of `b` (n blocks), shape (n, size)."""
        raise NotImplementedError

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        """The inverse of `codes`: fills in the levels of `out` and nothing else."""
        raise NotImplementedError

    @classmethod
    def steps(cls, b: Blocks) -> tuple[Floats, Floats | None]:
        """The distance of two levels and the minimum of each group, shape (n, groups)."""
        scale, minimum = cls.scales(b)
        step = b["d"].astype(np.float32)[:, None] * scale
        return step, None if minimum is None else b[cls.offset].astype(np.float32)[:, None] * minimum

    @classmethod
    def levels(cls, b: Blocks) -> NDArray[np.int8]:
        """The levels of `b` (n blocks), shape (n, size), from `low` to `high`."""
        codes = cls.codes(b).view(np.int8)
        return codes - np.int8(cls.zero) if cls.zero else codes

    @classmethod
    def put_levels(cls, levels: NDArray[np.int8], out: Blocks) -> None:
        """The inverse of `levels`: fills in the levels of `out`, shape (n, size), and leaves its scales."""
        cls.put_codes((levels + np.int8(cls.zero)).view(np.uint8), out)

    @classmethod
    def decode_blocks(cls, b: Blocks) -> Any:
        step, minimum = cls.steps(b)
        values = step[..., None] * cls.levels(b).reshape(len(b), -1, cls.group)
        if minimum is not None:
            values -= minimum[..., None]
        return values.reshape(-1, cls.size)
