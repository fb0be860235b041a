"""The chat in a terminal: reads lines, runs commands, prints answers as they come.

Answers go to stdout, everything else to stderr. What a model writes cannot control the terminal: escape sequences,
control characters and bidirectional overrides are dropped. Escape sequences: ECMA-48; bidi: Unicode UAX #9.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Generator
from typing import TextIO

from gguforge.quant.errors import GGUForgeError
from gguforge.runtime.chat import ChatSession
from gguforge.runtime.interrupt import TERMINATED, Flags, deferred_signals

FENCE = '"""'
_MAX_SEQUENCE = 256  # a longer "escape sequence" is text after all
_DROPPED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
_STRING_INTRODUCERS = "P]X^_"  # after ESC: DCS, OSC, SOS, PM, APC run up to a terminator
_C1 = {
    "\x90": "P",
    "\x98": "X",
    "\x9b": "[",
    "\x9d": "]",
    "\x9e": "^",
    "\x9f": "_",
}  # the same in one character
_INTRODUCER = re.compile(f"[\x1b{''.join(_C1)}]")


class TerminalFilter:
    """Drops from a stream of text whatever would act on a terminal; a sequence may be split over pieces.

    Example:
        >>> f = TerminalFilter()
        >>> f("a\\x1b[3"), f("1mred\\x1b]0;title\\x07!\\r\\n")
        ('a', 'red!\\n')
    """

    def __init__(self) -> None:
        self._inside = False
        self._sequence = ""  # what was swallowed since ESC, ESC itself not counted

    def __call__(self, text: str) -> str:
        """The harmless part of the next piece of text."""
        if self._inside or _INTRODUCER.search(text):
            text = "".join([character for character in text if not self._swallow(character)])
        return _DROPPED.sub("", text)

    def _swallow(self, character: str) -> bool:
        """Whether the character belongs to an escape sequence."""
        if character == "\x1b" or character in _C1:
            self._inside, self._sequence = True, _C1.get(character, "")
            return True
        if not self._inside:
            return False
        if character == "\n" or len(self._sequence) >= _MAX_SEQUENCE:
            self._inside = False
            return False
        self._sequence += character
        self._inside = not _is_complete(self._sequence)
        return True


def _is_complete(sequence: str) -> bool:
    """Whether an escape sequence (without its ESC) has come to its end."""
    if sequence[0] == "[":
        return len(sequence) > 1 and "@" <= sequence[-1] <= "~"
    if sequence[0] in _STRING_INTRODUCERS:
        return sequence[-1] in "\x07\x9c"
    return not " " <= sequence[-1] <= "/"  # intermediate bytes, then one final


class LineReader:
    """Reads messages of one or more lines.

    A line that begins with three double quotes opens a message that ends with three; a backslash at the end of a line
    continues it. Where the platform has readline, lines are edited and the history is kept while the program runs.
    """

    def __init__(self, source: TextIO, screen: TextIO, remarks: TextIO) -> None:
        self._source, self._screen, self._remarks = source, screen, remarks
        self._console = source.isatty() and source is sys.stdin
        if self._console:
            with contextlib.suppress(ImportError):  # Windows has none; its console edits lines itself
                import readline  # noqa: F401  (importing it is what turns it on)

    def read(self, prompt: str) -> str:
        """One message.

        Raises:
            EOFError: the input is at its end.
            KeyboardInterrupt: Ctrl-C.
        """
        line = self._line(prompt)
        if line.lstrip().startswith(FENCE):
            return self._fenced(line.lstrip()[len(FENCE) :])
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._line("... ")
        return line

    def _fenced(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(self._line("... "))
        lines[-1] = lines[-1].rstrip()[: -len(FENCE)]
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if self._console and self._screen.isatty():
            return input(prompt)  # readline has to know the prompt to edit behind it
        self._remarks.write(prompt)
        self._remarks.flush()
        if self._console:
            return input()
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class Leave(Exception):
    """Ends the chat with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Chat:
    """The interactive chat over a session; see `run_chat`."""

    def __init__(self, session: ChatSession, source: TextIO, screen: TextIO, remarks: TextIO) -> None:
        self._session = session
        self._screen, self._remarks = screen, remarks
        self._reader = LineReader(source, screen, remarks)
        self._leaving = False  # Ctrl-C was pressed and nothing entered since

    def run(self) -> int:
        """Read and answer until the user leaves; the exit code."""
        while True:
            try:
                text = self._reader.read("> ")
                self._leaving = False
                self._handle(text)
            except EOFError:
                self.remark("")
                return 0
            except Leave as leave:
                return leave.code
            except KeyboardInterrupt:
                self.remark("")
                if self._leaving:
                    return 130
                self._leaving = True
                self.remark("Ctrl-C again leaves; so does /exit.")
            except GGUForgeError as error:
                self.remark(f"error: {error}")
            except BrokenPipeError:
                raise
            except OSError as error:
                self.remark(f"error: {error.filename or ''}: {error.strerror or error}")

    def remark(self, line: str) -> None:
        """A line for the user that is no answer."""
        self._remarks.write(line + "\n")
        self._remarks.flush()

    def _handle(self, text: str) -> None:
        if not text.strip():
            return
        if not text.startswith("/"):
            self._answer(lambda: self._session.ask(text))
            return
        name, _, rest = text.strip().partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            known = " ".join(COMMANDS)
            self.remark(
                f"No such command: {name}. There are {known}. To begin a message with /, put a blank before it."
            )
            return
        command[1](self, rest.strip())

    def _answer(self, ask: Callable[[], Generator[str, None, None]]) -> None:
        flags = print_answer(self._session, ask, self._screen)
        stop = self._session.stats.stop
        if flags.terminated:
            raise Leave(TERMINATED)
        if stop == "interrupted":
            self._leaving = True
            kept = "The part so far is kept." if self._session.stats.generated_tokens else "Nothing was said yet."
            self.remark(f"[stopped] {kept} Ctrl-C again leaves.")
        elif stop == "length":
            self.remark(f"[cut after {self._session.stats.generated_tokens} tokens, as --max-tokens says]")
        elif stop == "context":
            self.remark(f"[cut: the context of {self._session.engine.context} tokens is full; --context gives more]")

    def help(self, _: str) -> None:
        """/help"""
        for name, (says, _command) in COMMANDS.items():
            self.remark(f"  {name:9} {says}")
        self.remark('  """       begins and ends a message of several lines; \\ at the end of a line continues it')
        self.remark("  Ctrl-C    stops the answer; at the prompt, twice leaves")

    def clear(self, _: str) -> None:
        """/clear"""
        self._session.clear()
        self.remark("The conversation is forgotten.")

    def system(self, text: str) -> None:
        """/system [TEXT]"""
        if text:
            self._session.system = "" if text == "none" else text
        self.remark(f"System message: {self._session.system or '(none)'}")

    def undo(self, _: str) -> None:
        """/undo"""
        text = self._session.undo()
        shown = TerminalFilter()(text or "").splitlines()
        self.remark(
            f"Taken back: {shown[0] if shown else ''}" if text is not None else "There is nothing to take back."
        )

    def retry(self, _: str) -> None:
        """/retry"""
        if self._session.turns:
            self._answer(self._session.retry)
        else:
            self.remark("There is nothing to retry.")

    def save(self, path: str) -> None:
        """/save FILE"""
        if not path:
            self.remark("Say where: /save FILE")
            return
        self._session.save(path)
        self.remark(f"Saved {len(self._session.turns)} turns to {path}")

    def load(self, path: str) -> None:
        """/load FILE"""
        if not path:
            self.remark("Say which: /load FILE")
            return
        self._session.load(path)
        self.remark(f"Loaded {len(self._session.turns)} turns from {path}")

    def stats(self, _: str) -> None:
        """/stats"""
        for line in describe_stats(self._session):
            self.remark(line)

    def exit(self, _: str) -> None:
        """/exit"""
        raise Leave(0)


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None]]] = {
    "/help": ("shows this", Chat.help),
    "/clear": ("forgets the conversation, keeps the system message", Chat.clear),
    "/system": ("TEXT sets the system message, none removes it, alone shows it", Chat.system),
    "/undo": ("takes the last question and its answer back", Chat.undo),
    "/retry": ("answers the last question again", Chat.retry),
    "/save": ("FILE writes the conversation as JSON", Chat.save),
    "/load": ("FILE goes on with a saved conversation", Chat.load),
    "/stats": ("shows tokens, speed and settings", Chat.stats),
    "/exit": ("leaves; so does Ctrl-D", Chat.exit),
}
"""Each command with what it does."""


