"""`gguforge distill collect`: soft targets from teachers and text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import gathered, in_words, quiet_option, threads_option

if TYPE_CHECKING:
    from gguforge.distill.collect import Collected, Progress
    from gguforge.distill.collector import Settings
    from gguforge.distill.teachers.open import TeacherSource

GOOD_TYPES = ("F32", "F16", "BF16", "Q8_0", "unknown")
"""Types of weights that hardly change what a teacher expects."""


def _shard(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """`2/4`: the second of four."""
    number, _, count = value.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.BadParameter("give it as 2/4: the second of four", ctx, param)
    return int(number), int(count)


@dataclass(frozen=True)
class Kept:
    """The options of what is kept of a distribution."""

    draws: int
    independent: bool
    top_k: int | None
    full: bool

    def __post_init__(self) -> None:
        if (self.top_k is not None) + self.full + self.independent > 1:
            raise click.UsageError("--top-k, --full and --independent exclude each other.")

    def settings(self, **others: Any) -> Settings:
        from gguforge.distill.collector import Settings

        if self.top_k:
            return Settings(kind="top-k", size=self.top_k, **others)
        if self.full:
            return Settings(kind="full", size=0, **others)
        return Settings(size=self.draws, draws="independent" if self.independent else "stratified", **others)


@dataclass(frozen=True)
class Pool:
    """The options of who makes the shards."""

    engine: str
    workers: int
    gpus: float

    def collect(self, *arguments: Any, **others: Any) -> Collected:
        """As `gguforge.distill.collect.collect`."""
        if self.engine == "ray":
            from gguforge.distill.cluster import collect_with_ray

            return collect_with_ray(*arguments, workers=self.workers, gpus=self.gpus, **others)
        from gguforge.distill.collect import collect

        return collect(*arguments, **others)


@dataclass(frozen=True)
class Access:
    """The options of how teachers are run."""

    threads: int | None
    device: str | None
    tokenizer: str | None
    api_key_env: str | None

    def sources(self, teachers: tuple[str, ...], weights: tuple[float, ...]) -> list[TeacherSource]:
        """Where each teacher is, and its share of the mixture.

        Raises:
            InputError: there is a device, and no checkpoint to compute on it.
        """
        from gguforge.distill.teachers.open import TeacherSource
        from gguforge.quant.errors import InputError

        if weights and len(weights) != len(teachers):
            raise click.UsageError(f"Give --weight once for each of the {len(teachers)} teachers.")
        if self.device and not any(Path(teacher).is_dir() for teacher in teachers):
            raise InputError(
                "--device is for checkpoints, which torch computes", path=teachers[0], found="no checkpoint",
                remedy="Leave it out.",
            )  # fmt: skip
        return [
            TeacherSource(teacher, weight, self.threads, self.device, self.tokenizer, self.api_key_env)
            for teacher, weight in zip(teachers, weights or [1.0] * len(teachers), strict=True)
        ]


@click.command("collect")
@click.argument("teachers", nargs=-1, required=True, metavar="TEACHER...")
@click.option("-f", "--file", "text", type=click.Path(), multiple=True, required=True,
              help="The text; .jsonl holds texts or conversations, one a line. May be repeated. A data set of "
              "the Hub is hub:OWNER/NAME:SPLIT.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(), required=True, help="The folder for the targets.")
@gathered(
    Kept,
    "kept",
    click.option("-n", "--draws", type=click.IntRange(1, 65536), default=50, show_default=True,
                 help="Tokens drawn from the teacher's distribution, for each token of text."),
    click.option(
        "--independent", is_flag=True, help="Draw each by itself, not spread evenly over the distribution: noisier."
    ),
    click.option("--top-k", type=click.IntRange(1, 65536), help="Keep the most probable tokens instead: biased."),
    click.option("--full", is_flag=True, help="Keep every token's probability instead: large."),
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the draws.")
@click.option("--temperature", type=click.FloatRange(0.01, 100), default=1.0, show_default=True,
              help="Divide the teacher's scores by this.")  # fmt: skip
@click.option("-c", "--context", type=click.IntRange(2), default=512, show_default=True,
              help="Tokens of a document at most.")  # fmt: skip
@click.option("--weight", "weights", type=click.FloatRange(0, min_open=True), multiple=True,
              help="A teacher's share of the mixture, in their order.  [default: equal]")  # fmt: skip
@click.option(
    "--shard", metavar="I/N", callback=_shard, default="1/1", help="Make every n-th shard only, from the i-th on."
)
@click.option("--shard-bytes", type=click.IntRange(1), help="Text of a shard.  [default: 262144; 8192 with --full]")
@gathered(
    Pool,
    "pool",
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                 help="Make shards in this process, or by a pool of Ray actors."),
    click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Actors of --engine ray."),
    click.option("--gpus", type=click.FloatRange(0), default=0.0, help="GPUs that each actor takes.  [default: 0]"),
)  # fmt: skip
@gathered(
    Access,
    "access",
    threads_option,
    click.option(
        "--device", help="What torch computes a checkpoint on: cpu, cuda...  [default: a GPU where there is one]"
    ),
    click.option("--tokenizer", type=click.Path(), help="A server's tokenizer: a GGUF file or a checkpoint's folder."),
    click.option("--api-key-env", metavar="NAME", help="The environment variable that holds a server's key."),
)
@click.option("--json", "as_json", is_flag=True, help="Print what was collected as JSON.")
@quiet_option
def command(
    teachers: tuple[str, ...],
    text: tuple[str, ...],
    output: str,
    kept: Kept,
    weights: tuple[float, ...],
    shard: tuple[int, int],
    pool: Pool,
    access: Access,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Read text through TEACHER and keep what it expects after every token, for a student to learn from.

    By default 50 tokens are drawn from each distribution: right on average, in about 45 bytes a token (large teachers
    are sure of more and need less). Run the same command again to go on with a run that was stopped. Several teachers
    with one tokenizer are mixed.

    TEACHER is a GGUF file, the folder of a Hugging Face checkpoint (needs torch and transformers), or the address of a
    server like OpenAI's that gives log-probabilities of the prompt; a server gives top-k targets only.

    \b
    Examples:
      gguforge distill collect teacher-Q8_0.gguf -f text.txt -o targets/
      gguforge distill collect teacher-f16.gguf -f chats.jsonl -c 2048 -o targets/
      gguforge distill collect code.gguf prose.gguf --weight 2 --weight 1 -f text.txt -o targets/
      gguforge distill collect http://127.0.0.1:8000/v1 --tokenizer model/ --top-k 100 -f text.txt -o targets/
      gguforge distill collect teacher-Q8_0.gguf -f text.txt -o targets/ --shard 1/2   # 2/2 on the other laptop
    """
    sources = access.sources(teachers, weights)
    with _bar(quiet) as progress:
        done = pool.collect(sources, text, output, kept.settings(**settings), shard=shard, progress=progress)
    if as_json:
        click.echo(json.dumps({"output": output, **described(done)}))
    elif not quiet:
        click.echo(report(done, output))


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on stderr that counts bytes of text and shows tokens a second; none when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no watching thread
    with tqdm(desc="collect", unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def update(state: Progress) -> None:
            bar.total = state.total
            bar.set_postfix_str(f"{state.tokens / max(state.seconds, 1e-9):.0f} tokens/s", refresh=False)
            bar.update(state.done - bar.n)

        yield update


def described(done: Collected) -> dict[str, Any]:
    """The facts that `--json` prints."""
    return {
        "key": done.manifest.key,
        "shards": {"made": done.made, "kept": done.kept, "missing": done.missing},
        "tokens": done.tokens,
        "rows": done.rows,
        "bytes": done.nbytes,
        "bytes_per_token": round(done.nbytes / max(1, done.tokens), 2),
        "teacher_loss": done.teacher_loss,
        "tokens_read": done.last.tokens,
        "seconds": round(done.last.seconds, 3),
    }


def report(done: Collected, output: str) -> str:
    """For people: what is there, what the teacher thinks of the text, and what is missing."""
    each = done.nbytes / max(1, done.tokens)
    lines = [
        f"{output}: {done.made + done.kept} shards ({done.made} new), {done.tokens:,} tokens of which {done.rows:,} "
        f"count, {in_words(done.nbytes)}, {each:.1f} bytes a token",
    ]
    if done.rows:
        lines.append(f"teacher: {done.teacher_loss:.4f} nats a token")
    if done.last.tokens:
        lines[-1] += f"; {done.last.tokens / max(done.last.seconds, 1e-9):,.0f} tokens/s"
    if done.missing:
        lines.append(f"{done.missing} of {done.manifest.shards} shards are still to be made")
    noisy = [
        f"{teacher.name} is {teacher.type}" for teacher in done.manifest.teachers if teacher.type not in GOOD_TYPES
    ]
    if noisy:
        lines.append(f"{', '.join(noisy)}: F16 or Q8_0 make better teachers")
    if done.manifest.biased:
        lines.append("top-k targets are biased: --draws gives unbiased ones")
    return "\n".join(lines)
