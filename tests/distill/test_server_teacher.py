"""A server as a teacher: both dialects against the distribution that a stand-in serves, and all that can go wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.distill.collect import collect
from gguforge.distill.collector import Settings
from gguforge.distill.sampling import Reducer
from gguforge.distill.targets import Document, open_targets
from gguforge.distill.teachers import server
from gguforge.distill.teachers.open import TeacherSource
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import EngineError, GGUForgeError, InputError

K = 7


def scores_after(ids: list[int], vocabulary: int) -> np.ndarray:
    """What the stand-in believes: a function of the whole prefix."""
    return np.random.default_rng(ids).standard_normal(vocabulary) * 2


def log_probs(ids: list[int], vocabulary: int) -> np.ndarray:
    scores = scores_after(ids, vocabulary)
    return np.asarray(scores - np.log(np.exp(scores).sum()))


class StandIn(HTTPServer):
    """Answers as vLLM (by id) or as servers that echo (by text); `faults` are given first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.dialect = tokenizer, "ids"
        self.faults: list[tuple[int, bytes]] = []
        self.requests: list[tuple[str, str | None, Any]] = []
        self.change: Callable[[Any], Any] = lambda answer: answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, body: dict[str, Any]) -> Any:
        ids, k, size = body["prompt"], body["logprobs"], self.tokenizer.size
        rows = [log_probs(ids[:i], size) for i in range(1, len(ids))]
        if self.dialect == "ids":
            listed: list[Any] = [None]
            for row, own in zip(rows, ids[1:], strict=True):
                kept = {*np.argsort(-row)[:k].tolist(), own}
                listed.append({str(token): {"logprob": float(row[token]), "rank": 1} for token in kept})
            return {"choices": [{"prompt_logprobs": listed}]}
        name = (lambda t: f"token_id:{t}") if self.dialect == "names" else (lambda t: self.tokenizer.text([t]))
        best = [None, *({name(t): float(row[t]) for t in np.argsort(-row)[:k].tolist()} for row in rows), {"x": -1.0}]
        own = [None, *(float(row[t]) for row, t in zip(rows, ids[1:], strict=True)), -1.0]
        return {"choices": [{"logprobs": {"token_logprobs": own, "top_logprobs": best}}]}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.reply(b'{"data": [{"id": "small"}]}', None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(json.dumps(self.server.change(self.server.answer(body))).encode(), body)

    def reply(self, data: bytes, body: Any) -> None:
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        status, data = self.server.faults.pop(0) if self.server.faults and body else (200, data)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(server, "PAUSE", 0.0)
    with Tokenizer.open(teacher) as tokenizer, StandIn(tokenizer) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def collected(stand_in: StandIn, folder: Path, tokenizer: Path, **options: Any) -> list[Document]:
    text = folder / "text.txt"
    text.write_text("hello user, a list of files")
    source = TeacherSource(stand_in.address, tokenizer=str(tokenizer), **options)
    collect([source], [text], folder / "t", Settings(kind="top-k", size=K, context=32))
    return list(open_targets(folder / "t"))


@pytest.mark.parametrize("dialect", ["ids", "names", "texts"])
def test_rows_are_what_the_server_expects_next(
    stand_in: StandIn, tmp_path: Path, teacher: Path, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.dialect = dialect
    monkeypatch.setenv("SOME_KEY", "sesame")
    (document,) = collected(stand_in, tmp_path, teacher, key_variable="SOME_KEY")
    ids = document.input_ids.tolist()
    for row, position in enumerate(document.positions):
        wanted = log_probs(ids[: position + 1], stand_in.tokenizer.size)
        part = slice(*document.row_ptr[row : row + 2])
        best = np.argsort(-wanted)[:K]
        if dialect == "texts":  # tokens with one text are one to such a server
            text = stand_in.tokenizer.text
            assert {text([t]) for t in document.ids[part]} <= {text([t]) for t in (*best, ids[position + 1])}
        else:
            assert document.ids[part].tolist() == best.tolist()
            np.testing.assert_allclose(document.weights[part], np.exp(wanted[best]), rtol=2e-3)
            np.testing.assert_allclose(document.tail[row], 1 - np.exp(wanted[best]).sum(), rtol=5e-3)
        np.testing.assert_allclose(document.next_log_prob[row], wanted[ids[position + 1]], rtol=1e-3)
    manifest = open_targets(tmp_path / "t").manifest
    assert manifest.biased
    assert np.isnan(document.lse).all()
    assert manifest.teachers[0].name.endswith("/v1#small")
    assert "sesame" not in (tmp_path / "t" / "manifest.json").read_text()
    assert [key for _, key, _ in stand_in.requests] == ["Bearer sesame"] * 2
    assert stand_in.requests[1][2]["prompt"] == ids


def test_what_passes_is_tried_again(stand_in: StandIn, tmp_path: Path, teacher: Path) -> None:
    stand_in.faults = [(503, b"busy"), (429, b"slow down")]
    assert len(collected(stand_in, tmp_path, teacher)) == 1


def choice(**parts: Any) -> Callable[[Any], Any]:
    return lambda answer: {"choices": [parts]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (choice(text="hi"), "no log-probabilities of the prompt"),
        (choice(logprobs=None), "no log-probabilities of the prompt"),
        (choice(prompt_logprobs=[None, {"1": {"logprob": -1}}]), "of fewer tokens than it was sent"),
        (lambda answer: [], "no log-probabilities of the prompt"),
        (choice(prompt_logprobs=[None] + [{"1": {"logprob": 3}}] * 99), "is no log-probability"),
        (choice(prompt_logprobs=[None] + [{"1": {"logprob": True}}] * 99), "is no log-probability"),
        (choice(prompt_logprobs=[None] + [{"99999": {"logprob": -3}}] * 99), "names tokens that the tokenizer"),
    ],
)
def test_answers_that_make_no_sense_are_refused(
    stand_in: StandIn, tmp_path: Path, teacher: Path, change: Callable[[Any], Any], message: str
) -> None:
    stand_in.change = change
    with pytest.raises(EngineError, match=message):
        collected(stand_in, tmp_path, teacher)
    assert list((tmp_path / "t").glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("faults", "message"),
    [([(401, b"who are you")], "answers 401: who are you"), ([(500, b"oh")] * 5, "answers 500: oh"),
     ([(200, b"<html>")], "not JSON")],
)  # fmt: skip
def test_a_server_that_refuses(
    stand_in: StandIn, tmp_path: Path, teacher: Path, faults: list[tuple[int, bytes]], message: str
) -> None:
    stand_in.faults = faults
    with pytest.raises(EngineError, match=message):
        collected(stand_in, tmp_path, teacher)


def test_what_cannot_be_a_server(stand_in: StandIn, tmp_path: Path, teacher: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("hello")

    def refused(source: TeacherSource, message: str, settings: Settings) -> None:
        with pytest.raises(GGUForgeError, match=message):
            collect([source], [text], tmp_path / "t", settings)

    top = Settings(kind="top-k", size=3)
    refused(TeacherSource(stand_in.address), "--tokenizer", top)
    refused(TeacherSource(stand_in.address, tokenizer=str(teacher), key_variable="NO_SUCH_KEY"), "is not set", top)
    refused(TeacherSource(stand_in.address, tokenizer=str(teacher)), "cannot give sampled targets", Settings())
    refused(TeacherSource("http://127.0.0.1:9/v1", tokenizer=str(teacher)), "cannot be reached", top)
    with pytest.raises(InputError, match="no address"), Tokenizer.open(teacher) as tokenizer:
        server.ServerTeacher("ftp://host/v1", tokenizer)


def test_an_interrupt_wakes_up_who_waits(stand_in: StandIn, teacher: Path) -> None:
    with server.ServerTeacher.open(stand_in.address, tokenizer=teacher) as opened:
        stand_in.change = lambda answer: opened.interrupt() or answer
        rows = opened.rows(np.arange(5, dtype=np.int32), np.arange(4), Reducer("top-k", 3, 10), np.empty((4, 0)))
    assert rows is None
