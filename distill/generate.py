"""Sequence-level distillation: a teacher answers prompts, and the answers that pass become conversations to learn from.

What is thrown away: answers that did not come to an end, too short ones, those with bytes that are no UTF-8, those that
go in circles, and repetitions of an earlier answer to the same prompt. The rest is a .jsonl file of conversations, for
`distill collect` for example. What is done is kept in a file beside the output, one line an answer, from which a
stopped run goes on. Method: Kim and Rush, Sequence-Level Knowledge Distillation, https://arxiv.org/abs/1606.07947.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.files import check_target, replacing
from gguforge.runtime.calibrate import model_identity
from gguforge.runtime.chunks import conversation, read_line
from gguforge.runtime.engine import Engine, Stats
from gguforge.runtime.interrupt import deferred_signals
from gguforge.runtime.prompt import Message, Prompter
from gguforge.runtime.sampling import Sampling
from gguforge.runtime.vocabulary import Detokenizer

_THOUGHTS_END = "</think>"
_NO_UTF8 = "\ufffd"  # stands for bytes that are no character
_CIRCLE = 4  # tokens of a piece that comes again
_CIRCLE_SHARE = 0.5  # of an answer's pieces that may have come before
_CIRCLE_TOKENS = 32  # shorter answers may repeat themselves

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Asking:
    """How the teacher is asked.

    Attributes:
        answers: to each prompt.
        max_tokens: of an answer; what is longer is thrown away.
        min_characters: of an answer; what is shorter is thrown away.
        sampling: how its tokens are drawn; the seed is 0 if it has none. None for the file's own settings.
    """

    answers: int = 1
    max_tokens: int = 512
    min_characters: int = 1
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Generated:
    """Answers that were kept, and why others were not ("cut", "short", "garbled", "circles", "same")."""

    prompts: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)


def read_prompts(path: str | os.PathLike[str]) -> list[Messages]:
    """The prompts of a .jsonl file: {"prompt": "..."}, or conversations, whose last answer is left out.

    Raises:
        InputError: a line is neither.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        value = read_line(line)
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            messages = [{"role": "user", "content": value["prompt"]}]
        else:
            messages = [{"role": m["role"], "content": m["content"]} for m in conversation(value) or []]
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise InputError(
                f"line {number} asks nothing", path=path,
                expected='{"prompt": "..."} or {"messages": [..., {"role": "user", "content": "..."}]}',
            )  # fmt: skip
        prompts.append(messages)
    if not prompts:
        raise InputError("there are no prompts", path=path)
    return prompts


