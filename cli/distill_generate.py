"""`gguforge distill generate`: a teacher answers prompts, for a student to learn from."""

from __future__ import annotations

import click

from gguforge.cli.chunk_bar import chunk_bar
from gguforge.cli.common import quiet_option, threads_option


@click.command("generate")
@click.argument("teacher", type=click.Path())
@click.option("-f", "--file", "prompts", type=click.Path(), required=True, help="The prompts, a .jsonl file.")
@click.option("-o", "--output", type=click.Path(), required=True, help="The .jsonl file of conversations to write.")
@click.option("--answers", type=click.IntRange(1), default=1, show_default=True, help="Answers to each prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True,
              help="Tokens of an answer at most; what is longer is thrown away.")  # fmt: skip
@click.option("--min-characters", type=click.IntRange(1), default=1, show_default=True,
              help="Characters of an answer at least.")  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(0, 100), help="How freely tokens are drawn.  [default: the file's]"
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the answers.")
@click.option("-c", "--context", type=click.IntRange(16), help="Tokens of prompt and answer.  [default: the file's]")
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@quiet_option
def command(
    teacher: str,
    prompts: str,
    output: str,
    answers: int,
    max_tokens: int,
    min_characters: int,
    temperature: float | None,
    seed: int,
    context: int | None,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Let the GGUF file TEACHER answer prompts, and keep the answers that pass as conversations.

    A line of the prompts is {"prompt": "..."} or a conversation, whose last answer is made anew. Answers that do not
    come to an end, hold bytes that are no UTF-8, go in circles or repeat another one are thrown away. Run the same
    command again to go on with a run that was stopped.

    \b
    Examples:
      gguforge distill generate teacher-Q8_0.gguf -f prompts.jsonl -o chats.jsonl
      gguforge distill generate teacher-Q8_0.gguf -f prompts.jsonl --answers 4 --temperature 0.8 -o chats.jsonl
      gguforge distill collect teacher-Q8_0.gguf -f chats.jsonl -o targets/
    """
    from gguforge.distill.generate import Asking, generate
    from gguforge.quant.reader import read_gguf
    from gguforge.runtime.sampling import Sampling

    own = Sampling.from_metadata(read_gguf(teacher).metadata)
    asking = Asking(answers, max_tokens, min_characters, own.changed(temperature=temperature, seed=seed))
    with chunk_bar("generate", quiet) as bar:
        done = generate(
            teacher, prompts, output, asking, context=context, threads=threads, overwrite=overwrite, progress=bar
        )
    if not quiet:
        lost = ", ".join(f"{count} {reason}" for reason, count in sorted(done.dropped.items())) or "none"
        click.echo(f"{output}: {done.kept} answers to {done.prompts} prompts; thrown away: {lost}")
