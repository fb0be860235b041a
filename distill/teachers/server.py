"""A server with an OpenAI-like interface as a teacher: it must give log-probabilities of the prompt's own tokens.

Two dialects of POST /completions are understood: `prompt_logprobs` (vLLM: by token id) and `echo` with `logprobs` (by
the token's text, which is looked up in the vocabulary). Only the most probable tokens come, so such targets are biased.
What the server's weights are, nobody can tell from here: it is known by its model's name.
Interface: https://platform.openai.com/docs/api-reference/completions; vLLM, docs/serving/openai_compatible_server.md.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.sampling import Doubles, Reducer, log_of_rest
from gguforge.distill.shards import Ids, Kind, Rows
from gguforge.distill.targets import TeacherRecord
from gguforge.distill.teachers.base import Teacher
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import EngineError, InputError, printable

TIMEOUT = 600.0  # seconds for one document
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
MAX_ANSWER_BYTES = 1 << 28
_TOKEN_ID = "token_id:"  # how vLLM spells a token when it is asked for its id


class ServerTeacher(Teacher):
    """One model of a server.

    Args:
        address: of the interface, such as http://127.0.0.1:8000/v1; the model's name may follow a `#`.
        key: sent as a bearer token; None for none.

    Raises:
        InputError: the address makes no sense.
        EngineError: the server cannot be reached or has no model.
    """

    kinds: tuple[Kind, ...] = ("top-k",)

    def __init__(self, address: str, tokenizer: Tokenizer, key: str | None = None) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise InputError("is no address of a server", path=address, expected="such as http://127.0.0.1:8000/v1")
        self._parts, self._path = parts, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._interrupted = False
        self._connection: http.client.HTTPConnection | None = None
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.size
        self._ids: dict[str, int] = {}
        for token in reversed(range(tokenizer.size)):  # of several with one text, the first
            self._ids[tokenizer.text([token])] = token
        self._model = parts.fragment or self._first_model()
        name = f"{parts.netloc}{self._path}#{self._model}"
        digest = hashlib.sha256(self._model.encode()).hexdigest()
        self.record = TeacherRecord(printable(name), "unknown", f"{parts.scheme} server", digest, 1.0)

    @classmethod
    def open(cls, address: str, *, tokenizer: str | os.PathLike[str] | None, key_variable: str | None = None) -> Self:
        """Reach a server.

        Args:
            tokenizer: a GGUF file or a checkpoint's folder with the model's tokenizer.
            key_variable: the environment variable that holds the server's key.

        Raises:
            InputError: there is no tokenizer, or the variable is not set.
            EngineError: the server cannot be reached.
        """
        if tokenizer is None:
            raise InputError(
                "a server does not say how it cuts text", path=address,
                remedy="Give its model's tokenizer, a GGUF file or a checkpoint's folder, with --tokenizer.",
            )  # fmt: skip
        key = os.environ.get(key_variable) if key_variable else None
        if key_variable and not key:
            raise InputError(f"the environment variable {key_variable} is not set")
        return cls(address, Tokenizer.open(tokenizer), key)

    def rows(self, input_ids: Ids, positions: NDArray[np.int64], reduce: Reducer, at: Doubles) -> Rows | None:
        ids = input_ids.tolist()
        body = {
            "model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True,
            "logprobs": reduce.size, "prompt_logprobs": reduce.size, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = self._ask("POST", "/completions", body)
        if answer is None:
            return None
        tables = self._tables(answer, ids)
        return _rows([tables[position + 1] for position in positions], input_ids[positions + 1], reduce.size)

    def _tables(self, answer: Any, ids: Sequence[int]) -> list[dict[int, float]]:
        """Log-probabilities by token id, of every token of the prompt given those before it."""
        try:
            choice = answer["choices"][0]
            told = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
            if told:
                tables = [{int(token): _log(entry["logprob"]) for token, entry in (row or {}).items()} for row in told]
            else:
                own, best = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
                tables = [{self._id(token): _log(value) for token, value in (row or {}).items()} for row in best]
                for table, token, value in zip(tables, ids, own, strict=False):
                    table[token] = table.get(token, -math.inf) if value is None else _log(value)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._failure(f"gives no log-probabilities of the prompt ({type(error).__name__}: {error})") from None
        if len(tables) < len(ids) or not all(tables[1 : len(ids)]):
            raise self._failure("gives log-probabilities of fewer tokens than it was sent")
        for table in tables:
            table.pop(-1, None)
            if any(not 0 <= token < self.vocabulary for token in table):
                raise self._failure("names tokens that the tokenizer does not have")
        return tables

    def _id(self, text: str) -> int:
        """A token by its text; -1 for one that the vocabulary does not know, which then belongs to the tail."""
        if text.startswith(_TOKEN_ID):
            return int(text.removeprefix(_TOKEN_ID))
        return self._ids.get(text, -1)

    def _first_model(self) -> str:
        answer = self._ask("GET", "/models", None)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._failure("lists no model") from None

    def _ask(self, method: str, path: str, body: Any) -> Any:
        """The server's answer; None after `interrupt`. What may pass (no connection, 429, 5xx) is tried again."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            if self._interrupted:
                return None
            try:
                status, data = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                reason = f"cannot be reached: {error}"
                continue
            if status == 200:
                try:
                    return json.loads(data)
                except (ValueError, RecursionError):
                    raise self._failure("answers with something that is not JSON") from None
            reason = f"answers {status}: {data[:200].decode('utf-8', 'replace')}"
            if status != 429 and status < 500:
                break
        if self._interrupted:
            return None
        raise self._failure(reason)

    def _send(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        self._connection = connection = kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT)
        try:
            connection.request(method, self._path + path, json.dumps(body) if body else None, self._headers)
            answer = connection.getresponse()
            data = answer.read(MAX_ANSWER_BYTES + 1)
            if len(data) > MAX_ANSWER_BYTES:
                raise self._failure("answers with more than 256 MiB")
            return answer.status, data
        finally:
            self._connection = None
            connection.close()

    def _failure(self, what: str) -> EngineError:
        place = f"{self._parts.scheme}://{self._parts.netloc}{self._path}"
        return EngineError(what, path=place, remedy="It must be a /completions interface with log-probabilities.")

    def interrupt(self) -> None:
        self._interrupted = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes up who waits for the answer

    def close(self) -> None:
        self.tokenizer.close()


def _log(value: Any) -> float:
    """A log-probability; servers may be off by a rounding above 0.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise ValueError(f"{value!r} is no log-probability")
    return min(0.0, float(value))


def _rows(tables: Sequence[dict[int, float]], next_ids: Ids, k: int) -> Rows:
    """Rows of the k most probable tokens of each table, and the mass of the others."""
    best = [sorted(table.items(), key=lambda item: (-item[1], item[0]))[:k] for table in tables]
    logs = np.array([value for row in best for _, value in row], np.float32)
    lengths = np.array([len(row) for row in best], np.int64)
    kept = np.add.reduceat(np.exp(logs.astype(np.float64)), np.cumsum(lengths) - lengths)
    own = [table.get(token, math.nan) for table, token in zip(tables, next_ids.tolist(), strict=True)]
    none = np.empty(0, np.int32)
    return Rows(
        lengths, np.array([token for row in best for token, _ in row], np.int32), none, logs.astype(np.float16),
        log_of_rest(kept), np.array(own, np.float32), np.full(len(own), np.nan, np.float32),
    )  # fmt: skip
