"""Stages one behind the other, each done once: what is finished stays, what a change touches is made again.

A folder's `run.json` keeps of every stage what decides its result, whether it is finished, how long it took and what it
found. Stages that take long are never thrown away unasked.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gguforge.convert.json_file import read_object
from gguforge.distill.identity import digest
from gguforge.distill.processes import Group
from gguforge.quant.errors import GGUForgeError, InputError, OutputError
from gguforge.quant.files import lock, replacing

STATE, LOCK = "run.json", "run.lock"
FORMAT = "gguforge run 1"
END = "end"  # the word after the last stage
HASH = re.compile('"[0-9a-f]{64}"')

Facts = dict[str, Any]
Standing = Literal["new", "begun", "done", "changed"]


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: what it is called.
        settings: all that decides its result, as JSON takes it; keys of the stages before it among them.
        make: does the work, going on with what a stopped run left, and tells what it found; `line` is for people.
        outputs: files and folders that are there when it is done, and go when it is to be made again.
        extent: how far it goes; more of the same is added to what is there.
        costly: whether what is there may be thrown away only if the user says so.
        shared: whether all processes do it together; the others wait meanwhile.
        memory: tells the bytes that a process will need, before any work; None where they are few.
    """

    name: str
    settings: Any
    make: Callable[[], Facts]
    outputs: tuple[Path, ...]
    extent: Any = None
    costly: bool = False
    shared: bool = False
    memory: Callable[[], int] | None = None

    @cached_property
    def key(self) -> str:
        """A hash of what decides its result."""
        return digest(self.settings)


@dataclass(frozen=True)
class Record:
    """What is known of a stage that was begun.

    Attributes:
        settings, extent: of the stage when it was begun.
        done: whether it was finished.
        seconds: that its last run took.
        facts: what it found.
    """

    settings: Any
    extent: Any = None
    done: bool = False
    seconds: float = 0.0
    facts: Facts = field(default_factory=dict)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block, no other run works in the folder, which must be there.

    Raises:
        OutputError: one does.
    """
    with (folder / LOCK).open("ab") as file:
        try:
            lock(file.fileno())
        except BlockingIOError:
            raise OutputError("another run is working in this folder", path=folder, remedy="Wait for it.") from None
        yield


class State:
    """What a folder's `run.json` says.

    Raises:
        OutputError: the folder holds something else.
        InputError: the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.records = folder / STATE, dict[str, Record]()
        if not self.path.exists():
            if folder.exists() and (not folder.is_dir() or any(one.name != LOCK for one in folder.iterdir())):
                raise OutputError("holds something else", path=folder, remedy="Choose a new folder.")
            return
        found = read_object(self.path)
        try:
            if found["format"] != FORMAT:
                raise ValueError(found["format"])
            self.records = {name: Record(**record) for name, record in found["stages"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError("is no state of a run that this version reads", path=self.path) from None

    def standing(self, stage: Stage) -> Standing:
        """How far a stage is: not begun, begun, done, or begun with other settings."""
        record = self.records.get(stage.name)
        if record is None:
            return "new"
        if record.settings != stage.settings:
            return "changed"
        there = all(path.exists() for path in stage.outputs)
        return "done" if record.done and record.extent == stage.extent and there else "begun"

    def write(self, stage: Stage, done: bool, seconds: float = 0.0, facts: Facts | None = None) -> None:
        """Remember how far a stage is."""
        self.records[stage.name] = Record(stage.settings, stage.extent, done, round(seconds, 3), facts or {})
        records = {name: asdict(record) for name, record in self.records.items()}
        data = json.dumps({"format": FORMAT, "stages": records}, indent=1).encode()
        with replacing(self.path, len(data), overwrite=True) as part:
            part.write_bytes(data)


Tell = Callable[[str, Record, bool], None]
"""Told of every stage that is done: its name, what is known of it, and whether it had been done before."""


def run_stages(stages: Sequence[Stage], state: State | None, group: Group, tell: Tell, *, redo: bool = False) -> None:
    """Do what is not done yet.

    Args:
        stages: in their order.
        state: of the folder; None in other processes than the first, which do what it says.
        group: the processes.
        tell: called in the first process alone.
        redo: throw away costly stages that the recipe would make otherwise now.

    Raises:
        GGUForgeError: a stage failed (its name stands before the reason), or may not be thrown away.
    """
    if state is None:
        for stage in stages:
            if stage.shared and group.hear(stage.name) == "go":
                stage.make()
        group.hear(END)
        return
    if not redo:
        refuse_to_lose(stages, state)
    for stage in stages:
        standing = state.standing(stage)
        if stage.shared:
            group.say(stage.name, "skip" if standing == "done" else "go")
        if standing != "done":
            _make(stage, state, standing)
        tell(stage.name, state.records[stage.name], standing == "done")
    group.say(END, "")


def _make(stage: Stage, state: State, standing: Standing) -> None:
    if standing == "new" and (there := next((path for path in stage.outputs if path.exists()), None)):
        raise OutputError(f"stage {stage.name}: this is in the way", path=there, remedy="Move it away.")
    if standing == "changed":
        for path in stage.outputs:
            _remove(path)
    state.write(stage, done=False)
    started = time.perf_counter()
    try:
        facts = stage.make()
    except GGUForgeError as error:
        named = GGUForgeError(f"stage {stage.name}: {error}")
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        raise named from error
    except OSError as error:
        error.add_note(f"This was in stage {stage.name}; the same command goes on from there.")
        raise
    gc.collect()  # models hold on to themselves, and the next stage needs the memory
    state.write(stage, True, time.perf_counter() - started, facts)


def _remove(path: Path) -> None:
    """A stage's output, and what a stopped run left beside it."""
    for one in (path, path.with_name(path.name + ".partial"), path.with_name(f"{path.stem}.partial{path.suffix}")):
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)


def refuse_to_lose(stages: Sequence[Stage], state: State) -> None:
    """Make sure that no costly stage is made otherwise now than what is there.

    Raises:
        OutputError: one is; it says what changed.
    """
    lost = [stage for stage in stages if stage.costly and state.standing(stage) == "changed"]
    if lost:
        changes = differences(state.records[lost[0].name].settings, lost[0].settings)
        names = ", ".join(stage.name for stage in lost)
        raise OutputError(
            f"stage {lost[0].name}: the recipe or its files changed: {'; '.join(changes)}", path=state.path.parent,
            remedy=f"Pass --redo to throw away what is there of {names}, or choose another folder.",
        )  # fmt: skip


def differences(old: Any, new: Any) -> list[str]:
    """What changed, by its place in the recipe.

    >>> differences({"schedule": {"steps": 1, "rate": 2}}, {"schedule": {"steps": 3, "rate": 2}})
    ['schedule.steps was 1, is 3']
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [_difference(name, before.get(name), after.get(name)) for name in changed]


def _difference(name: str, old: Any, new: Any) -> str:
    before, after = json.dumps(old), json.dumps(new)
    return f"{name} is another" if HASH.search(before + after) else f"{name} was {before}, is {after}"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
