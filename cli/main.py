"""The `gguforge` command: finds the subcommand, runs it, and turns every failure into one line and an exit code.

Exit codes: 0 done, 1 the input or the world is at fault, 2 usage, 130 interrupted. No command module is imported
before its command runs, so `gguforge --help` stays quick. Each command lives in a file of its own in this folder.
"""

from __future__ import annotations

import errno
import gc
import io
import sys
from collections.abc import Sequence

import click

from gguforge.cli.lazy import LazyGroup
from gguforge.quant.errors import GGUForgeError, printable
from gguforge.runtime.interrupt import exit_on_signals

GARBAGE = 50_000  # objects; Python's 700 make it look for cycles 100 times while modules are imported, and find none

COMMANDS = {
    "convert": "Turn a Hugging Face checkpoint into a GGUF file of any type, in one pass.",
    "quantize": "Turn a GGUF file into a smaller one, byte for byte as llama-quantize does.",
    "calibrate": "Read text through a model into an importance matrix, as llama-imatrix does.",
    "evaluate": "Measure a model: perplexity, and divergence from a reference, as llama-perplexity does.",
    "compare": "Compare files of one model: size against divergence, as a table and as a page with plots.",
    "verify": "Check a model file against its receipt, and against what it was made from.",
    "inspect": "Show what is inside a GGUF file: metadata, tensors, types, chat template.",
    "distill": "Make a small model from a large one: soft targets, training.",
    "chat": "Talk to a GGUF model in the terminal.",
    "demo": "Run the whole pipeline on the small model that ships inside.",
}
"""Every command with its one-line help; the module of the same name defines a click command called `command`."""


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(
        f"gguforge {version('gguforge')} (llama-cpp-python {version('llama-cpp-python')}, numpy {version('numpy')})"
    )
    ctx.exit()


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    modules="gguforge.cli.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, help="Show the traceback when something fails.")
def cli(debug: bool) -> None:
    """A Hugging Face checkpoint in, a file that chats on a laptop CPU out."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; `--debug` anywhere lets tracebacks through."""
    gc.set_threshold(GARBAGE)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words[: words.index("--")] if "--" in words else "--debug" in words
    if debug:
        words = ["--debug", *(word for word in words if word != "--debug")]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows few letters gets escapes for the others
            stream.reconfigure(errors="backslashreplace")
    try:
        with exit_on_signals():
            code = cli.main(args=words, prog_name="gguforge", standalone_mode=False)
    except BaseException as error:
        if debug and not isinstance(error, SystemExit | click.exceptions.Exit):
            raise
        code = report(error)
        for note in getattr(error.__cause__ if isinstance(error, click.Abort) else error, "__notes__", ()):
            click.echo(printable(note), err=True)
    sys.exit(code if isinstance(code, int) else 0)


def report(error: BaseException) -> int:
    """Print one line for any failure and return the exit code it stands for; what is our own bug is raised again."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 0
        case click.exceptions.Exit():
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            click.echo("interrupted", err=True)
            return 130
        case click.ClickException():
            error.show()
            return error.exit_code
        case GGUForgeError():
            _complain(str(error))
        case BrokenPipeError():
            sys.stderr.close()  # the reader has left (`| head`): nothing more to say, and no noise at exit
        case MemoryError():
            _complain("out of memory. Close other programs or choose fewer --workers.")
        case OSError():
            _complain(describe_os_error(error))
        case _:
            raise error
    return 1


def describe_os_error(error: OSError) -> str:
    """One line for what the operating system refused, with the remedy for the common cases."""
    where = f"{error.filename}: " if error.filename else ""
    remedies = {
        errno.ENOSPC: ". Free some space or write to another disk.",
        errno.EACCES: ". Check the permissions of the file and its folder.",
        errno.EROFS: ". Write to another folder.",
        errno.EFBIG: ". The filesystem or this process allows no file of that size.",
        errno.EDQUOT: ". Your quota on this disk is used up.",
    }
    return printable(f"{where}{(error.strerror or str(error)).lower()}{remedies.get(error.errno or 0, '')}")


def _complain(line: str) -> None:
    click.echo(click.style("error: ", fg="red", bold=True) + line, err=True)


if __name__ == "__main__":
    main()
