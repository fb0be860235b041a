"""The tables of a recipe that only `gguforge distill run` reads: what is made before training, and what after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gguforge.distill.schema import Place


@dataclass(frozen=True)
class GeneratePart:
    """Text by the teacher: it answers prompts, and the answers are read as text is.

    Attributes:
        prompts: a .jsonl file (see `gguforge.distill.generate`).
        teacher: a GGUF file or a checkpoint's folder; by default the first of [collect], else that of [teacher].
        answers: to each prompt.
        max_tokens: of an answer; what is longer is thrown away.
        min_characters: of an answer; what is shorter is thrown away.
        temperature: how freely tokens are drawn; by default what the teacher's file recommends.
        seed: of the answers.
        context: tokens of prompt and answer.
    """

    prompts: Path
    teacher: Path | None = None
    answers: int = 1
    max_tokens: int = 512
    min_characters: int = 1
    temperature: float | None = None
    seed: int = 0
    context: int = 2048


@dataclass(frozen=True)
class CollectPart:
    """Soft targets of the text, made before training.

    Attributes:
        teachers: GGUF files, checkpoints' folders or a server's address; by default the checkpoint of [teacher].
        weights: each one's share of the mixture; by default equal.
        draws: tokens drawn from the distribution after each token.
        independent: draw each by itself, not spread evenly over the distribution.
        top_k: keep the most probable tokens instead.
        full: keep every token's probability instead.
        temperature: the teacher's scores are divided by it.
        seed: of the draws.
        shard_bytes: text of a shard: what a killed run loses at most.
        tokenizer: of a server's model: a GGUF file or a checkpoint's folder.
        api_key_env: the environment variable that holds a server's key.
    """

    teachers: tuple[Place, ...] = ()
    weights: tuple[float, ...] = ()
    draws: int = 50
    independent: bool = False
    top_k: int | None = None
    full: bool = False
    temperature: float = 1.0
    seed: int = 0
    shard_bytes: int | None = None
    tokenizer: Path | None = None
    api_key_env: str | None = None


@dataclass(frozen=True)
class FinishPart:
    """A second training, on the blocks of [blocks], from where the first one ended; the rest is as in [schedule].

    Attributes:
        steps: optimizer steps.
        rate: the largest learning rate.
    """

    steps: int = 200
    rate: float = 1e-4


@dataclass(frozen=True)
class OutputPart:
    """The files that are made of the student.

    Attributes:
        name: what files and model are called.
        types: presets, one file each; by default that of [blocks], or Q4_K_M. None at all is an empty list.
        quality: of quantized weights (see `gguforge quantize --quality`).
        imatrix: make an importance matrix from the calibration text; it guides the files and the blocks of [finish].
        calibration: a text for it and for quality; by default the first one that is trained on.
        calibration_chunks: how many of its chunks of 512 tokens are read at most.
    """

    name: str = "student"
    types: tuple[str, ...] | None = None
    quality: Literal["exact", "lossless", "high", "best"] = "exact"
    imatrix: bool = False
    calibration: Path | None = None
    calibration_chunks: int = 64
