"""The pipeline from a teacher to files that chat: the stages of one recipe, each resumable, each done once.

    out/chats.jsonl                 what the teacher answered              [generate]
    out/targets/                    what it expects after every token      [collect]
    out/train/                      what `distill train` leaves: checkpoints, the student, its report
    out/student-F16.gguf            the student as it was trained
    out/imatrix.gguf                its importance matrix                  [output] imatrix
    out/finish/                     as train/, of the training on blocks   [finish]
    out/student-Q4_K_M.gguf ...     the files                              [output] types
    out/teacher.gguf                the teacher, where a GGUF file is needed and only its checkpoint was given
    out/report.html, report.json    what every stage did
    out/run.json                    how far it is

Under torchrun the first process does all stages but training, which all do together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gguforge.convert import plan
from gguforge.convert.architectures import find_architecture
from gguforge.convert.json_file import read_object
from gguforge.distill import making
from gguforge.distill.identity import contents, decisive, described
from gguforge.distill.making import Bar
from gguforge.distill.needs import model_memory, training_memory
from gguforge.distill.processes import Group
from gguforge.distill.recipe import Recipe, StudentPart
from gguforge.distill.stages import Facts, Stage
from gguforge.distill.students import architecture
from gguforge.distill.workshop import check_writer, student_config
from gguforge.quant.errors import CheckpointError, InputError
from gguforge.quant.presets import find_preset

REFERENCE = "F16"
"""The type of the unquantized student's file, from which the others are made."""