def generate(
    teacher: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    asking: Asking | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Ask, and write the answers that pass.

    Args:
        teacher: a GGUF file that can chat.
        prompts: see `read_prompts`.
        output: a .jsonl file of conversations.
        context: tokens; None for the file's training length, as far as memory allows.
        threads: None for the physical cores.
        overwrite: replace the output if it exists.
        progress: called with the answers that are done and their number.

    Raises:
        GGUForgeError: an input is damaged, the output exists, or what a stopped run left belongs to another one.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; what was done stays.
    """
    asking, output = asking or Asking(), Path(output)
    check_target(output, overwrite)
    asked = read_prompts(prompts)
    with Engine.open(teacher, context=context, threads=threads) as engine:
        sampling = (asking.sampling or Sampling.from_metadata(engine.file.metadata)).changed()
        if sampling.seed is None:
            sampling = sampling.changed(seed=0)
        key = _key(model_identity(engine.file), asked, asking, sampling, engine.context)
        partial = output.with_name(output.name + ".partial")
        lines = _done(partial, key)
        _ask_all(engine, asked, asking, sampling, partial, key, lines, progress or (lambda done, total: None))
    result, kept = _filtered(asked, asking, lines)
    data = "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in kept).encode()
    with replacing(output, len(data), overwrite) as part:
        part.write_bytes(data)
    partial.unlink(missing_ok=True)
    return result


def _key(model: str, asked: Sequence[Messages], asking: Asking, sampling: Sampling, context: int) -> str:
    """A hash over all that decides the answers."""
    all_of_it = [model, asked, asking.answers, asking.max_tokens, asdict(sampling), context]
    return hashlib.sha256(json.dumps(all_of_it).encode()).hexdigest()


def _done(partial: Path, key: str) -> list[dict[str, Any]]:
    """The answers that a stopped run left; a line that was cut short is dropped.

    Raises:
        OutputError: they belong to another run.
    """
    if not partial.exists():
        return []
    head, *lines = partial.read_bytes().split(b"\n")[:-1] or [b""]
    if read_line(head) != {"key": key}:
        raise OutputError(
            "a stopped run with other inputs or settings left this file", path=partial,
            remedy="Give the same inputs and settings to go on with it, or delete it.",
        )  # fmt: skip
    return [read_line(line) for line in lines]


def _ask_all(
    engine: Engine,
    asked: Sequence[Messages],
    asking: Asking,
    sampling: Sampling,
    partial: Path,
    key: str,
    lines: list[dict[str, Any]],
    progress: Callable[[int, int], None],
) -> None:
    """Add the answers that are missing to `lines` and to the file."""
    prompter = Prompter(engine.vocabulary, engine.file.metadata)
    if prompter.template is None:
        raise InputError("the model has no chat template", path=engine.file.path, remedy="Use one that can chat.")
    total = len(asked) * asking.answers
    whole = "".join(json.dumps(entry) + "\n" for entry in ({"key": key}, *lines))
    partial.write_text(whole, encoding="utf-8")
    with partial.open("a", encoding="utf-8") as file, deferred_signals(engine.interrupt) as signals:
        for number in range(len(lines), total):
            progress(number, total)
            prompt = prompter.whole([Message(m["role"], m["content"]) for m in asked[number // asking.answers]])
            entry = _answer(engine, prompt, sampling, number, asking.max_tokens)
            if signals.came:
                break
            lines.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()
        signals.raise_if_came()
    progress(total, total)


def _answer(engine: Engine, prompt: Sequence[int], sampling: Sampling, number: int, limit: int) -> dict[str, Any]:
    """One answer: its text, why it stopped, and the share of its pieces that had come before."""
    if len(prompt) >= engine.context:
        return {"text": "", "stop": "context", "circles": 0.0}
    assert sampling.seed is not None
    digest = hashlib.sha256(f"{sampling.seed} {number}".encode()).digest()
    stats, detokenizer = Stats(), Detokenizer(engine.vocabulary)
    with closing(engine.sampler(sampling.changed(seed=int.from_bytes(digest[:4], "little")))) as sampler:
        tokens = list(engine.generate(prompt, sampler, stats, limit))
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.finish()
    return {"text": text.rsplit(_THOUGHTS_END, 1)[-1].strip(), "stop": stats.stop, "circles": circles(tokens)}


def circles(tokens: Sequence[int]) -> float:
    """The share of pieces of four tokens that came before; 0 for short answers.

    >>> circles([1, 2, 3, 4] * 20), circles(range(80))
    (0.948051948051948, 0.0)
    """
    pieces = [tuple(tokens[i : i + _CIRCLE]) for i in range(len(tokens) - _CIRCLE + 1)]
    return 1 - len(set(pieces)) / len(pieces) if len(tokens) >= _CIRCLE_TOKENS else 0.0


def _filtered(
    asked: Sequence[Messages], asking: Asking, lines: Sequence[dict[str, Any]]
) -> tuple[Generated, list[Messages]]:
    """What passes, in the order of the prompts."""
    dropped: Counter[str] = Counter()
    kept: list[Messages] = []
    for number, messages in enumerate(asked):
        seen: set[str] = set()
        for entry in lines[number * asking.answers : (number + 1) * asking.answers]:
            reason = next(_faults(entry, asking, seen), "")
            seen.add(entry["text"])
            if reason:
                dropped[reason] += 1
            else:
                kept.append([*messages, {"role": "assistant", "content": entry["text"]}])
    return Generated(len(asked), len(kept), dict(dropped)), kept


def _faults(entry: dict[str, Any], asking: Asking, seen: set[str]) -> Iterator[str]:
    if entry["stop"] != "end":
        yield "cut"
    if len(entry["text"]) < max(1, asking.min_characters):
        yield "short"
    if _NO_UTF8 in entry["text"]:
        yield "garbled"
    if entry["circles"] > _CIRCLE_SHARE:
        yield "circles"
    if entry["text"] in seen:
        yield "same"
