"""A conversation in a JSON file: `{"format": "gguforge-chat", "version": 1, "model": ..., "messages": [...]}`.

Messages look as in OpenAI's chat API (role, content, reasoning_content); an answer that was stopped has "cut": true.
Only text is kept: a file from anywhere can be loaded, and its text is as untrusted as anything typed.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguforge.quant.errors import InputError, OutputError
from gguforge.runtime.prompt import Message

FORMAT = "gguforge-chat"
MAX_BYTES = 64 << 20


def write_transcript(
    path: str | os.PathLike[str], messages: Sequence[Message], cut: Sequence[bool], *, model: str
) -> None:
    """Write a conversation; an older one is replaced, any other file is not.

    Args:
        messages: system (or not), then user and assistant by turns.
        cut: for each answer, whether it was stopped.

    Raises:
        OutputError: the path is a file that is no conversation.
        OSError: it cannot be written.
    """
    target = Path(path)
    if target.exists() and not _is_transcript(target):
        raise OutputError("exists and is not a saved conversation", path=target, remedy="Choose another name.")
    flags = iter(cut)
    entries = [_entry(message, message.role == "assistant" and next(flags)) for message in messages]
    document = {"format": FORMAT, "version": 1, "model": model, "messages": entries}
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _entry(message: Message, cut: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thoughts:
        entry["reasoning_content"] = message.thoughts
    if cut:
        entry["cut"] = True
    return entry


def _is_transcript(path: Path) -> bool:
    try:
        read_transcript(path)
    except InputError:
        return False
    return True


def read_transcript(path: str | os.PathLike[str]) -> tuple[list[Message], list[bool]]:
    """Messages of a saved conversation, and for each answer whether it was stopped.

    Raises:
        InputError: the file is no conversation: system (or not), then whole turns of user and assistant.
        OSError: it cannot be read.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError("is not a file" if source.exists() else "no such file", path=source)
    if source.stat().st_size > MAX_BYTES:
        raise InputError("is too large for a conversation", path=source, expected=f"at most {MAX_BYTES} bytes")
    try:
        document = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError("is not a saved conversation (no valid JSON)", path=source) from error
    entries = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(entries, list) or document.get("format") != FORMAT or document.get("version") != 1:
        raise InputError(f'is not a saved conversation (no "format": "{FORMAT}", version 1)', path=source)
    messages = [_message(entry, source) for entry in entries]
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise InputError("is not a saved conversation (user and assistant do not take turns)", path=source)
    return messages, [entry.get("cut") is True for entry in entries if entry["role"] == "assistant"]


def _message(entry: object, path: Path) -> Message:
    if isinstance(entry, dict):
        role, content, thoughts = entry.get("role"), entry.get("content"), entry.get("reasoning_content", "")
        if isinstance(role, str) and isinstance(content, str) and isinstance(thoughts, str):
            return Message(role, content, thoughts)
    raise InputError("is not a saved conversation (a message lacks its role or content)", path=path)