class Pipeline:
    """A recipe's stages in a folder.

    Args:
        recipe: from `read_recipe`.
        folder: for everything.
        group: the processes.
        bar: shows how far a stage is.

    Attributes:
        writes: whether the student predicts the next token; encoders are measured by embeddings, and do not chat.
        types: of the student's files.
        reference: the unquantized student's file.
    """

    def __init__(self, recipe: Recipe, folder: Path, group: Group, bar: Bar) -> None:
        self.recipe, self.folder, self.group, self.bar = recipe, folder, group, bar
        self.threads = recipe.hardware.threads or None
        self.types, self.reference = types_of(recipe), self.file(REFERENCE)
        self.training, self.finishing = folder / "train", folder / "finish"
        self.chats, self.targets, self.imatrix = folder / "chats.jsonl", folder / "targets", folder / "imatrix.gguf"
        config = student_config(recipe)
        if not config.is_file():
            raise InputError("there is no such file", path=config)
        kind = architecture(read_object(config))
        self.writes = any(word in kind for word in ("CausalLM", "LMHead"))
        self._keys: dict[str, str] = {}

    def file(self, preset: str) -> Path:
        """The student's file of a type."""
        return self.folder / f"{self.recipe.output.name}-{preset}.gguf"

    def stages(self) -> list[Stage]:
        """All of them, in order.

        Raises:
            GGUForgeError: a file that the recipe names is missing or damaged, or the student cannot be converted.
        """
        self._keys = {}
        recipe, found = self.recipe, list[Stage]()
        if self.types:
            check_converts(recipe, self.writes)
        judge = self._judge()
        if judge == self.folder / "teacher.gguf":
            found.append(self._teacher(judge))
        if recipe.generate is not None:
            assert judge is not None
            found.append(self._generate(judge))
        if recipe.collect is not None:
            found.append(self._collect())
        found.append(self._train())
        if self.types:
            found.append(self._convert())
        if self.types and recipe.output.imatrix:
            found.append(self._calibrate())
        if recipe.finish is not None:
            found.append(self._finish())
        found += [self._quantize(preset) for preset in self.types if preset != REFERENCE]
        if self.types and recipe.data.held_out:
            beside = judge if recipe.report.teacher else None
            found += [self._evaluate(preset, beside) for preset in dict.fromkeys((REFERENCE, *self.types))]
        if self.writes:
            check_writer(recipe)
        return found

    def _stage(
        self, name: str, settings: dict[str, Any], after: tuple[str, ...], make: Callable[[], Facts], *outputs: Path,
        **more: Any,
    ) -> Stage:  # fmt: skip
        """A stage that follows those of `after` that there are."""
        behind = {one: self._keys[one] for one in after if one in self._keys}
        stage = Stage(name, settings | {"after": behind}, make, outputs, **more)
        self._keys[name] = stage.key
        return stage

    def _judge(self) -> Path | None:
        """The teacher as a GGUF file, for prompts and for comparison: its own, or one that is to be made."""
        recipe, made = self.recipe, self.folder / "teacher.gguf"
        place = recipe.first_teacher
        measured = bool(self.types) and bool(recipe.data.held_out) and recipe.report.teacher
        if place is None or not (recipe.generate is not None or measured):
            return None
        if not place.is_dir():
            return place
        fault = conversion_fault(place)
        if fault is not None and recipe.generate is not None:
            raise fault
        return made if fault is None else None

    def _teacher(self, output: Path) -> Stage:
        place = self.recipe.first_teacher
        assert place is not None
        make = partial(making.convert_model, place, output, None, "AUTO", self.threads, self.bar)
        return self._stage("teacher", {"checkpoint": contents(place)}, (), make, output)

    def _generate(self, teacher: Path) -> Stage:
        part, place = self.recipe.generate, self.recipe.first_teacher
        assert part is not None
        settings = {"generate": described(replace(part, teacher=place))}
        make = partial(making.generate_chats, part, teacher, self.chats, self.threads, self.bar)
        memory = partial(model_memory, place or teacher)
        return self._stage("generate", settings, (), make, self.chats, costly=True, memory=memory)

    def _collect(self) -> Stage:
        recipe, part = self.recipe, self.recipe.collect
        assert part is not None
        text = [*recipe.data.text, *([self.chats] if recipe.generate is not None else [])]
        named = described(replace(part, api_key_env=None))
        named["teachers"] = named["teachers"] or [contents(self._checkpoint())]
        data = {"text": described(recipe.data.text), "context": recipe.data.context}
        make = partial(making.collect_targets, recipe, part, text, self.targets, self.threads, self.bar)
        settings, places = {"collect": named, "data": data}, part.teachers or (self._checkpoint(),)

        def memory() -> int:
            return sum(map(model_memory, places))

        return self._stage("collect", settings, ("generate",), make, self.targets, costly=True, memory=memory)

    def _checkpoint(self) -> Path:
        found = self.recipe.teacher.checkpoint
        assert found is not None  # the recipe was checked
        return found

    def _train(self) -> Stage:
        recipe, stored = self.recipe, self.recipe.collect is not None
        data = recipe.data
        read = replace(data, text=()) if stored else data
        settings = decisive(replace(recipe, data=read, blocks=None if recipe.finish else recipe.blocks))
        extent = {"seeds": list(recipe.schedule.seeds), "baseline": recipe.report.baseline}
        make = partial(making.train_student, self.training_recipe(), self.training, self.group, self.bar)
        return self._stage(
            "train", settings, ("generate", "collect"), make, self.training, extent=extent, costly=True, shared=True,
            memory=partial(training_memory, self.training_recipe()),
        )  # fmt: skip

    def training_recipe(self) -> Recipe:
        """What `distill train` would follow, once the text and the targets are there."""
        recipe, data = self.recipe, self.recipe.data
        if recipe.collect is not None:
            data = replace(data, text=(), targets=self.targets)
        elif recipe.generate is not None:
            data = replace(data, text=(*data.text, self.chats))
        blocks = None if recipe.finish is not None else recipe.blocks
        return replace(recipe, data=data, blocks=blocks, generate=None, collect=None, finish=None)

    def finishing_recipe(self) -> Recipe:
        """The same for the training on blocks: from the first student, by the same losses on the same text."""
        recipe, part, blocks = self.training_recipe(), self.recipe.finish, self.recipe.blocks
        assert part is not None
        assert blocks is not None
        schedule = replace(
            recipe.schedule, optimizer="adamw", steps=part.steps, rate=part.rate, seeds=recipe.schedule.seeds[:1]
        )
        student = StudentPart(checkpoint=self.training / "checkpoint")
        blocks = replace(blocks, imatrix=self._blocks_imatrix())
        report = replace(recipe.report, baseline=False)
        return replace(recipe, student=student, schedule=schedule, blocks=blocks, report=report)

    def _blocks_imatrix(self) -> Path | None:
        """What guides the blocks that are trained."""
        blocks, recipe = self.recipe.blocks, self.recipe
        assert blocks is not None
        made = self.imatrix if recipe.finish is not None and recipe.output.imatrix and self.types else None
        return blocks.imatrix or made

    def _finish(self) -> Stage:
        settings = {"finish": described(self.recipe.finish), "blocks": described(self.recipe.blocks), **self._seed()}
        make = partial(making.train_student, self.finishing_recipe(), self.finishing, self.group, self.bar)
        memory = partial(training_memory, self.recipe)
        return self._stage(
            "finish", settings, ("train", "calibrate"), make, self.finishing, costly=True, shared=True, memory=memory
        )

    def _seed(self) -> dict[str, Any]:
        """Which of the students that were trained is the student."""
        return {"seed": self.recipe.schedule.seeds[0]}

    def _convert(self) -> Stage:
        name = self.recipe.output.name
        source = self.training / "checkpoint"
        make = partial(making.convert_model, source, self.reference, name, REFERENCE, self.threads, self.bar)
        return self._stage("convert", {"name": name, **self._seed()}, ("train",), make, self.reference)

    def _text(self) -> Path | None:
        """The calibration text."""
        text = self.recipe.output.calibration or next(iter(self.recipe.data.text), None)
        return text or (self.chats if self.recipe.generate is not None else None)

    def _text_settings(self) -> dict[str, Any]:
        text = self._text()
        named = None if text is None or text == self.chats else contents(text)
        return {"calibration": named, "calibration_chunks": self.recipe.output.calibration_chunks}

    def _calibrate(self) -> Stage:
        text, chunks = self._text(), self.recipe.output.calibration_chunks
        assert text is not None  # the recipe was checked
        make = partial(making.make_imatrix, self.reference, text, self.imatrix, chunks, self.threads, self.bar)
        return self._stage("calibrate", self._text_settings(), ("generate", "convert"), make, self.imatrix)

    def _quantize(self, preset: str) -> Stage:
        recipe, output, part = self.recipe, self.file(preset), self.recipe.output
        name = f"quantize {preset}"
        if recipe.blocks is not None and find_preset(recipe.blocks.preset).name == preset:
            folder = self.training if recipe.finish is None else self.finishing
            make = partial(
                making.ship_blocks, folder / "model.gguf", self.reference, preset, output, self._blocks_imatrix(),
                self.threads, self.bar,
            )  # fmt: skip
            return self._stage(name, {"preset": preset, "blocks": True}, ("convert", "finish"), make, output)
        guide, text = self.imatrix if part.imatrix else None, self._text() if part.quality in making.TUNED else None
        make = partial(
            making.quantize_file, self.reference, preset, output, part, guide, text, self.threads, self.bar
        )  # fmt: skip
        settings = {"preset": preset, "quality": part.quality} | (self._text_settings() if text is not None else {})
        return self._stage(name, settings, ("convert", "calibrate"), make, output)

    def _evaluate(self, preset: str, judge: Path | None) -> Stage:
        data = self.recipe.data
        against = {} if preset == REFERENCE else {REFERENCE: self.reference}
        settings = {
            "data": described({"held_out": data.held_out, "context": data.context, "chunks": data.held_out_documents}),
        }  # fmt: skip
        if judge is not None:
            against["teacher"] = judge
            settings["teacher"] = contents(self.recipe.first_teacher or judge)

        def make() -> Facts:
            if not self.writes:
                return making.embed_file(
                    self.file(preset), data.held_out, against, data.context, data.held_out_documents, self.threads,
                    self.bar,
                )  # fmt: skip
            text = making.merged_text(data.held_out, self.folder)
            return making.evaluate_file(
                self.file(preset), text, against, data.context, data.held_out_documents, self.threads, self.bar
            )

        return self._stage(f"evaluate {preset}", settings, (f"quantize {preset}", "convert"), make)


