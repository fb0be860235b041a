"""A recipe: one TOML file that says what to train, from what, by which losses, and how. Its schema is closed.

Every table below is a dataclass, every key a field of it; a key that is none, or a value of another type, is refused
with one line. Paths are relative to the recipe's folder. What is left out takes the default written here.

    [data]
    targets = "targets/"          # soft targets that `gguforge distill collect` made; or text = [...] and a teacher
    held_out = ["held-out.txt"]

    [student]
    checkpoint = "small/"         # or config = "config.json", or layers = 6 to cut it from the teacher

    [losses]
    sampled_kl = 0.9
    cross_entropy = 0.1

    [schedule]
    steps = 1000

    [blocks]                      # train on the blocks of a preset, and write them
    preset = "Q4_K_M"
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from gguforge.distill.run_tables import CollectPart, FinishPart, GeneratePart, OutputPart
from gguforge.distill.schema import read_table
from gguforge.quant.errors import InputError


@dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        targets: a folder of soft targets, for training from stored distributions.
        text: text files (plain or .jsonl), for training with a teacher in memory or without one.
        held_out: text files that are only measured on.
        context: tokens of a document cut from text; soft targets bring their own.
        held_out_documents: how many are measured at most.
    """

    targets: Path | None = None
    text: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    context: int = 512
    held_out_documents: int = 64


@dataclass(frozen=True)
class TeacherPart:
    """The teacher in memory: for online losses, for cutting the student from it, and for the report.

    Attributes:
        checkpoint: a Hugging Face checkpoint.
    """

    checkpoint: Path | None = None


@dataclass(frozen=True)
class StudentPart:
    """Where the student comes from: exactly one of `checkpoint`, `config`, and cutting from the teacher.

    Attributes:
        checkpoint: an existing checkpoint.
        config: a config.json, whose model starts from random weights.
        tokenizer: the folder with its tokenizer's files; by default the teacher's or the checkpoint's.
        layers: cut from the teacher: so many layers, evenly spaced, or the ones that are named.
        hidden_size, intermediate_size: ... and so many channels, those that are most active on the text.
    """

    checkpoint: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    layers: int | tuple[int, ...] | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class Losses:
    """The weight of each loss; 0 leaves it out. See `gguforge.distill.losses`.

    Attributes:
        sampled_kl: from stored targets, drawn or top-k with their tail.
        cross_entropy: with the tokens that really came.
        forward_kl, reverse_kl, jensen_shannon, skew_kl, reverse_skew_kl: with a teacher in memory.
        hidden_mse, hidden_cosine: of the last layers' states; both models have one width.
        relation: of how the last layers' states relate positions to each other.
        attention_relation: the same of the last layers' queries, keys and values, each by itself.
        embedding_cosine: of each text's embedding to the teacher's; both models have one width.
        embedding_relation: of how alike the embeddings of a batch's texts are to each other; any widths.
        teacher_layer: whose queries, keys and values are the teacher's, counted from 1; 0 for the last.
        temperature: of the losses with a teacher in memory; stored targets have their own.
        beta, skew: of jensen_shannon; of both skew losses.
        relation_heads: slices of the states that relations are made of.
    """

    sampled_kl: float = 0.0
    cross_entropy: float = 0.0
    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    jensen_shannon: float = 0.0
    skew_kl: float = 0.0
    reverse_skew_kl: float = 0.0
    hidden_mse: float = 0.0
    hidden_cosine: float = 0.0
    relation: float = 0.0
    attention_relation: float = 0.0
    embedding_cosine: float = 0.0
    embedding_relation: float = 0.0
    teacher_layer: int = 0
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    relation_heads: int = 8

    def weights(self) -> dict[str, float]:
        """The losses that count, with their weights."""
        settings = ("teacher_layer", "temperature", "beta", "skew", "relation_heads")
        return {name: value for name, value in asdict(self).items() if name not in settings and value}

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them needs the teacher in memory."""
        return any(name not in ("sampled_kl", "cross_entropy") for name in self.weights())


DIVERGENCES = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "reverse_skew_kl"]


@dataclass(frozen=True)
class OnPolicyPart:
    """Training on what the student itself writes, scored by the teacher: see `gguforge.distill.on_policy`.

    Attributes:
        share: of the batches that are the student's own text; the others are of the data.
        loss: the divergence from the teacher on that text, with the settings of [losses].
        prompt: tokens of a plain text's document that the student continues; of a conversation, all before an answer.
        tokens: most tokens that it writes.
        temperature: of its draws.
        refresh: steps for which it writes at once, with the weights of the first of them.
    """

    share: float = 0.5
    loss: DIVERGENCES = "reverse_kl"
    prompt: int = 32
    tokens: int = 64
    temperature: float = 1.0
    refresh: int = 1


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        batch: documents that one process reads at once.
        accumulate: batches that make one step.
        optimizer: Muon trains the matrices inside the model, and AdamW the rest (see `gguforge.distill.muon`).
        rate: the largest learning rate: of AdamW, or of Muon.
        warmup: share of the steps in which it rises; then it falls along half a cosine.
        final: what it falls to, as a share of `rate`.
        weight_decay: of matrices.
        clip: longest gradient.
        seeds: of the order of documents and of random weights: one run for each; the first gives the student.
        evaluate: steps between two measurements on the held-out text.
        patience: measurements without a better one after which training stops; 0 for never.
        save: steps between two checkpoints.
    """

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-3
    warmup: float = 0.03
    final: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seeds: tuple[int, ...] = (0,)
    evaluate: int = 100
    patience: int = 0
    save: int = 100


