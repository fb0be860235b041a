"""What the stages of a run do, each from its inputs to its files; what they found comes back as JSON takes it.

Everything here calls what the commands of the same names call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from gguforge.convert import plan as plan_checkpoint
from gguforge.distill.footprint import Footprint
from gguforge.distill.processes import Group
from gguforge.distill.recipe import Recipe
from gguforge.distill.run_tables import CollectPart, GeneratePart, OutputPart
from gguforge.distill.stages import Facts
from gguforge.distill.students import load
from gguforge.quant.errors import InputError
from gguforge.quant.imatrix import read_imatrix
from gguforge.quant.lossless import lossless_plan
from gguforge.quant.metadata import string
from gguforge.quant.plan import Plan
from gguforge.quant.quality import QUALITY_KEY
from gguforge.quant.quantize import Guide, plan_of_file, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write

MIB = 1 << 20
TUNED = ("high", "best")  # levels of quality for which a text is read

Bar = Callable[[str, int, int, str], None]
"""Shows how far something is: its name, what is done, the whole, a remark."""


def convert_model(checkpoint: Path, output: Path, name: str | None, type: str, threads: int | None, bar: Bar) -> Facts:
    """A checkpoint as a GGUF file of a 16-bit type."""
    remarks: list[str] = []
    plan = plan_checkpoint(checkpoint, type, model_name=name, warn=remarks.append)
    return _written(plan, output, threads, bar) | {"warnings": remarks}


def generate_chats(part: GeneratePart, teacher: Path, output: Path, threads: int | None, bar: Bar) -> Facts:
    """The teacher's answers."""
    from gguforge.distill.generate import Asking, generate
    from gguforge.runtime.sampling import Sampling

    own = Sampling.from_metadata(read_gguf(teacher).metadata)
    sampling = own.changed(temperature=part.temperature, seed=part.seed)
    asking = Asking(part.answers, part.max_tokens, part.min_characters, sampling)

    def show(done: int, total: int) -> None:
        bar("generate", done, total, "")

    done = generate(
        teacher, part.prompts, output, asking, context=part.context, threads=threads, overwrite=True, progress=show
    )
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(done.dropped.items())) or "none"
    if not done.kept:
        raise InputError("no answer passed", path=part.prompts, found=lost, remedy="Raise generate.max_tokens.")
    return {"line": f"{done.kept} answers to {done.prompts} prompts; thrown away: {lost}", **asdict(done)}


def collect_targets(
    recipe: Recipe, part: CollectPart, text: Sequence[Path], output: Path, threads: int | None, bar: Bar
) -> Facts:
    """Soft targets of the text."""
    from gguforge.distill.collect import Progress, collect
    from gguforge.distill.collector import Settings
    from gguforge.distill.teachers.open import TeacherSource

    kind, size = ("top-k", part.top_k) if part.top_k else ("full", 0) if part.full else ("sampled", part.draws)
    settings = Settings(
        kind, size, "independent" if part.independent else "stratified", part.seed, part.temperature,  # type: ignore[arg-type]
        recipe.data.context, part.shard_bytes,
    )  # fmt: skip
    device = None if recipe.hardware.device == "auto" else recipe.hardware.device
    places = part.teachers or (recipe.teacher.checkpoint,)
    tokenizer = None if part.tokenizer is None else str(part.tokenizer)
    sources = [
        TeacherSource(str(place), weight, threads, device, tokenizer, part.api_key_env)
        for place, weight in zip(places, part.weights or [1.0] * len(places), strict=True)
    ]

    def show(state: Progress) -> None:
        bar("collect", state.done, state.total, f"{state.tokens / max(state.seconds, 1e-9):.0f} tokens/s")

    with _same_threads():
        done = collect(sources, text, output, settings, progress=show)
    each = done.nbytes / max(1, done.tokens)
    return {
        "line": f"{done.tokens:,} tokens of which {done.rows:,} count, {each:.1f} bytes a token; "
        f"the teacher's loss {done.teacher_loss:.4f} nats",
        "key": done.manifest.key, "tokens": done.tokens, "rows": done.rows, "bytes": done.nbytes,
        "teacher_loss": done.teacher_loss,
    }  # fmt: skip


