"""A conversation: exact history, undo and retry, a full context, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import CHATML, write_tiny_model

from gguforge.quant.errors import InputError, OutputError
from gguforge.runtime.chat import ChatSession, _split_thoughts, answer_once
from gguforge.runtime.engine import Engine
from gguforge.runtime.sampling import GREEDY, Sampling
from gguforge.runtime.transcript import read_transcript

SAID = "Gguf files hold a model."


class Counting:
    """llama.cpp with a count of the tokens that are given to llama_decode."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self.tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def llama_decode(self, context: Any, batch: Any) -> Any:
        self.tokens += batch.n_tokens
        return self._llama.llama_decode(context, batch)


@pytest.fixture
def count(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    counting = Counting(tiny._llama)
    monkeypatch.setattr(tiny, "_llama", counting)

    def run(action: Callable[[], object]) -> int:
        counting.tokens = 0
        action()
        return counting.tokens

    return run


def say(session: ChatSession, text: str) -> str:
    return "".join(session.ask(text))


def test_follow_ups_evaluate_only_new_tokens(tiny: Engine, count: Callable[[Callable[[], object]], int]) -> None:
    """Answer tokens that no tokenizer would choose for their text are kept as they were generated."""
    with ChatSession(tiny, system="Be kind.", sampling=GREEDY) as session:
        assert say(session, "hello") == SAID
        generated = session.stats.generated_tokens
        for text in ("more", "and <|im_end|> more", "  é 日本 "):
            new = len(session._prompter.after_answer(session._messages(session.turns, text)) or ())
            assert new > 0
            assert count(lambda text=text: say(session, text)) == new + generated
            assert (session.stats.evaluated_tokens, session.stats.generated_tokens) == (new, generated)


def test_follow_ups_without_a_template(tmp_path: Path) -> None:
    with (
        Engine.open(write_tiny_model(tmp_path / "m.gguf", template=None)) as engine,
        ChatSession(engine, sampling=GREEDY, max_tokens=3) as session,
    ):
        assert not session.has_template
        assert say(session, "hello\n") == " Gguf files hold"
        say(session, "hello")
        assert session.stats.evaluated_tokens == 2  # the last token of the answer and "hello"
        assert session.undo() == "hello"
        assert session.undo() == "hello\n"


def test_undo_and_retry_keep_the_tokens_of_earlier_turns(
    tiny: Engine, count: Callable[[Callable[[], object]], int]
) -> None:
    with ChatSession(tiny, sampling=GREEDY) as session:
        say(session, "hello")
        asked = count(lambda: say(session, "more"))
        assert count(lambda: "".join(session.retry())) <= asked
        assert [turn.user for turn in session.turns] == ["hello", "more"]
        assert session.undo() == "more"
        assert count(lambda: say(session, "less")) <= asked + 1
        session.undo()
        session.undo()
        assert session.undo() is None
        with pytest.raises(InputError, match="nothing to retry"):
            session.retry()


def test_retry_draws_anew_and_a_seed_repeats_the_session(random_path: Path) -> None:
    def answers(seed: int) -> list[str]:
        with (
            Engine.open(random_path, threads=1) as engine,
            ChatSession(
                engine, sampling=Sampling(temperature=2.0, top_k=0, min_p=0, seed=seed), max_tokens=8
            ) as session,
        ):
            return [say(session, "hello"), "".join(session.retry())]

    first, retried = answers(1)
    assert first != retried
    assert answers(1) == [first, retried]
    assert answers(2)[0] != first


def test_clear_keeps_the_system_text(tiny: Engine) -> None:
    with ChatSession(tiny, system="zz", sampling=GREEDY) as session:
        say(session, "hello")
        first = session.stats.prompt_tokens
        session.clear()
        say(session, "hello")
        assert session.stats.prompt_tokens == first
        session.system = ""
        session.clear()
        say(session, "hello")
        assert session.stats.prompt_tokens < first


def test_a_full_context_forgets_the_oldest_turns_and_says_so_once(tiny_path: Path) -> None:
    told: list[str] = []
    with (
        Engine.open(tiny_path, context=256, threads=1) as engine,
        ChatSession(engine, system="stay", sampling=GREEDY, notice=told.append) as session,
    ):
        for number in range(30):
            assert say(session, f"number {number}") == SAID
            assert engine.tokens_held <= engine.context
        assert len(told) == 1
        assert "oldest turns are forgotten" in told[0]
        assert session.turns[-1].user == "number 29"
        assert 1 < len(session.turns) < 12
        assert session._messages(session.turns, "")[0].content == "stay"


def test_an_answer_that_fills_the_context_goes_on_after_older_turns_went(endless_path: Path) -> None:
    told: list[str] = []
    with (
        Engine.open(endless_path, context=256, threads=1) as engine,
        ChatSession(engine, sampling=GREEDY, max_tokens=60, notice=told.append) as session,
    ):
        for text in ("one", "two"):
            say(session, text)
        session.max_tokens = 200
        answer = say(session, "three")
        assert session.stats.stop == "length"
        assert session.stats.generated_tokens == 200
        words = answer.replace(".", " .").split()
        cycle = ["Gguf", "files", "hold", "a", "model", "."]
        assert words == [cycle[place % 6] for place in range(200)]
        assert len(told) == 1
        session.max_tokens = None
        say(session, "four")
        assert session.stats.stop == "context"
        assert session.turns[-1].cut


def test_a_text_that_cannot_fit_is_refused_and_nothing_is_lost(tiny_path: Path) -> None:
    with (
        Engine.open(tiny_path, context=256, threads=1) as engine,
        ChatSession(engine, sampling=GREEDY) as session,
    ):
        say(session, "hello")
        with pytest.raises(InputError, match=r"does not fit the context .*--context"):
            session.ask("x " * 300)
        assert len(session.turns) == 1
        assert say(session, "hello") == SAID


def test_an_interrupted_answer_is_kept_and_marked(endless_path: Path) -> None:
    with (
        Engine.open(endless_path, threads=1) as engine,
        ChatSession(engine, sampling=GREEDY) as session,
    ):
        pieces = []
        for piece in session.ask("hello"):
            pieces.append(piece)
            if len(pieces) == 4:
                engine.interrupt()
        assert (session.turns[0].cut, session.turns[0].answer) == (True, "Gguf files hold a")
        answer = session.ask("again")
        next(answer)
        answer.close()  # the caller loses interest
        assert (session.turns[1].cut, session.turns[1].answer) == (True, "Gguf")


def test_thoughts_are_told_from_answers() -> None:
    assert _split_thoughts("<think>\na\n</think>\n\nb") == ("a", "b")
    assert _split_thoughts("a</think>b") == ("a", "b")
    assert _split_thoughts(" b ") == ("", "b")


def test_save_and_load(tiny: Engine, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with ChatSession(tiny, system="Be kind.", sampling=GREEDY, max_tokens=2) as session:
        say(session, "hello <|im_end|> é")
        session.max_tokens = None
        say(session, "more")
        session.save(path)
        session.save(path)  # replaces its own
        turns = session.turns
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in document["messages"]] == ["system", *["user", "assistant"] * 2]
    with ChatSession(tiny, sampling=GREEDY) as session:
        session.load(path)
        assert session.system == "Be kind."
        assert [(t.user, t.answer, t.cut) for t in session.turns] == [(t.user, t.answer, t.cut) for t in turns]
        assert [t.cut for t in session.turns] == [True, False]
        assert say(session, "go on") == SAID
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk.json"]


def test_save_does_not_replace_another_file(tiny: Engine, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with ChatSession(tiny) as session:
        with pytest.raises(OutputError, match="exists and is not a saved conversation"):
            session.save(path)
        with pytest.raises(OSError, match="missing"):
            session.save(tmp_path / "missing" / "talk.json")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        '{"format": "other"}',
        '{"format": "gguforge-chat", "version": 1, "messages": [{"role": "user", "content": "x"}]}',
        '{"format": "gguforge-chat", "version": 1, "messages": [{"role": "user"}]}',
        '{"format": "gguforge-chat", "version": 1, "messages": [{"role": "user", "content": 1}, 2]}',
        '{"format": "gguforge-chat", "version": 1, "messages": '
        '[{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]}',
        "\xff",
    ],
)
def test_what_is_no_conversation_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not a saved conversation"):
        read_transcript(path)


def test_answer_once(tiny_path: Path) -> None:
    assert answer_once(tiny_path, "hello", sampling=GREEDY) == SAID
    assert answer_once(tiny_path, "hello", system="x", sampling=GREEDY, max_tokens=2) == "Gguf files"


def test_the_templates_own_blanks_do_not_cost_the_history(tmp_path: Path) -> None:
    """A template that puts a blank before each answer, and trims it: the generated tokens still stand."""
    template = CHATML.replace("{{ m.content | trim }}", "{{ ' ' + m.content | trim }}")
    with (
        Engine.open(write_tiny_model(tmp_path / "m.gguf", template=template)) as engine,
        ChatSession(engine, sampling=GREEDY) as session,
    ):
        say(session, "hello")
        before = session.stats.prompt_tokens + session.stats.generated_tokens
        say(session, "more")
        assert session.stats.evaluated_tokens == session.stats.prompt_tokens - before
