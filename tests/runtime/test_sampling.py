"""Settings: defaults, the file's own, the user's; and that the chain does what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from gguforge.quant.errors import GGUForgeError, InputError
from gguforge.quant.metadata import float32, int32, string, uint32
from gguforge.quant.reader import read_gguf
from gguforge.runtime.chat import ChatSession
from gguforge.runtime.engine import Engine, Stats
from gguforge.runtime.sampling import GREEDY, Sampling, unsupported_settings


def test_defaults_are_llama_cpps() -> None:
    s = Sampling.from_metadata({})
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repeat_penalty) == (0.8, 40, 0.95, 0.05, 1.0)


def test_the_file_overrules_and_the_user_overrules_the_file(tmp_path: Path) -> None:
    extra = {"general.sampling.temp": 0.25, "general.sampling.top_k": 7, "general.sampling.penalty_repeat": 1.5}
    path = write_tiny_model(tmp_path / "m.gguf", extra=extra)
    own = Sampling.from_metadata(read_gguf(path).metadata)
    assert (own.temperature, own.top_k, own.repeat_penalty, own.min_p) == (0.25, 7, 1.5, 0.05)
    changed = own.changed(top_k=3, min_p=0.0, temperature=None)
    assert (changed.temperature, changed.top_k, changed.min_p) == (0.25, 3, 0.0)
    with Engine.open(path) as engine, ChatSession(engine) as session:
        assert session.sampling.top_k == 7
        assert session.sampling.seed is not None


@pytest.mark.parametrize(
    "metadata",
    [
        {"general.sampling.temp": string("hot")},
        {"general.sampling.temp": float32(math.nan)},
        {"general.sampling.top_k": float32(math.inf)},
        {"general.sampling.top_p": float32(1.5)},
        {"general.sampling.penalty_last_n": int32(-7)},
    ],
)
def test_nonsense_in_the_file_is_one_error(metadata: dict[str, object]) -> None:
    with pytest.raises(GGUForgeError):
        Sampling.from_metadata(metadata)  # type: ignore[arg-type]


def test_llama_cpps_words_for_all() -> None:
    own = Sampling.from_metadata({"general.sampling.top_k": int32(-1), "general.sampling.penalty_last_n": int32(-1)})
    assert own.top_k == 0
    assert own.repeat_last_n >= 131072


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repeat_penalty", "xtc_probability"])
def test_values_out_of_range_are_refused(name: str) -> None:
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=name):
            Sampling(**{name: value})


def test_what_is_not_supported_is_named() -> None:
    metadata = {"general.sampling.mirostat": uint32(2), "general.sampling.sequence": string("kt")}
    assert unsupported_settings(metadata) == ["general.sampling.sequence", "general.sampling.mirostat"]
    assert unsupported_settings({"general.sampling.mirostat": uint32(0)}) == []


def generate(engine: Engine, settings: Sampling, count: int = 40) -> list[int]:
    sampler = engine.sampler(settings)
    try:
        return list(engine.generate([1, 300], sampler, Stats(), count))
    finally:
        sampler.close()


def test_one_candidate_is_greedy(randomized: Engine) -> None:
    greedy = generate(randomized, GREEDY)
    hot = {"temperature": 5.0, "seed": 3}
    assert generate(randomized, Sampling(top_k=1, **hot)) == greedy
    assert generate(randomized, Sampling(top_k=0, min_p=1.0, **hot)) == greedy
    assert generate(randomized, Sampling(top_k=0, top_p=0.0, min_p=0.0, **hot)) == greedy
    assert generate(randomized, Sampling(top_k=0, top_p=1.0, min_p=0.0, **hot)) != greedy


def test_a_strong_penalty_forbids_repetition_of_prompt_and_answer(randomized: Engine) -> None:
    tokens = generate(randomized, GREEDY.changed(repeat_penalty=100.0))
    assert len({1, 300, *tokens}) == 42
    assert len(set(generate(randomized, GREEDY.changed(repeat_penalty=100.0, repeat_last_n=1)))) < 40
