"""Trains the teacher of the model that ships inside gguforge, from nothing, on a CPU:

    python -m gguforge.distill.demo.train --output base/
    python -m gguforge.distill.demo.train --teacher --begin base/ --output teacher/
    python -m gguforge.distill.demo.train --small --begin base/ --output small/

Needs torch (`pip install 'gguforge[train]'`) and nothing else; the results are Hugging Face checkpoints. The model that
ships is the small one, taught by both together: `examples/demo-model.toml`. Matrices are trained with Muon, the rest by
AdamW: see `gguforge.distill.muon`.

The base, four layers, learns in two stages: questions and the beginnings of their answers, then long conversations. On
two cores shared with other work they took 17 and 14 minutes (1,000 and 400 steps of 4,096 tokens) and reached a loss of
0.012 and 0.009. The teacher is the base with a silent copy behind each layer, trained on with dropout, more and more on
the harder wordings, and at last without dropout: 342 steps, 13 minutes of one core. The one behind the model that ships
was stopped and taken up between its stages, in which the first two ended early; they are written down as they were run.
A seed gives the same batches everywhere; weights agree up to the rounding of the machine's kernels.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gguforge.distill.demo.checkpoint import read_safetensors, write_checkpoint
from gguforge.distill.demo.data import LONG, MIXED, MOSTLY_ONE, SHORT, Talk, batches
from gguforge.distill.demo.lessons import Course, read_course
from gguforge.distill.demo.model import Llama, Shape, grown
from gguforge.distill.demo.score import asked
from gguforge.distill.demo.tokenizer import Tokenizer, train_tokenizer
from gguforge.distill.muon import Muon
from gguforge.quant.errors import OutputError

ANSWERS_COUNT = 8  # how often an answer counts when the tokenizer is learned: in the chat, answers are most of the text
RATE = 0.02  # Muon's largest learning rate


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        loss: mean over the last 50 steps, in nats for each answer token.
    """

    model: Llama
    tokenizer: Tokenizer
    talk: Talk
    loss: float


def schedule(step: int, steps: int, final: float) -> float:
    """Factor of the learning rate: a short linear rise, then half a cosine down to `final`."""
    rise = min(1.0, (step + 1) / max(1, steps // 40))
    return rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def tokenizer_texts(course: Course, talk: Talk) -> list[str]:
    """The lines from which the tokenizer is learned."""
    answers = [text for lesson in course.lessons for text in lesson.answers + lesson.more]
    answers += [dialogue.answer for dialogue in course.dialogues]
    return answers * ANSWERS_COUNT + [asked(q) for questions in talk.questions.values() for q in questions]


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Attributes:
        rows, length: of a batch; `length` is also the longest conversation, in tokens.
        turns: see `Talk`.
        rate: factor of the learning rates.
        final: what they fall to, as a share of the largest.
        own: see `Talk`.
        dropout: see `Llama`.
        decay: weight decay.
    """

    steps: int
    rows: int
    length: int
    turns: Sequence[tuple[int, int]]
    rate: float
    final: float = 0.02
    dropout: float = 0.0
    decay: float = 0.01
    own: float = 0.0


STAGES = (
    Stage(steps=1000, rows=16, length=256, turns=SHORT, rate=1.0),  # learns the lessons
    Stage(steps=400, rows=8, length=512, turns=LONG, rate=0.4),  # keeps them apart in a long chat
)

TEACHER = Shape(num_hidden_layers=8)
TEACHER_STAGES = (
    Stage(steps=100, rows=16, length=256, turns=SHORT, rate=0.5, final=0.9, dropout=0.1, decay=0.05),
    Stage(steps=50, rows=8, length=512, turns=MIXED, rate=0.4, final=0.5, dropout=0.1, decay=0.05),
    Stage(steps=90, rows=16, length=256, turns=MOSTLY_ONE, rate=0.3, dropout=0.1, decay=0.05, own=0.6),
    Stage(steps=70, rows=16, length=256, turns=MOSTLY_ONE, rate=0.3, dropout=0.1, decay=0.05, own=0.7),
    Stage(steps=32, rows=16, length=256, turns=MOSTLY_ONE, rate=0.15, own=0.4),
)


def train(output: Path, shape: Shape, stages: Sequence[Stage], seed: int, begin: Path | None = None) -> Trained:
    """Train and write the checkpoint.

    Args:
        begin: a checkpoint of this script to go on from, instead of from nothing; if it has fewer layers, it grows.

    Raises:
        OutputError: the folder holds a checkpoint already.
    """
    if (output / "model.safetensors").exists():
        raise OutputError("the folder already holds a checkpoint", path=output, remedy="Choose another --output.")
    torch.manual_seed(seed)
    course = read_course()
    talk = Talk(course, seed)
    model = Llama(shape)
    if begin is None:
        vocabulary = train_tokenizer(tokenizer_texts(course, talk), shape.vocab_size)
    else:
        vocabulary = (begin / "tokenizer.model").read_bytes()
        stored = read_safetensors(begin / "model.safetensors")
        weights = {name: torch.from_numpy(weights) for name, weights in stored.items()}
        model.load_state_dict(grown(weights, shape.num_hidden_layers))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(course.lessons)} lessons", file=sys.stderr)

    loss = math.nan
    for number, stage in enumerate(stages):
        talk = Talk(course, seed + number, stage.turns, stage.own)
        for recent in run_stage(model, Tokenizer(vocabulary), talk, stage):
            loss = recent
            tensors = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
            write_checkpoint(output, shape.config(), vocabulary, tensors)
    return Trained(model, Tokenizer(vocabulary), talk, loss)


def run_stage(model: Llama, tokenizer: Tokenizer, talk: Talk, stage: Stage) -> Iterator[float]:
    """Train through one stage; yields the mean loss of the last 50 steps, every 50 steps and at the end."""
    model.train().dropout.p = stage.dropout
    muon = Muon(model, RATE * stage.rate, stage.decay)
    start, recent = time.monotonic(), 0.0
    for step, batch in zip(range(stage.steps), batches(talk, tokenizer, stage.rows, stage.length), strict=False):
        for group in muon.param_groups:
            group["lr"] = RATE * stage.rate * schedule(step, stage.steps, stage.final)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(*map(torch.from_numpy, (batch.tokens, batch.visible(), batch.wanted)))
        loss.backward()
        muon.step()
        model.zero_grad()
        recent += (loss.item() - recent) / min(step + 1, 50)
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            spent = time.monotonic() - start
            print(f"step {step + 1}/{stage.steps}  loss {recent:.4f}  {spent:.0f} s", file=sys.stderr, flush=True)
            yield recent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gguforge.distill.demo.train",
        description="Train the demo model's base and teacher.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--begin", type=Path, help="checkpoint of the first stage: do only the second")
    parser.add_argument("--teacher", action="store_true", help="grow the --begin checkpoint into the teacher")
    parser.add_argument("--small", action="store_true", help="train it on like the teacher, but at its own size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if (options.teacher or options.small) and options.begin is None:
        parser.error("--teacher and --small go on from a checkpoint: name it with --begin")
    first = STAGES if options.begin is None else STAGES[1:]
    stages = TEACHER_STAGES if options.teacher or options.small else first
    train(options.output, TEACHER if options.teacher else Shape(), stages, options.seed, options.begin)


if __name__ == "__main__":
    main()
