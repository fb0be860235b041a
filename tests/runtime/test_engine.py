"""The loop: what is evaluated, what stops it, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from gguforge.quant.errors import EngineError, GGUFError
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.splits import Limits, divide, named, read_model
from gguforge.quant.writer import write_all
from gguforge.runtime import loaded as loaded_module
from gguforge.runtime.engine import Engine, Stats
from gguforge.runtime.fit import needs
from gguforge.runtime.sampling import GREEDY
from gguforge.runtime.vocabulary import Detokenizer


def run(engine: Engine, prompt: list[int], limit: int = 8) -> tuple[list[int], Stats]:
    sampler, stats = engine.sampler(GREEDY), Stats()
    tokens = list(engine.generate(prompt, sampler, stats, limit))
    sampler.close()
    return tokens, stats


def test_only_what_differs_is_evaluated_and_the_result_is_the_same(randomized: Engine, random_path: Path) -> None:
    prompt = list(range(300, 340))
    first, _ = run(randomized, prompt)
    longer = prompt + first + [310, 320]
    second, stats = run(randomized, longer)
    assert (stats.prompt_tokens, stats.evaluated_tokens) == (50, 3)  # the last token of `first` was never evaluated
    branch, stats = run(randomized, [*prompt[:20], 333, 334])
    assert stats.evaluated_tokens == 2
    with Engine.open(random_path, threads=1) as fresh:
        assert run(fresh, longer)[0] == second
    with Engine.open(random_path, threads=1) as fresh:
        assert run(fresh, [*prompt[:20], 333, 334])[0] == branch


def test_the_same_prompt_again_costs_one_token(randomized: Engine) -> None:
    first, _ = run(randomized, [1, 300, 301])
    again, stats = run(randomized, [1, 300, 301])
    assert (again, stats.evaluated_tokens) == (first, 1)


def test_prompts_longer_than_a_batch(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", random=True, context=2048)
    prompt = [300 + place % 50 for place in range(1500)]
    with Engine.open(path, threads=1) as engine:
        whole, stats = run(engine, prompt)
        assert stats.evaluated_tokens == 1500
    with Engine.open(path, threads=1) as engine:
        run(engine, prompt[:700], limit=1)
        assert run(engine, prompt)[0] == whole


def test_stops(tiny: Engine, endless_path: Path) -> None:
    prompt = tiny.vocabulary.with_bos(tiny.vocabulary.tokenize_plain("\n"))
    assert run(tiny, prompt, limit=99)[1].stop == "end"
    assert run(tiny, prompt, limit=2)[1].stop == "length"
    with Engine.open(endless_path, context=256, threads=1) as engine:
        tokens, stats = run(engine, prompt, limit=9999)
        assert stats.stop == "context"
        assert len(prompt) + len(tokens) == 256 + 1  # the last one needs no place


def test_interrupt_between_tokens_keeps_what_is_there(endless_path: Path) -> None:
    with Engine.open(endless_path, threads=1) as engine:
        sampler, stats, seen = engine.sampler(GREEDY), Stats(), []
        for token in engine.generate([1, 300], sampler, stats):
            seen.append(token)
            if len(seen) == 5:
                engine.interrupt()
        sampler.close()
        assert (len(seen), stats.stop) == (5, "interrupted")


def test_interrupt_inside_prompt_processing_keeps_the_finished_part(random_path: Path) -> None:
    with Engine.open(random_path, context=8192, threads=1) as engine:
        calls = 0

        def stop_at_the_60th_node(_: object) -> bool:
            nonlocal calls
            calls += 1
            if calls == 60:
                engine.interrupt()
            return engine._interrupted

        engine._abort = engine._llama.ggml_abort_callback(stop_at_the_60th_node)
        prompt = [1, *([300, 301, 302] * 2000)]
        tokens, stats = run(engine, prompt)
        assert (tokens, stats.stop) == ([], "interrupted")
        assert calls < 100
        assert engine.tokens_held == stats.evaluated_tokens < 6001
        engine.resume()
        assert run(engine, prompt, limit=1)[1].stop == "length"


def test_text_comes_by_whole_characters_and_wrong_bytes_do_not_stall(tiny: Engine) -> None:
    names = ["<0xC3>", "<0xA9>", "a", "<0xFF>", "b", "<0xE6>", "<0x97>", "c", "<0xF0>"]
    tokens = [tiny.vocabulary._call("\n")[-1] - 10 + int(n[3:5], 16) if n[0] == "<" else None for n in names]
    letters = {letter: tiny.vocabulary.tokenize_plain(letter, continues=True)[0] for letter in "abc"}
    detokenizer = Detokenizer(tiny.vocabulary)
    pieces = [detokenizer.push(letters[n] if t is None else t) for n, t in zip(names, tokens, strict=True)]
    assert pieces == ["", "é", "a", "\ufffd", "b", "", "", "\ufffdc", ""]
    assert detokenizer.finish() == "\ufffd"


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", architecture="fancynet")
    with pytest.raises(EngineError, match="does not know the architecture 'fancynet'"):
        Engine.open(path)


def test_damage_is_told_before_llama_cpp_sees_it(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_module, "load_model", lambda *_: pytest.fail("reached llama.cpp"))
    data = tiny_path.read_bytes()
    for size in (0, 4, 100, 5000, len(data) - 1):
        path = tmp_path / f"{size}.gguf"
        path.write_bytes(data[:size])
        with pytest.raises(GGUFError):
            Engine.open(path)


def test_tokenizer_lists_must_match(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_module, "load_model", lambda *_: pytest.fail("reached llama.cpp"))
    data = tiny_path.read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(
        data.replace(b"tokenizer.ggml.scores\x09\0\0\0\x06\0\0\0", b"tokenizer.ggml.scores\x09\0\0\0\x05\0\0\0")
    )
    with pytest.raises(GGUFError, match=r"scores is not a list of float"):
        Engine.open(path)


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.block_count": 0},
        {"llama.block_count": 65537},
        {"llama.attention.layer_norm_rms_epsilon": math.nan},
        {"llama.attention.layer_norm_rms_epsilon": -1.0},
        {"llama.rope.freq_base": math.inf},
    ],
)
def test_numbers_that_llama_cpp_dies_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, float | int]
) -> None:
    monkeypatch.setattr(loaded_module, "load_model", lambda *_: pytest.fail("reached llama.cpp"))
    with pytest.raises(GGUFError, match=next(iter(extra))):
        Engine.open(write_tiny_model(tmp_path / "m.gguf", extra=extra))


def test_a_vocabulary_alone(tmp_path: Path, tiny_path: Path) -> None:
    header = bytearray(tiny_path.read_bytes())
    header[8:16] = bytes(8)  # no tensors
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    with pytest.raises(GGUFError):
        Engine.open(path)


def test_states_that_cannot_be_cut_are_evaluated_anew(randomized: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recurrent models do."""
    expected = run(randomized, [1, 300, 301, 302])[0]
    run(randomized, [1, 300, 301, 310, 311])

    class Uncuttable:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: False) if name == "llama_memory_seq_rm" else getattr(real, name)

    real = randomized._llama
    monkeypatch.setattr(randomized, "_llama", Uncuttable())
    tokens, stats = run(randomized, [1, 300, 301, 302])
    assert (tokens, stats.evaluated_tokens) == (expected, 4)


