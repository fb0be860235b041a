"""The terminal: what reaches it, how lines are read, and the whole chat behind a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from gguforge.runtime.chat import ChatSession
from gguforge.runtime.engine import Engine
from gguforge.runtime.sampling import GREEDY
from gguforge.runtime.terminal import COMMANDS, LineReader, TerminalFilter, run_chat

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix terminal")
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 🙂\tx\n", "plain é 日本 🙂\tx\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq#0\x1b\\a", "a"),
        ("\x9b31mred\x9d0;t\x9cz", "redz"),
        ("\x1bcreset", "reset"),
        ("\x1b(0a", "a"),
        ("a\rb\x08c\x00d\x7fe\r\n", "abcde\n"),
        ("\x1b]52;c;" + "A" * 1000 + "end", "A" * (1000 - 250) + "end"),  # never finished: it is text after all
        ("\x1b]0;open\nnext", "\nnext"),
        ("\x1b", ""),
        ("\x1b\x1b[2Jx", "x"),
        ("a\u202eb\u2066c", "abc"),
        ("a\U000e0041b", "ab"),
    ],
)
def test_filter(text: str, shown: str) -> None:
    assert TerminalFilter()(text) == shown
    one_by_one = TerminalFilter()
    assert "".join(map(one_by_one, text)) == shown


@given(st.lists(st.text(alphabet="\x1b[]0;1mP\\\x07\x9b\x9d\x9c\r\n\x08ab\u202e日")))
def test_filter_lets_nothing_through_however_it_is_cut(pieces: list[str]) -> None:
    clean, whole = TerminalFilter(), TerminalFilter()
    shown = "".join(map(clean, pieces))
    assert not BAD.search(shown)
    assert shown == whole("".join(pieces))


def read_all(text: str) -> list[str]:
    reader, messages = LineReader(io.StringIO(text), io.StringIO(), io.StringIO()), []
    while True:
        try:
            messages.append(reader.read("> "))
        except EOFError:
            return messages


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\ntwo\\\nthree\n", ["one\ntwo\nthree"]),
        ('"""\none\n\n  two\n"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""one\ntwo"""\n', ["one\ntwo"]),
        ('"""one line"""\n', ["one line"]),
        ('"""\n\\\n/help\n"""\n', ["\\\n/help"]),
        ('"""never closed\n', []),
        ("", []),
    ],
)
def test_messages_of_several_lines(typed: str, messages: list[str]) -> None:
    assert read_all(typed) == messages


def chat(engine: Engine, typed: str, **options: object) -> tuple[int, str, str]:
    screen, remarks = io.StringIO(), io.StringIO()
    with ChatSession(engine, sampling=GREEDY, **options) as session:  # type: ignore[arg-type]
        code = run_chat(session, source=io.StringIO(typed), screen=screen, remarks=remarks)
    return code, screen.getvalue(), remarks.getvalue()


def test_answers_and_remarks_go_their_own_ways(tiny: Engine) -> None:
    code, screen, remarks = chat(tiny, "hello\n\n/help\nmore\n/exit\nnever\n")
    assert (code, screen) == (0, "Gguf files hold a model.\n" * 2)
    assert all(name in remarks for name in COMMANDS)
    assert "Gguf" not in remarks


def test_commands(tiny: Engine, tmp_path: Path) -> None:
    talk = tmp_path / "a talk.json"
    typed = (
        f"/undo\n/retry\nhello\n/retry\n/stats\n/system Be brief.\n/system\n/save {talk}\n/save\n/clear\n/undo\n"
        f"/load {talk}\n/load\n/undo\n/system none\n/nonsense\n/load {tmp_path}/missing.json\n /exit is a word\n"
    )
    code, screen, remarks = chat(tiny, typed)
    assert code == 0
    assert screen.count("Gguf files hold a model.\n") == 3
    for expected in (
        "nothing to take back", "nothing to retry", "TTFT", "tok/s", "seed 0", "System message: Be brief.",
        "Saved 1 turns", "Say where", "forgotten", "Loaded 1 turns", "Say which", "Taken back: hello",
        "System message: (none)", "No such command: /nonsense", "missing.json: no such file",
    ):  # fmt: skip
        assert expected in remarks, expected


def test_cuts_are_told(tiny: Engine, endless_path: Path) -> None:
    assert "[cut after 2 tokens, as --max-tokens says]" in chat(tiny, "hello\n", max_tokens=2)[2]
    with Engine.open(endless_path, context=256, threads=1) as engine:
        assert "[cut: the context of 256 tokens is full" in chat(engine, "hello\n")[2]


def test_a_model_without_a_template_is_announced(tmp_path: Path) -> None:
    with Engine.open(write_tiny_model(tmp_path / "m.gguf", template=None)) as engine:
        _, screen, remarks = chat(engine, "hello \\\n\n", max_tokens=3)
    assert "no chat template" in remarks
    assert screen == " Gguf files hold\n"