@contextmanager
def _same_threads() -> Iterator[None]:
    """A teacher in torch may take other threads; the student's sums must not depend on whether it was here before."""
    torch = load("torch")
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_student(recipe: Recipe, output: Path, group: Group, bar: Bar) -> Facts:
    """A training; its figures are in the report it leaves."""
    from gguforge.distill.report import summary, verdict
    from gguforge.distill.train import train_recipe

    steps = recipe.schedule.steps

    def tell(name: str, step: int, losses: dict[str, float]) -> None:
        bar(f"{output.name} {name}", step, steps, f"loss {losses['loss']:.4f}")

    def announce(parameters: int, memory: Footprint) -> None:
        bar(output.name, 0, steps, f"{parameters:,} parameters, about {memory.total / MIB:,.0f} MiB a process")

    trained = train_recipe(recipe, output, tell, announce, group)
    first = next(iter(trained.runs.values()))
    worth = [] if first.end is None else [verdict(first.end)]
    counted = [f"{trained.parameters:,} parameters", f"{len(first.history.losses)} steps"]
    return {
        "line": "; ".join([*counted, *worth]),
        "summary": summary(trained),
        "parameters": trained.parameters,
        "memory": trained.memory.total,
    }


def make_imatrix(model: Path, text: Path, output: Path, chunks: int, threads: int | None, bar: Bar) -> Facts:
    """An importance matrix, going on with what a stopped run left."""
    from gguforge.runtime.calibrate import calibrate

    def show(done: int, total: int) -> None:
        bar("calibrate", done, total, "")

    made = calibrate(model, text, output, chunks=chunks, threads=threads, resume=True, progress=show)
    line = f"{made.chunk_count} chunks of {text.name}, {len(made.entries)} matrices"
    return {"line": line, "chunks": made.chunk_count}


def quantize_file(
    reference: Path, preset: str, output: Path, part: OutputPart, guide: Path | None, text: Path | None,
    threads: int | None, bar: Bar,
) -> Facts:  # fmt: skip
    """A file of a preset, made from the unquantized one."""
    plan = retype(plan_of_file(read_gguf(reference)), preset, guide=_guide(guide))
    folder = output.with_name(output.name + ".tune")
    if part.quality != "exact":
        plan = lossless_plan(replace(plan, metadata={**plan.metadata, QUALITY_KEY: string(part.quality)}))
    if part.quality in TUNED:
        plan = _tuned(plan, reference, text, part, folder, threads, bar)
    facts = _written(plan, output, threads, bar)
    shutil.rmtree(folder, ignore_errors=True)
    return facts


def _tuned(
    plan: Plan, reference: Path, text: Path | None, part: OutputPart, folder: Path, threads: int | None, bar: Bar
) -> Plan:
    from gguforge.runtime.tune import tune
    from gguforge.runtime.tuning_text import random_chunks, tuning_chunks, tuning_metadata

    if text is None:
        chunks = random_chunks(reference)
    else:
        chunks = tuning_chunks(reference, text, part.calibration_chunks)
        plan = replace(plan, metadata={**plan.metadata, **tuning_metadata(text, len(chunks))})

    def show(done: int, total: int) -> None:
        bar(f"tune {folder.stem}", done, total, "")

    best = part.quality == "best"
    return tune(plan, chunks, folder, sequential=best, guided=text is None, threads=threads, progress=show)


def ship_blocks(
    blocks: Path, reference: Path, preset: str, output: Path, guide: Path | None, threads: int | None, bar: Bar
) -> Facts:
    """The very blocks that were trained, under the student's name: only the metadata are those of a quantized file."""
    metadata = retype(plan_of_file(read_gguf(reference)), preset, guide=_guide(guide)).metadata
    return _written(replace(plan_of_file(read_gguf(blocks)), metadata=metadata), output, threads, bar)


