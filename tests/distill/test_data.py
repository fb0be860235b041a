"""Text into shards by bytes, and into documents whose mask says what counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.distill.data import PASSAGE_BYTES, documents, read_corpus
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "a user"},
    {"role": "user", "content": "in"},
    {"role": "assistant", "content": "us"},
]


@pytest.fixture(scope="module")
def tokenizer(teacher: Path) -> Iterator[Tokenizer]:
    with Tokenizer.open(teacher) as opened:
        yield opened


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["é", "日本", "\n", "word ", "x" * 40_000, "🙂" * 20_000]), min_size=1, max_size=12),
    st.integers(1, 300_000),
)
def test_no_byte_is_lost_or_twice_in_a_shard(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    paths = [folder / "a.txt", folder / "b.txt"]
    for path in paths:
        path.write_text("".join(pieces), encoding="utf-8")
    corpus = read_corpus(paths, 512, shard_bytes)
    passages = [passage for shard in corpus.shards for passage in shard]
    assert all(corpus.shards)
    assert b"".join(passage.read() for passage in passages) == paths[0].read_bytes() * 2
    assert sum(corpus.sizes) == sum(record.bytes for record in corpus.records)
    for passage in passages:
        assert passage.stop - passage.start <= PASSAGE_BYTES
        passage.read().decode("utf-8")  # no character is cut
    if len(passages) > 1:
        begins = np.cumsum([0, *corpus.sizes])[:-1]
        assert (np.diff(begins // shard_bytes) > 0).all()


def test_plain_text_is_cut_into_full_documents(tokenizer: Tokenizer, text: Path) -> None:
    corpus = read_corpus([text], 64, 1 << 18)
    ((passage,),) = corpus.shards
    made = list(documents(passage, tokenizer, 64))
    assert [len(ids) for ids, _ in made[:-1]] == [64] * (len(made) - 1)
    assert {int(ids[0]) for ids, _ in made} == {tokenizer.bos}
    joined = np.concatenate([ids[1:] for ids, _ in made])
    np.testing.assert_array_equal(joined, tokenizer.plain(text.read_text())[1:])
    for _, mask in made:
        assert not mask[0]
        assert mask[1:].all()


def test_a_conversation_is_one_document_and_the_answers_count(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"messages": TALK}, TALK, {"text": "hello user"}, {"messages": TALK[:1]})
    corpus = read_corpus([path], 64, 1)
    assert corpus.conversations
    assert len(corpus.shards) == 4
    first, second, third, fourth = ([*documents(*shard, tokenizer, 64)] for shard in corpus.shards)
    names = tokenizer.names()
    for ((ids, mask),) in (first, second):
        assert [names[token] for token in ids[mask]] == ["a", "▁", "user", "<|im_end|>", "us", "<|im_end|>"]
    assert third[0][1].tolist() == [False, *[True] * (len(third[0][0]) - 1)]
    assert fourth == []  # nobody answers


def test_a_conversation_that_is_too_long_is_cut_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", TALK)
    ((passage,),) = read_corpus([path], 64, 1).shards
    ((ids, mask),) = documents(passage, tokenizer, 64)
    last = int(np.flatnonzero(mask)[0])
    ((short, short_mask),) = documents(passage, tokenizer, last + 1)
    np.testing.assert_array_equal(short, ids[: last + 1])
    assert short_mask.sum() == 1
    assert list(documents(passage, tokenizer, last)) == []


@pytest.mark.parametrize("line", ['{"text": 1}', "[]", "{", '{"messages": [{"role": "user"}]}', "3"])
def test_lines_that_are_neither_text_nor_talk_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=r"line 3 is neither"):
        read_corpus([path], 64, 1 << 18)


def test_no_text_is_refused(tmp_path: Path) -> None:
    empty, blank = tmp_path / "e.txt", tmp_path / "b.jsonl"
    empty.touch()
    blank.write_text("\n \n")
    with pytest.raises(InputError, match="the file is empty"):
        read_corpus([empty], 64, 1)
    with pytest.raises(InputError, match="there is no text"):
        read_corpus([blank], 64, 1)


def test_bytes_that_are_no_text_do_no_harm(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\x80" * (PASSAGE_BYTES + 5) + b"\xffhello")
    corpus = read_corpus([path], 64, 1 << 18)
    assert sum(corpus.sizes) == path.stat().st_size
    assert "hello" in tokenizer.text(tokenizer.plain("\ufffdhello").tolist())