def test_escape_sequences_of_the_model_do_not_reach_the_screen(tmp_path: Path) -> None:
    answer = ["▁red", "<0x1B>", "[", "3", "1", "m", "!", "<0x07>", "<0xC2>", "<0x9B>", "2", "J", "?"]
    with Engine.open(write_tiny_model(tmp_path / "m.gguf", answer=answer)) as engine:
        _, screen, _ = chat(engine, "hello\n")
        assert screen == "red!?\n"
        with ChatSession(engine, sampling=GREEDY) as session:
            assert "\x1b[31m" in "".join(session.ask("hello"))  # the text itself is told as it is


class Terminal:
    """The command behind a pseudo-terminal that is its controlling one; reads until something expected comes."""

    ATTACH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, *arguments: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        words = [sys.executable, "-m", "gguforge.cli", "chat", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.ATTACH, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.seen = ""

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern has come; what came up to its end is taken away and returned."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert self._wait(end), f"no {pattern!r} in {self.seen!r}"
            self.seen += self._read()
        taken, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return taken

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until the pattern comes.

        Between showing a prompt and waiting for keys there is a moment in which CPython's readline module misses one.
        """
        for _ in range(30):
            self.type("\x03")
            end = time.monotonic() + 2
            while self._wait(end):
                self.seen += self._read()
                if re.search(pattern, self.seen):
                    self.expect(pattern)
                    return
        raise AssertionError(f"no {pattern!r} in {self.seen!r}")

    def _wait(self, end: float) -> bool:
        """Whether there is something to read before that time."""
        return bool(select.select([self.master], [], [], max(0, end - time.monotonic()))[0])

    def _read(self) -> str:
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux: the other side is closed
            data = b""
        assert data, f"closed after {self.seen!r}"
        return data.decode("utf-8", "replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leave(self, again: Callable[[], object]) -> int:
        """The exit code, after doing it `again` and again until the program has gone (see `interrupt`)."""
        for _ in range(30):
            again()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(2)
        raise AssertionError(f"still there after {self.seen!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tiny_path: Path) -> Iterator[Terminal]:
    opened = Terminal(str(tiny_path), "--threads", "1")
    yield opened
    opened.close()


@pytest.fixture
def endless_terminal(endless_path: Path) -> Iterator[Terminal]:
    opened = Terminal(str(endless_path), "--threads", "1", "--context", "131072")
    yield opened
    opened.close()


@unix
def test_a_chat_in_a_terminal(terminal: Terminal) -> None:
    terminal.expect(r"tiny\.gguf · llama 98\.2K F32 · 0\.4 MB · context 512 · 1 thread\b")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect(r"Gguf files hold a model\.\r\n> ")
    terminal.type('"""\none\n')
    terminal.expect(r"\.\.\. ")
    terminal.type('two"""\n')
    terminal.expect(r"Gguf files hold a model\.\r\n> ")
    terminal.type("/stats\n")
    terminal.expect("TTFT")
    terminal.expect("> ")
    assert terminal.leave(lambda: terminal.type("\x04")) == 0


@unix
def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(endless_terminal: Terminal) -> None:
    endless_terminal.expect("> ")
    endless_terminal.type("hello\n")
    endless_terminal.expect("Gguf files hold")
    endless_terminal.interrupt(r"\[stopped\] The part so far is kept\. Ctrl-C again leaves\.")
    endless_terminal.expect("> ")
    endless_terminal.type("/stats\n")  # the session is alive
    endless_terminal.expect("TTFT")
    endless_terminal.expect("> ")
    endless_terminal.interrupt(r"Ctrl-C again leaves; so does /exit\.")
    endless_terminal.expect("> ")
    assert endless_terminal.leave(lambda: endless_terminal.type("\x03")) == 130


@unix
def test_ctrl_c_right_after_a_stopped_answer_leaves(endless_terminal: Terminal) -> None:
    endless_terminal.expect("> ")
    endless_terminal.type("hello\n")
    endless_terminal.expect("Gguf files hold")
    endless_terminal.interrupt("Ctrl-C again leaves")
    endless_terminal.expect("> ")
    assert endless_terminal.leave(lambda: endless_terminal.type("\x03")) == 130
    assert "so does /exit" not in endless_terminal.seen


@unix
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm(endless_terminal: Terminal, busy: bool) -> None:
    endless_terminal.expect("> ")
    if busy:
        endless_terminal.type("hello\n")
        endless_terminal.expect("Gguf files hold")
    assert endless_terminal.leave(endless_terminal.process.terminate) == 143
    assert "Traceback" not in endless_terminal.seen