def run_chat(
    session: ChatSession,
    *,
    source: TextIO | None = None,
    screen: TextIO | None = None,
    remarks: TextIO | None = None,
) -> int:
    """Open the interactive chat and return the exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        session: an open session.
        source, screen, remarks: stdin, stdout and stderr unless given.
    """
    chat = Chat(session, source or sys.stdin, screen or sys.stdout, remarks or sys.stderr)
    make_lenient(sys.stdout, sys.stderr)
    session.notice = chat.remark
    if not session.has_template:
        chat.remark("This model has no chat template: it continues your text.")
    chat.remark("Type a message, or /help.")
    return chat.run()


def print_answer(session: ChatSession, ask: Callable[[], Generator[str, None, None]], screen: TextIO) -> Flags:
    """Print an answer as it comes; Ctrl-C and SIGTERM stop it and are reported, not raised.

    Args:
        ask: starts the answer, as `lambda: session.ask(text)`.
    """
    clean, last = TerminalFilter(), "\n"
    pieces = ask()
    with deferred_signals(session.engine.interrupt) as flags, contextlib.closing(pieces):
        for piece in pieces:
            text = clean(piece)
            screen.write(text)
            screen.flush()
            last = text or last
    if not last.endswith("\n"):
        screen.write("\n")
        screen.flush()
    return flags


def describe_stats(session: ChatSession) -> list[str]:
    """The figures of the last answer and of the session, and the settings, in lines."""
    last, all_of_them, sampling = session.stats, session.totals, session.sampling
    settings = [
        f"temperature {sampling.temperature:g}",
        f"top-k {sampling.top_k}",
        f"top-p {sampling.top_p:g}",
    ]
    settings += [
        f"min-p {sampling.min_p:g}",
        f"repeat penalty {sampling.repeat_penalty:g}",
        f"seed {sampling.seed}",
    ]
    lines = []
    if last.prompt_tokens:
        kept = last.prompt_tokens - last.evaluated_tokens
        lines += [
            f"prompt      {last.prompt_tokens} tokens ({kept} kept, {last.evaluated_tokens} evaluated),"
            f" first token after {last.first_token_seconds:.2f} s (TTFT)",
            f"answer      {last.generated_tokens} tokens, {last.tokens_per_second:.1f} tok/s",
        ]
    context = session.engine.context
    lines += [
        f"in all      {all_of_them.evaluated_tokens} tokens evaluated, {all_of_them.generated_tokens} generated,"
        f" {all_of_them.tokens_per_second:.1f} tok/s",
        f"context     {session.engine.tokens_held} of {context} tokens in use",
        f"sampling    {', '.join(settings)}",
    ]
    return lines


def make_lenient(*streams: TextIO) -> None:
    """Let streams show a substitute for characters that their encoding lacks, instead of failing in mid-answer."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