def _guide(path: Path | None) -> Guide | None:
    return None if path is None else Guide.from_matrix(read_imatrix(path), path.name)


def _written(plan: Plan, output: Path, threads: int | None, bar: Bar) -> Facts:
    done = 0

    def show(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        bar(output.name, done, plan.size, "")

    write(plan, output, workers=threads, overwrite=True, progress=show)
    bits = round(plan.bits_per_weight, 4)
    line = f"{output.name}: {plan.size / MIB:.2f} MiB, {bits:.2f} bits per weight"
    return {"line": line, "file": output.name, "bytes": plan.size, "bits_per_weight": bits}


def merged_text(paths: Sequence[Path], folder: Path) -> Path:
    """One file for those who read one; of plain text and conversations, the kind that is larger."""
    kinds: dict[bool, list[Path]] = {}
    for path in paths:
        kinds.setdefault(path.suffix == ".jsonl", []).append(path)
    chosen = max(kinds.values(), key=lambda kind: sum(path.stat().st_size for path in kind))
    if len(chosen) == 1:
        return chosen[0]
    output = folder / f"held-out{chosen[0].suffix}"
    output.write_bytes(b"".join(path.read_bytes().rstrip(b"\n") + b"\n" for path in chosen))
    return output


def evaluate_file(
    model: Path, text: Path, against: dict[str, Path], context: int, chunks: int, threads: int | None, bar: Bar
) -> Facts:
    """A file on held-out text, by the kernels that will run it; what cannot be measured is said in `notes`.

    Args:
        against: what to compare with, by name.

    Returns:
        `perplexity`, and for each name the mean divergence `kld`, the share `same_top` and its own `perplexity`, with
        standard errors.
    """
    from gguforge.runtime.evaluate import Evaluation, evaluate

    facts: Facts = {"text": text.name, "against": {}, "notes": []}

    def measured(other: Path | None) -> Evaluation | None:
        label = f"{model.name} on {text.name}"
        try:
            return evaluate(
                model, text, against=other, context=context, chunks=chunks, threads=threads,
                progress=lambda done, total, value: bar(label, done, total, f"perplexity {value:.4f}"),
            )  # fmt: skip
        except InputError as error:
            facts["notes"].append(str(error))
            return None

    for name, other in against.items() or {"": None}.items():
        found = measured(other)
        if found is None:
            continue
        facts |= {"perplexity": asdict(found.perplexity), "positions": found.positions}
        if found.comparison is not None:
            both = found.comparison
            facts["against"][name] = {
                "kld": asdict(both.mean), "kld_99.9": asdict(both.quantiles[0.999]), "same_top": asdict(both.same_top),
                "perplexity": asdict(both.base_perplexity),
            }  # fmt: skip
    if "perplexity" not in facts and against and (found := measured(None)) is not None:
        facts |= {"perplexity": asdict(found.perplexity), "positions": found.positions}
    return facts | {"line": _verdict(facts)}


def embed_file(
    model: Path,
    paths: Sequence[Path],
    against: dict[str, Path],
    context: int,
    limit: int,
    threads: int | None,
    bar: Bar,
) -> Facts:
    """An encoder's file on held-out texts, by the kernels that will run it; see `evaluate_embeddings`."""
    from gguforge.distill.encoders.files import evaluate_embeddings

    def show(done: int, total: int) -> None:
        bar(f"{model.name} on held-out texts", done, total, "")

    return evaluate_embeddings(model, paths, against, context, limit, threads, show)


def _verdict(facts: Facts) -> str:
    parts = [f"perplexity {facts['perplexity']['value']:.4f}"] if "perplexity" in facts else []
    for name, found in facts["against"].items():
        top = 100 * found["same_top"]["value"]
        parts.append(f"KLD from {name} {found['kld']['value']:.5f}, same top token {top:.1f} %")
    return "; ".join([*parts, *dict.fromkeys(facts["notes"])])
