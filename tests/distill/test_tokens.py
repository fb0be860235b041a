"""One tokenizer from a GGUF file, from a checkpoint, and from its folder without the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gguforge.convert.conversion import convert
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError

DEMO = Path(__file__).parents[2] / "distill" / "demo_model"
TALK = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "A token, as text."}]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    convert(DEMO, folder / "demo.gguf", type="Q8_0", warn=lambda line: None)
    (folder / "bare").mkdir()
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / "bare" / path.name)
    return [DEMO, folder / "demo.gguf", folder / "bare"]


def test_the_same_tokens_from_everywhere(places: list[Path]) -> None:
    found = []
    for place in places:
        with Tokenizer.open(place) as tokenizer:
            ids, said = tokenizer.conversation(TALK)
            assert tokenizer.text(ids[said].tolist()) == "A token, as text."
            plain = tokenizer.plain("Who are <s> you?").tolist()
            assert tokenizer.text(plain).strip() == "Who are <s> you?"
            found.append((tokenizer.identity, tokenizer.names(), ids.tolist(), said.tolist(), plain))
    assert found[0] == found[1] == found[2]
    assert found[0][0].tokens == len(found[0][1])


def test_padding_at_the_end_is_no_part_of_a_tokenizer(places: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(places[2], copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"vocab_size": 2048', '"vocab_size": 2112'))
    with Tokenizer.open(copy) as padded, Tokenizer.open(places[2]) as known:
        assert (padded.size, known.size) == (2112, 2048)
        assert padded.identity == known.identity


def test_what_has_no_tokenizer_is_refused(places: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        Tokenizer.open(tmp_path)
    shutil.copy(places[2] / "config.json", tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError):
        Tokenizer.open(tmp_path / "x.gguf")
