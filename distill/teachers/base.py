"""What every teacher can do: say who it is, cut text into tokens, and give rows of targets for a document."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.sampling import Doubles, Reducer
from gguforge.distill.shards import Ids, Kind, Rows
from gguforge.distill.targets import TeacherRecord
from gguforge.distill.tokens import Tokenizer
from gguforge.runtime.loaded import Closing


class Teacher(Closing):
    """A teacher that was opened.

    Attributes:
        record: who it is; its weight is set by whoever mixes teachers.
        tokenizer: its own.
        vocabulary: scores that it gives one position.
        kinds: the targets that it can give.
        threads: that it computes on.
    """

    record: TeacherRecord
    tokenizer: Tokenizer
    vocabulary: int
    kinds: tuple[Kind, ...]
    threads: int = 1

    @abstractmethod
    def rows(self, input_ids: Ids, positions: NDArray[np.int64], reduce: Reducer, at: Doubles) -> Rows | None:
        """Distributions after the tokens at some positions of a document, of which there is at least one.

        Args:
            input_ids: shape (tokens,); read from an empty context.
            positions: shape (rows,), rising, none of them the last token's.
            reduce: what is kept of a distribution.
            at: random numbers for it, shape (rows, draws).

        Returns:
            A row for each position; None after `interrupt`.

        Raises:
            GGUForgeError: the teacher failed.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Stop at once, for good; safe in a signal handler."""