def types_of(recipe: Recipe) -> tuple[str, ...]:
    """The presets of the student's files; that of its blocks is always among them."""
    wanted, blocks = recipe.output.types, recipe.blocks
    own = () if blocks is None else (blocks.preset,)
    if wanted is None:
        wanted = own or ("Q4_K_M",)
    return tuple(dict.fromkeys(find_preset(name).name for name in (*wanted, *(own if wanted else ()))))


@lru_cache(maxsize=8)
def conversion_fault(checkpoint: Path) -> CheckpointError | None:
    """Why a checkpoint cannot become a GGUF file, from its headers; None if it can."""
    try:
        plan(checkpoint, warn=lambda line: None)
    except CheckpointError as error:
        return error
    return None


def architecture_fault(config: Path) -> CheckpointError | None:
    """Why models of a config.json cannot become GGUF files; None if they can."""
    try:
        find_architecture(read_object(config), config)
    except CheckpointError as error:
        return error
    return None


def check_converts(recipe: Recipe, writes: bool) -> None:
    """Make sure, before any work, that the student can become the files that are wanted.

    Args:
        writes: whether it predicts the next token.

    Raises:
        InputError: it cannot.
    """
    part, teacher, remedy = recipe.student, recipe.teacher.checkpoint, "Or end with its checkpoint: output.types = []"
    if part.config is not None:
        fault = architecture_fault(part.config)
    else:
        folder = part.checkpoint or teacher
        assert folder is not None  # the recipe was checked
        fault = conversion_fault(folder)
    if fault is not None:
        raise InputError(f"the student cannot become a GGUF file: {fault}", remedy=remedy) from fault
    if not writes and (recipe.output.imatrix or recipe.output.quality in making.TUNED):
        raise InputError("output.imatrix and output.quality are for students that predict the next token")