def test_split_model(tmp_path: Path) -> None:
    """It answers as the whole one; a missing part is one line."""
    whole = write_tiny_model(tmp_path / "whole.gguf", random=True)
    plans = divide(plan_of_file(read_model(whole)), Limits(tensors=5))
    write_all(named(plans, tmp_path / "m.gguf"), workers=1)
    first, *others = sorted(tmp_path.glob("m-*"))
    with Engine.open(whole) as one, Engine.open(first) as parts:
        assert parts.file.size > one.file.size
        assert needs(parts.file).weights == needs(one.file).weights
        assert run(one, [1, 300])[0] == run(parts, [1, 300])[0]
    with pytest.raises(GGUFError, match="Give the first part"):
        Engine.open(others[0])
    others[-1].unlink()
    with pytest.raises(GGUFError, match=f"part {len(plans)} of {len(plans)} of the model is missing"):
        Engine.open(first)


def test_llama_cpp_failures_are_our_error(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: -3) if name == "llama_decode" else getattr(real, name)

    real = tiny._llama
    monkeypatch.setattr(tiny, "_llama", Failing())
    with pytest.raises(EngineError, match="code -3"):
        run(tiny, [1, 2, 3])
    monkeypatch.undo()
    assert run(tiny, [1, 2, 3], limit=1)[1].evaluated_tokens == 3


def test_close_twice(tiny_path: Path) -> None:
    engine = Engine.open(tiny_path)
    engine.close()
    engine.close()
