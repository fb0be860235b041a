"""What encoders read, hide, embed and are measured by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import bert, roberta, sentences

from gguforge.distill.batches import untaught
from gguforge.distill.encoders.masking import SHARE, EncoderReading, encoder_batch, hidden
from gguforge.distill.encoders.measure import compared, ranks, spearman
from gguforge.distill.encoders.pooling import Pooling, pooled, read_pooling, write_pooling
from gguforge.distill.encoders.text import EncoderText, Words
from gguforge.distill.losses import embedding_relation
from gguforge.quant.errors import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = Words(mask=4, pad=0, size=60, ordinary=np.arange(5, 60))
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("encoders")
    return {make.__name__: make(home / make.__name__) for make in (bert, roberta, sentences)}


def ids_of(body: list[int]) -> Any:
    return np.array([CLS, *body, SEP], np.int32)


@given(st.lists(st.integers(5, 59), min_size=1, max_size=200), st.integers(0, 1 << 32))
def test_a_share_of_the_ordinary_tokens_is_hidden_and_special_ones_never(body: list[int], seed: int) -> None:
    ids = ids_of(body)
    made, places = hidden(ids, WORDS, np.random.default_rng(seed))
    assert len(places) == max(1, round(SHARE * len(body)))
    assert len(set(places.tolist())) == len(places)
    assert 0 not in places
    assert len(ids) - 1 not in places
    untouched = np.setdiff1d(np.arange(len(ids)), places)
    assert np.array_equal(made[untouched], ids[untouched])
    assert set(made[places].tolist()) <= {WORDS.mask, *WORDS.ordinary.tolist()}


def test_eight_of_ten_hidden_tokens_are_masked_and_one_stays() -> None:
    ids = ids_of([7] * 40_000)
    made, places = hidden(ids, WORDS, np.random.default_rng(0))
    assert (made[places] == WORDS.mask).mean() == pytest.approx(0.8, abs=0.02)
    assert (made[places] == 7).mean() == pytest.approx(0.1 + 0.1 / len(WORDS.ordinary), abs=0.02)


def test_batches_are_decided_by_seed_step_and_process() -> None:
    documents = [untaught(ids_of(list(range(5, 9 + i))), np.zeros(6 + i, bool)) for i in range(8)]

    def batch(**changes: Any) -> Any:
        reading = EncoderReading(documents, 4, **{"accumulate": 2, "seed": 1, "words": WORDS, **changes})
        return list(reading.made(3, "cpu"))[1]

    one, same = batch(), batch()
    assert torch.equal(one.input_ids, same.input_ids)
    assert torch.equal(one.places, same.places)
    assert not torch.equal(one.places, batch(seed=2).places)
    plain = batch(words=None)
    assert plain.size == 4
    flat = plain.input_ids.flatten()
    assert torch.equal(flat[one.places], one.tokens)
    assert one.size == len(one.tokens)
    assert (plain.input_ids[~plain.attention] == 0).all()


def test_padding_is_the_tokenizers_own() -> None:
    documents = [untaught(ids_of([9] * n), np.zeros(n + 2, bool)) for n in (1, 3)]
    made = encoder_batch(documents, pad=1)
    assert made.input_ids[0].tolist() == [CLS, 9, SEP, 1, 1]
    assert made.attention[0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(("name", "ends"), [("bert", ("[CLS]", "[SEP]")), ("roberta", ("<s>", "</s>"))])
def test_documents_are_what_transformers_makes_of_the_text(
    folders: dict[str, Path], tmp_path: Path, name: str, ends: tuple[str, str]
) -> None:
    path = tmp_path / "text.txt"
    lines = ["the quick brown fox", "", "she sells sea shells on the shore, and then the other thing"]
    path.write_text("\n".join(lines) + "\n")
    text, tokenizer = EncoderText(folders[name]), transformers.AutoTokenizer.from_pretrained(folders[name])
    made = text.documents([path], 64, lines=True)
    assert [one.input_ids.tolist() for one in made] == [tokenizer(line)["input_ids"] for line in lines if line]
    whole = [one.input_ids for one in text.documents([path], 12)]
    assert {len(ids) for ids in whole[:-1]} == {12}
    body = [token for ids in whole for token in ids[1:-1].tolist()]
    assert body == tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert {tuple(tokenizer.convert_ids_to_tokens([ids[0], ids[-1]])) for ids in whole} == {ends}


def test_text_that_spells_special_tokens_stays_text(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the [MASK] fox [SEP]"}\n')
    (document,) = EncoderText(folders["bert"]).documents([path], 64)
    words = EncoderText(folders["bert"]).words()
    assert words.mask not in document.input_ids
    assert (document.input_ids == document.input_ids[-1]).sum() == 1


def test_what_no_encoder_reads_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    chats, blank = tmp_path / "chats.jsonl", tmp_path / "blank.txt"
    chats.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    blank.write_text("\n")
    text = EncoderText(folders["bert"])
    with pytest.raises(InputError, match="conversations are nothing for an encoder"):
        text.documents([chats], 64)
    with pytest.raises(InputError, match="gives no document"):
        text.documents([blank], 64)
    with pytest.raises(InputError, match="tokenizer cannot be opened"):
        EncoderText(tmp_path)
    with pytest.raises(InputError, match="not its teacher's"):
        text.check_same(folders["roberta"])
    text.check_same(folders["sentences"])


def test_pooling_is_that_of_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    assert read_pooling(folders["bert"]) is Pooling.MEAN
    assert read_pooling(folders["sentences"]) is Pooling.CLS
    for kind in Pooling:
        folder = tmp_path / kind.name
        folder.mkdir()
        write_pooling(folder, kind, 16)
        assert read_pooling(folder) is kind
        assert json.loads((folder / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 16


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        ({}, {}, r"modules\.json: unexpected JSON"),
        ([{"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.Dense"}], {}, "more than a pooling"),
        ([{"type": "x.Pooling", "path": "1_Pooling"}], {"pooling_mode_max_tokens": True}, "no such pooling"),
        ([{"type": "x.Pooling", "path": "../elsewhere"}], {"pooling_mode": "mean"}, "outside the checkpoint folder"),
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, modules: Any, config: Any, message: str) -> None:
    for folder in (tmp_path / "model", tmp_path / "model" / "1_Pooling", tmp_path / "elsewhere"):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=message):
        read_pooling(tmp_path / "model")


def test_embeddings_leave_padding_out() -> None:
    states = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4) + 1
    attention = torch.tensor([[True, True, False], [True, True, True]])
    mean = pooled(states, attention, Pooling.MEAN)
    wanted = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
    assert torch.allclose(mean, wanted / wanted.norm(dim=1, keepdim=True))
    first = pooled(states, attention, Pooling.CLS)
    assert torch.allclose(first, states[:, 0] / states[:, 0].norm(dim=1, keepdim=True))


def test_relations_of_embeddings_do_not_see_how_they_are_turned_or_how_wide_they_are() -> None:
    torch.manual_seed(0)
    ours = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    assert float(embedding_relation(ours, ours @ turn[:8])) == pytest.approx(0, abs=1e-20)
    theirs = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    wanted = np.mean([float(ours[i] @ ours[j] - theirs[i] @ theirs[j]) ** 2 for i, j in pairs])
    assert float(embedding_relation(ours, theirs)) == pytest.approx(wanted)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.randoms())
def test_rank_correlation_is_pearsons_of_the_ranks(values: list[int], random: Any) -> None:
    ours = np.array(values, float)
    theirs = np.array(random.sample(values, len(values)), float)
    slow = [np.mean([0.5 * (v == w) + (v > w) for w in values]) for v in values]
    assert np.allclose((ranks(ours) - 0.5) / len(values), slow)
    found = spearman(ours, theirs)
    if len(set(values)) < 2:
        assert math.isnan(found)
    else:
        assert spearman(ours, ours**3) == 1.0
        assert spearman(ours, -ours) == -1.0
        assert found == pytest.approx(spearman(theirs, ours))


def test_embeddings_are_compared_with_the_teachers() -> None:
    ours = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert compared(ours, ours) == {"cosine": pytest.approx(1), "rank_correlation": 1.0}
    wider = np.array([[1.0, 0, 0], [0.9, math.sqrt(0.19), 0], [0, 0, 1.0]])
    found = compared(ours, wider)
    assert math.isnan(found["cosine"])
    assert found["rank_correlation"] == pytest.approx(-0.8660254, abs=1e-6)
