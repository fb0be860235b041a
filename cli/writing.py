"""What every command that writes a model shares: its options, and the writing."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import Command, gathered, progress_bar, quiet_option
from gguforge.cli.output import Output
from gguforge.quant.errors import printable

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan
    from gguforge.quant.provenance import Measurement
    from gguforge.quant.writer import Written


@dataclass(frozen=True)
class Writing:
    """The options of every command that executes a plan.

    Attributes:
        output: the file to write, None for the command's choice; parts of a split model are named after it.
        overwrite: replace it if it exists.
        split_size, split_tensors: when a file of a split model is full; None for one file.
        workers: processes, None for the writer's choice.
        dry_run: write nothing, tell what it would take.
        cache: folder of encoded weights to use and to fill; None for none.
        cache_size: bytes that it may take.
        receipt: write a receipt beside the output; None where weights are encoded.
        as_json: print the result as JSON.
        quiet: print nothing but errors and what was asked for.
        begun: when the command began, on the clock of `time.perf_counter`.
    """

    output: str | None
    overwrite: bool
    split_size: str | None
    split_tensors: int | None
    workers: int | None
    dry_run: bool
    cache: str | None
    cache_size: str
    receipt: bool | None
    as_json: bool
    quiet: bool
    begun: float = field(default_factory=time.perf_counter, init=False)

    @property
    def splits(self) -> bool:
        """Whether the user wants the output split."""
        return self.split_size is not None or self.split_tensors is not None

    def divide(self, plan: Plan, by_converter: bool = False) -> Sequence[Plan]:
        """The plans of the files that the user wants."""
        from gguforge.quant.splits import Limits, divide, parse_size

        size = None if self.split_size is None else parse_size(self.split_size)
        return divide(plan, Limits(size, self.split_tensors, by_converter))

    def stamped(self, plan: Plan, measured: Measurement | None = None) -> Plan:
        """The plan with the facts of its making in its metadata, unless its file is to be llama.cpp's byte for byte."""
        from gguforge.quant.provenance import essentials
        from gguforge.quant.receipt import sources_of, tool_name

        told = settings(click.get_current_context())
        if not told.keys() & NOT_LLAMA_CPP:
            return plan
        facts = essentials(tool_name(), told, sources_of(plan), measured)
        return replace(plan, metadata={**plan.metadata, **facts})

    def execute(
        self, plans: Sequence[Plan], default_output: str, label: str, facts: Mapping[str, Any], explain: bool = False
    ) -> Path | None:
        """Write a model's files, or with `--dry-run` none, and print what was or would be done.

        Args:
            plans: the files.
            default_output: the file, where the user names none.
            label: the type's name.
            facts: what the command itself adds to the JSON.
            explain: tell for each tensor the rule that chose its type.

        Returns:
            The file, of several the first; None for `--dry-run`.
        """
        from gguforge.quant.splits import named

        output = Output(label, named(plans, self.output or default_output))
        result = {**output.summary(), **facts}
        if self.as_json and explain:
            result["rules"] = [{"tensor": t.name, "type": t.type.name, "rule": t.reason} for t in output.whole.tensors]
        if self.dry_run:
            result |= output.needs(self.workers)
        if self.dry_run and not self.as_json:
            output.print_dry_run(self.workers)
        if explain and not self.as_json:
            output.print_explanation()
        cached = ""
        if not self.dry_run:
            written = self._write(output)
            result["seconds"] = round(time.perf_counter() - self.begun, 3)
            if self.cache is not None:
                result["cached_tensors"] = sum(file.cached for file in written)
                encoded = result["cached_tensors"] + sum(file.encoded for file in written)
                cached = f", {result['cached_tensors']} of {encoded} tensors from the cache"
        if not self.quiet:
            output.print_fallbacks()
        if self.as_json:
            click.echo(json.dumps(result))
        elif not self.dry_run and not self.quiet:
            click.echo(f"{output.name}: {output.size_in_words}, {result['seconds']:.1f} s{cached}")
        return None if self.dry_run else output.files[0][0]

    def _write(self, output: Output) -> list[Written]:
        from gguforge.quant.cache import Cache
        from gguforge.quant.receipt import check_place
        from gguforge.quant.splits import parse_size
        from gguforge.quant.writer import write_all

        cache = None if self.cache is None else Cache(Path(self.cache), parse_size(self.cache_size))
        if self.receipt is not False:
            for path, _ in output.files:
                check_place(path)
        with progress_bar(output.size, output.label, self.quiet) as progress:
            written = write_all(
                output.files,
                workers=self.workers,
                overwrite=self.overwrite,
                progress=progress,
                say=self._remark,
                cache=cache,
                hashed=self.receipt or None,
            )
        self._write_receipts(output, written)
        return written

    def _write_receipts(self, output: Output, written: Sequence[Written]) -> None:
        """Write a receipt beside each file, or see that no old one stands beside a new file."""
        from gguforge.quant.receipt import make_receipt, remove_receipt, write_receipt

        context = click.get_current_context()
        for (path, plan), file in zip(output.files, written, strict=True):
            if file.digest and self.receipt is not False:
                receipt = make_receipt(plan, file, context.command.name or "", settings(context))
                write_receipt(receipt, path)
            else:
                remove_receipt(path)

    def _remark(self, line: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        from tqdm import tqdm

        if not self.quiet:
            tqdm.write(printable(line), file=sys.stderr)


NOT_LLAMA_CPP = frozenset({"quality", "rules", "target_size", "target_bpw", "fit"})
"""Options with which a file is no longer what llama.cpp's tools write."""

NO_SETTINGS = frozenset(one.name for one in fields(Writing)) | {"explain"}
"""Options that do not change what is written (or are in the receipt anyway, as how a model is split)."""


def settings(context: click.Context) -> dict[str, Any]:
    """The options that make the output what it is, where they are not the default; paths without their folders."""
    from gguforge.quant.provenance import named_hash

    found: dict[str, Any] = {}
    for option in context.command.params:
        name, value = option.name or "", context.params.get(option.name or "")
        if name in NO_SETTINGS or not isinstance(option, click.Option) or value in (None, (), False):
            continue
        if value == option.get_default(context):
            continue
        if isinstance(option.type, click.Path) and isinstance(value, str):
            found[name] = named_hash(value)
        elif name == "rules":
            found[name] = rules_hash(value)
        else:
            found[name] = value
    return found


def rules_hash(name: str) -> dict[str, str]:
    """Name and hash of a rule table, built in or a file."""
    from gguforge.quant.provenance import named_hash
    from gguforge.quant.rule_files import BUILT_IN, rules_text

    if name in BUILT_IN:
        return {"name": name, "sha256": hashlib.sha256(rules_text(name).encode()).hexdigest()}
    return named_hash(name)


def writing_options(command: Command) -> Command:
    """The options of every command that executes a plan; they reach it as the argument `writing`."""
    return gathered(
        Writing,
        "writing",
        click.option("-o", "--output", type=click.Path(), help="The file to write."),
        click.option("--overwrite", is_flag=True, help="Replace the output if it exists."),
        click.option(
            "--split-max-size",
            "split_size",
            metavar="SIZE",
            help="Split the output into files x-00001-of-00003.gguf of at most so many bytes of tensors: 2G, 500M.",
        ),
        click.option(
            "--split-max-tensors",
            "split_tensors",
            type=click.IntRange(1),
            help="Split the output into files with at most so many tensors.",
        ),
        click.option(
            "--workers",
            "--threads",
            "workers",
            type=click.IntRange(1, 256),
            help="Processes to use.  [default: all, or two for mere copies]",
        ),
        click.option("--dry-run", is_flag=True, help="Print size, memory and disk needed, at once, and write nothing."),
        click.option(
            "--cache",
            type=click.Path(),
            metavar="DIR",
            help="Keep encoded weights in this folder, and use what an earlier run has left there.",
        ),
        click.option(
            "--cache-size",
            default="20G",
            show_default=True,
            metavar="SIZE",
            help="What --cache may take; beyond it, what has not been used for longest goes.",
        ),
        click.option(
            "--receipt/--no-receipt",
            default=None,
            help="Write hashes beside the output, as OUTPUT.json.  [default: where weights are encoded]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        quiet_option,
    )(command)
