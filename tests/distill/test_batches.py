"""Documents from text, and batches of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import LLAMA, Case, build
from target_sets import manifest, write_targets

from gguforge.distill.batches import make_batch, read_documents, untaught
from gguforge.distill.targets import open_targets
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Case(LLAMA), tmp_path_factory.mktemp("batches"))


def test_text_becomes_documents_and_a_limit_takes_them_evenly(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("she sells sea shells on the shore. " * 40)
    with Tokenizer.open(tokenizer) as opened:
        everything = read_documents([tmp_path / "text.txt"], opened, 16)
        few = read_documents([tmp_path / "text.txt"], opened, 16, limit=3)
    assert len(everything) > 10
    assert all(len(document.input_ids) <= 16 for document in everything)
    assert [len(few), *few[0].input_ids] == [3, *everything[0].input_ids]
    assert list(few[-1].input_ids) == list(everything[-1].input_ids)


def test_text_without_a_document_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": ""}\n')
    with Tokenizer.open(tokenizer) as opened, pytest.raises(InputError, match="gives no document"):
        read_documents([tmp_path / "text.jsonl"], opened, 16)


def test_places_and_tokens_follow_the_shift(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    one = untaught(np.array([1, 7, 8, 9], np.int32), np.array([False, True, False, True]))
    other = untaught(np.array([1, 5], np.int32), np.array([False, True]))
    batch = make_batch([one, other])
    assert batch.input_ids.tolist() == [[1, 7, 8, 9], [1, 5, 0, 0]]
    assert batch.attention.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.places.tolist() == [0, 2, 4]
    assert batch.tokens.tolist() == [7, 9, 5]
    assert batch.entries is None


@pytest.mark.parametrize("kind", ["sampled", "top-k", "full"])
def test_entries_of_a_batch_are_those_of_its_documents(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    write_targets(tmp_path / "targets", manifest(kind, 0 if kind == "full" else 50))
    documents = open_targets(tmp_path / "targets")[:2]
    batch = make_batch(documents)
    assert batch.entries is not None
    first = 0
    for document in documents:
        for row in range(len(document.positions)):
            mine = batch.entries.row == first
            part = slice(*document.row_ptr[row : row + 2])
            assert batch.entries.ids[mine].tolist() == document.ids[part].tolist()
            assert batch.entries.weights[mine].tolist() == document.weights[part].tolist()
            first += 1
    assert first == len(batch.places)
    assert (batch.entries.tail is not None) == (kind == "top-k")
    if kind == "sampled":
        sums = torch.zeros(first).index_add(0, batch.entries.row, batch.entries.weights)
        assert torch.allclose(sums, torch.ones(first))
