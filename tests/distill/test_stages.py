"""Stages: each is done once, what a change touches is done again, and nothing costly is thrown away unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguforge.distill.processes import Group
from gguforge.distill.stages import Facts, Record, Stage, State, differences, run_stages
from gguforge.quant.errors import GGUForgeError, InputError, OutputError

ALONE = Group(0, 1, None)


class Line:
    """Three stages: the first costs much and can be extended, each writes the settings into its file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, list[str]()
        self.settings: dict[str, Any] = {"a": {"rate": 1}, "b": {"type": "Q8_0"}, "c": {}}
        self.extent = [0]
        self.fail: dict[str, BaseException] = {}

    def stages(self) -> list[Stage]:
        found: list[Stage] = []
        for name in "abc":
            after = {stage.name: stage.key for stage in found}
            more = {"extent": self.extent, "costly": True, "shared": True} if name == "a" else {}
            settings = self.settings[name] | {"after": after}
            found.append(Stage(name, settings, self.maker(name), (self.folder / name,), **more))  # type: ignore[arg-type]
        return found

    def maker(self, name: str) -> Callable[[], Facts]:
        def make() -> Facts:
            self.made.append(name)
            (self.folder / name).write_text(json.dumps(self.settings[name]))
            if name in self.fail:
                raise self.fail.pop(name)
            return {"line": f"made {name}"}

        return make

    def run(self, redo: bool = False) -> tuple[str, list[tuple[str, bool]]]:
        """What was made, and what was told."""
        told: list[tuple[str, bool]] = []

        def tell(name: str, record: Record, kept: bool) -> None:
            assert record.facts["line"] == f"made {name}"
            told.append((name, kept))

        self.made.clear()
        state = State(self.folder)
        self.folder.mkdir(exist_ok=True)
        run_stages(self.stages(), state, ALONE, tell, redo=redo)
        return "".join(self.made), told


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path / "out")


def test_what_is_done_is_not_done_again(line: Line) -> None:
    assert line.run() == ("abc", [("a", False), ("b", False), ("c", False)])
    assert line.run() == ("", [("a", True), ("b", True), ("c", True)])


def test_a_change_touches_what_follows_and_nothing_before(line: Line) -> None:
    line.run()
    line.settings["b"]["type"] = "Q4_0"
    assert line.run()[0] == "bc"
    assert json.loads((line.folder / "b").read_text()) == {"type": "Q4_0"}


def test_what_is_costly_is_refused_with_what_changed_and_made_again_on_request(line: Line) -> None:
    line.run()
    line.settings["a"]["rate"] = 2
    with pytest.raises(OutputError, match=r"stage a: .* changed: rate was 1, is 2\. Pass --redo .* of a, or"):
        line.run()
    assert json.loads((line.folder / "a").read_text()) == {"rate": 1}
    assert line.run(redo=True)[0] == "abc"


def test_more_of_the_same_is_added(line: Line) -> None:
    line.run()
    line.extent = [0, 1]
    assert line.run()[0] == "a"


def test_a_file_that_is_gone_is_made_again(line: Line) -> None:
    line.run()
    (line.folder / "c").unlink()
    assert line.run()[0] == "c"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_stage_that_was_stopped_goes_on_with_what_it_left(line: Line, error: BaseException) -> None:
    line.fail["b"] = error
    with pytest.raises(type(error)):
        line.run()
    assert State(line.folder).standing(line.stages()[1]) == "begun"
    assert line.run()[0] == "bc"


def test_an_error_names_its_stage(line: Line) -> None:
    line.fail["b"] = InputError("is damaged", path="m.gguf", remedy="Make it anew.")
    with pytest.raises(GGUForgeError) as caught:
        line.run()
    assert str(caught.value) == "stage b: m.gguf: is damaged. Make it anew."


def test_files_of_others_are_not_replaced(line: Line) -> None:
    line.folder.mkdir()
    (line.folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        line.run()
    (line.folder / "notes.txt").unlink()
    line.fail["a"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        line.run()
    (line.folder / "b").write_text("mine")
    with pytest.raises(OutputError, match="stage b: this is in the way"):
        line.run()
    assert (line.folder / "b").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x", "stages": {}}', '{"format": "gguforge run 1"}'])
def test_a_damaged_state_is_one_line(line: Line, text: str) -> None:
    line.run()
    (line.folder / "run.json").write_text(text)
    with pytest.raises(GGUForgeError):
        line.run()
    assert (line.folder / "a").exists()


class Store(dict[str, bytes]):
    """What torch's store does, in one process."""

    def set(self, name: str, word: str) -> None:
        self[name] = word.encode()

    def check(self, names: list[str]) -> bool:
        return all(name in self for name in names)


def test_other_processes_do_the_shared_stages_that_the_first_one_does(line: Line) -> None:
    for made in ("a", ""):
        store = Store()
        state = State(line.folder)
        line.folder.mkdir(exist_ok=True)
        run_stages(line.stages(), state, Group(0, 2, None, store), lambda *told: None)
        line.made.clear()
        run_stages(line.stages(), None, Group(1, 2, None, store), lambda *told: None)
        assert "".join(line.made) == made


def test_differences_are_told_by_their_place() -> None:
    old = {"data": {"text": ["a" * 64], "context": 32}, "blocks": None}
    new = {"data": {"text": ["b" * 64], "context": 32}, "blocks": {"preset": "Q4_0"}}
    assert differences(old, new) == ["data.text is another", 'blocks.preset was null, is "Q4_0"']
