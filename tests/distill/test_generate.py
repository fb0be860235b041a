"""A teacher's answers: what passes is kept, what does not is counted, a stopped run goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from gguforge.distill import generate as module
from gguforge.distill.generate import Asking, Generated, generate, read_prompts
from gguforge.quant.errors import InputError, OutputError
from gguforge.runtime.sampling import GREEDY, Sampling
from gguforge.runtime.vocabulary import Vocabulary

QUESTIONS = [
    {"prompt": "hello"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
SAMPLED = Sampling(temperature=1.0, seed=1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, QUESTIONS)))
    return path


def ask(teacher: Path, prompts: Path, name: str, asking: Asking, **options: Any) -> tuple[Generated, list[Any]]:
    output = prompts.parent / name
    done = generate(teacher, prompts, output, asking, threads=1, **options)
    return done, [json.loads(line)["messages"] for line in output.read_text().splitlines()]


def test_answers_become_conversations(other_teacher: Path, prompts: Path) -> None:
    done, talks = ask(other_teacher, prompts, "c.jsonl", Asking(2, sampling=GREEDY))
    answer = {"role": "assistant", "content": "Gguf files hold a model."}
    assert talks == [[{"role": "user", "content": text}, answer] for text in ("hello", "a")]
    assert done == Generated(2, 2, {"same": 2})
    with pytest.raises(OutputError, match="file exists"):
        ask(other_teacher, prompts, "c.jsonl", Asking())
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["c.jsonl", "prompts.jsonl"]


def test_answers_that_do_not_pass(other_teacher: Path, prompts: Path) -> None:
    assert ask(other_teacher, prompts, "1", Asking(max_tokens=3, sampling=GREEDY))[0].dropped == {"cut": 2}
    assert ask(other_teacher, prompts, "2", Asking(min_characters=99, sampling=GREEDY))[0].dropped == {"short": 2}
    prompts.write_text(json.dumps({"prompt": "hello user " * 300}))  # longer than the context
    assert ask(other_teacher, prompts, "3", Asking(sampling=GREEDY), context=256)[0].dropped == {"cut": 1}


def test_circles_do_not_pass() -> None:
    entry = {"text": "la la", "stop": "end", "circles": 0.9}
    assert module._filtered([[]], Asking(), [entry])[0].dropped == {"circles": 1}


def test_bytes_that_are_no_text_do_not_pass(
    other_teacher: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vocabulary, "piece", lambda *_: b"caf\xc3")  # the first byte of two
    assert ask(other_teacher, prompts, "c.jsonl", Asking(sampling=GREEDY)) == (Generated(2, 0, {"garbled": 2}), [])


def test_a_stopped_run_goes_on(teacher: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(3, max_tokens=8, sampling=SAMPLED)
    monkeypatch.setattr(module, "_faults", lambda *_: iter(()))  # a random model's answers have no end
    _, whole = ask(teacher, prompts, "whole", asking)
    assert len({talk[-1]["content"] for talk in whole}) > 3  # every answer has a seed of its own

    def stop(done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ask(teacher, prompts, "part", asking, progress=stop)
    partial = prompts.parent / "part.partial"
    assert len(partial.read_text().splitlines()) == 5
    with pytest.raises(OutputError, match="other inputs or settings"):
        ask(teacher, prompts, "part", Asking(2, max_tokens=8, sampling=SAMPLED))
    partial.write_text(partial.read_text() + '{"text": "cut sho')
    steps: list[int] = []
    _, talks = ask(teacher, prompts, "part", asking, progress=lambda done, total: steps.append(done))
    assert steps == [4, 5, 6]
    assert [talk[-1] for talk in talks[:4]] == [talk[-1] for talk in whole[:4]]
    assert len(talks) == 6
    assert not partial.exists()


@pytest.mark.parametrize("line", ['{"messages": []}', '"hello"', '[{"role": "system", "content": "x"}]', "{"])
def test_lines_that_ask_nothing_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hi"}\n' + line)
    with pytest.raises(InputError, match="line 2 asks nothing"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(path)