@dataclass(frozen=True)
class Hardware:
    """Where.

    Attributes:
        device: "auto" takes a GPU if there is one.
        precision: of the forward pass; weights and sums stay float32.
        threads: of the CPU; 0 for torch's choice.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = 0


@dataclass(frozen=True)
class BlocksPart:
    """Training on the blocks that ship.

    Attributes:
        preset: the mix of block types, as `gguforge quantize` knows them.
        refresh: steps between two searches for scales.
        scales_only: freeze the levels and train the scales.
        imatrix: an importance matrix, which guides every search for scales.
    """

    preset: str
    refresh: int = 50
    scales_only: bool = False
    imatrix: Path | None = None


@dataclass(frozen=True)
class ReportPart:
    """What the report measures.

    Attributes:
        baseline: train the same student on the same text by cross-entropy alone, and compare.
        teacher: convert the teacher, and measure the student's files against it (`gguforge distill run`).
    """

    baseline: bool = True
    teacher: bool = True


@dataclass(frozen=True)
class Recipe:
    """A whole recipe."""

    student: StudentPart
    losses: Losses
    data: Data = field(default_factory=Data)
    teacher: TeacherPart = field(default_factory=TeacherPart)
    schedule: Schedule = field(default_factory=Schedule)
    hardware: Hardware = field(default_factory=Hardware)
    on_policy: OnPolicyPart | None = None
    blocks: BlocksPart | None = None
    report: ReportPart = field(default_factory=ReportPart)
    generate: GeneratePart | None = None
    collect: CollectPart | None = None
    finish: FinishPart | None = None
    output: OutputPart = field(default_factory=OutputPart)

    @property
    def stages(self) -> list[str]:
        """The tables that change what is trained on or how, and that only `gguforge distill run` follows."""
        return [name for name in ("generate", "collect", "finish") if getattr(self, name) is not None]

    @property
    def first_teacher(self) -> Path | None:
        """The teacher that answers prompts and that files are measured against; servers do neither."""
        if self.generate is not None and self.generate.teacher is not None:
            return self.generate.teacher
        named = self.collect.teachers if self.collect is not None else ()
        return next((Path(place) for place in named if "://" not in place), self.teacher.checkpoint)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned from a teacher in memory."""
        return self.losses.needs_teacher or self.on_policy is not None


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: it is no TOML, has an unknown key or a value that cannot be used, or lacks what its losses need.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"is no TOML: {error}", path=path) from None
    from gguforge.distill.recipe_checks import check

    recipe: Recipe = read_table(Recipe, table, "", path)
    check(recipe, path)
    return recipe
