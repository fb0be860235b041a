"""`gguforge chat`: talk to a GGUF model in the terminal, or ask it one thing in a pipeline."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gguforge.runtime.chat import ChatSession
    from gguforge.runtime.engine import Engine

EXAMPLES = """\b
Examples:
  gguforge chat model.gguf
  gguforge chat model.gguf --system "You answer in one sentence."
  gguforge chat model.gguf -p "What is a GGUF file?" --temperature 0
  cat notes.txt | gguforge chat model.gguf -p "Summarise"
  gguforge chat model.gguf -p "Hello" --json | jq .tokens_per_second
"""


@click.command(epilog=EXAMPLES)
@click.argument("model", type=click.Path())
@click.option("-p", "--prompt", help="Answer this and leave; text piped to stdin is put after it.")
@click.option("--system", help="Instructions that stay in front of the conversation.")
@click.option(
    "--context",
    type=click.IntRange(min=32),
    help="Tokens of context.  [default: training length, at most 8192, if it fits the memory]",
)
@click.option("--threads", type=click.IntRange(1, 512), help="Threads.  [default: physical cores]")
@click.option("--temperature", type=click.FloatRange(0, 100), help="0 takes the most likely token.")
@click.option("--top-k", type=click.IntRange(min=0), help="Only the K most likely tokens; 0 for all.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Only the most likely tokens that reach this probability.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Only tokens this likely relative to the best.")
@click.option("--repeat-penalty", type=click.FloatRange(0.01, 100), help="Above 1: recent tokens become less likely.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="Makes an answer repeatable.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of an answer.")
@click.option("--json", "as_json", is_flag=True, help="With a prompt: print the answer and its figures as JSON.")
@click.option("--verbose", is_flag=True, help="Show what llama.cpp says.")
def command(
    model: str,
    prompt: str | None,
    system: str | None,
    context: int | None,
    threads: int | None,
    max_tokens: int | None,
    as_json: bool,
    verbose: bool,
    **sampling: float | None,
) -> None:
    """Talk to a GGUF model in the terminal.

    Sampling settings that are not given come from the file (general.sampling.*), or are llama.cpp's own: temperature
    0.8, top-k 40, top-p 0.95, min-p 0.05. Answers go to stdout, everything else to stderr. /help lists what
    can be typed.
    """
    from gguforge.runtime.chat import ChatSession
    from gguforge.runtime.engine import Engine
    from gguforge.runtime.interrupt import exit_on_signals
    from gguforge.runtime.sampling import Sampling, unsupported_settings
    from gguforge.runtime.terminal import make_lenient, run_chat

    text = _one_prompt(prompt)
    if text is None and as_json:
        raise click.UsageError("--json needs a prompt: give -p, or pipe one in.")
    make_lenient(sys.stdout, sys.stderr)
    with exit_on_signals(), Engine.open(model, context=context, threads=threads, verbose=verbose) as engine:
        click.echo(_describe(engine), err=True)
        for key in unsupported_settings(engine.file.metadata):
            click.echo(f"note: the file asks for {key}, which is not supported here.", err=True)
        settings = Sampling.from_metadata(engine.file.metadata).changed(**sampling)
        with ChatSession(engine, system=system, sampling=settings, max_tokens=max_tokens, notice=_remark) as session:
            code = run_chat(session) if text is None else _answer(session, text, as_json)
    click.get_current_context().exit(code)


def _one_prompt(prompt: str | None) -> str | None:
    """The prompt and what is piped in, joined; None for an interactive chat."""
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    piped = sys.stdin.buffer.read().decode("utf-8-sig", "replace").strip("\n")
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text.strip():
        raise click.UsageError("There is no prompt: -p is not given and stdin is empty.")
    return text


def _describe(engine: Engine) -> str:
    """One line: name, size and type, context, threads."""
    from pathlib import PurePath

    trained = engine.trained_context
    facts = [
        PurePath(engine.file.path).name,
        engine.describe(),
        f"{engine.file.size / 1e6:,.1f} MB",
        f"context {engine.context}" + f" (trained for {trained})" * (engine.context > trained),
        f"{engine.threads} thread{'s' * (engine.threads > 1)}",
    ]
    return " · ".join(facts)


def _remark(line: str) -> None:
    click.echo(line, err=True)


def _answer(session: ChatSession, text: str, as_json: bool) -> int:
    """Answer once; the exit code."""
    import io

    from gguforge.runtime.interrupt import TERMINATED
    from gguforge.runtime.terminal import print_answer

    if not session.has_template:
        _remark("This model has no chat template: it continues your text.")
    flags = print_answer(session, lambda: session.ask(text), io.StringIO() if as_json else sys.stdout)
    if as_json:
        click.echo(json.dumps(_figures(session), indent=2))
    if flags.terminated:
        return TERMINATED
    return 130 if flags.interrupted else 0


def _figures(session: ChatSession) -> dict[str, Any]:
    stats, turn = session.stats, session.turns[-1] if session.turns else None
    return {
        "model": str(session.engine.file.path),
        "answer": turn.answer if turn else "",
        "thoughts": turn.thoughts if turn else "",
        "stop": stats.stop,
        "prompt_tokens": stats.prompt_tokens,
        "evaluated_tokens": stats.evaluated_tokens,
        "generated_tokens": stats.generated_tokens,
        "first_token_seconds": round(stats.first_token_seconds, 4),
        "tokens_per_second": round(stats.tokens_per_second, 2),
        "context": session.engine.context,
        "threads": session.engine.threads,
        "sampling": session.sampling.as_dict(),
    }
