"""Small sets of soft targets with random contents, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gguforge.distill.shards import Kind, Layout, Rows, Scored, write_shard
from gguforge.distill.targets import KEY, Manifest, TeacherRecord, TextRecord, write_manifest

NO_IDS, NO_HALFS, NO_FLOATS = np.empty(0, np.int32), np.empty(0, np.float16), np.empty(0, np.float32)


def manifest(kind: Kind = "sampled", size: int = 50, vocabulary: int = 300, shards: int = 1) -> Manifest:
    """A manifest that no teacher stands behind."""
    return Manifest(
        kind=kind, size=size, draws="independent" if kind == "sampled" else "", seed=0, temperature=1.0,
        biased=kind == "top-k", context=64, vocabulary=vocabulary, tokens=vocabulary, tokenizer_sha256="00" * 32,
        template_sha256="", teachers=(TeacherRecord("random", "F32", "tests", "11" * 32, 1.0),),
        text=(TextRecord("text.txt", "22" * 32, 100),), shard_bytes=1 << 18, shards=shards,
    )  # fmt: skip


def random_document(draw: np.random.Generator, layout: Layout, tokens: int) -> Scored:
    """A document of random tokens, about half of which count."""
    mask = draw.random(tokens) < 0.5
    mask[0] = False
    count = int(mask.sum())
    rows = [_row(draw, layout) for _ in range(count)]
    floats = draw.normal(size=(2, count)).astype(np.float16).astype(np.float32)
    joined = {name: np.concatenate([NO_IDS, *(row[name] for row in rows)]) for name in ("ids", "counts")}
    if layout.kind == "full":
        log_probs = np.log(draw.dirichlet(np.ones(layout.vocabulary), count)).astype(np.float16)
    else:
        log_probs = np.concatenate([NO_HALFS, *(row["log_probs"] for row in rows)]).astype(np.float16)
    tail = -draw.random(count).astype(np.float16).astype(np.float32) if layout.kind == "top-k" else NO_FLOATS
    lengths = np.array([len(row["ids"]) for row in rows], np.int64)
    return Scored(
        draw.integers(layout.vocabulary, size=tokens).astype(np.int32), mask,
        Rows(lengths, joined["ids"].astype(np.int32), joined["counts"].astype(np.int32), log_probs, tail, *floats),
    )  # fmt: skip


def _row(draw: np.random.Generator, layout: Layout) -> dict[str, np.ndarray]:
    if layout.kind == "full":
        return {"ids": NO_IDS, "counts": NO_IDS, "log_probs": NO_HALFS}
    if layout.kind == "top-k":
        ids = draw.permutation(layout.vocabulary)[: draw.integers(1, layout.size + 1)]
        return {"ids": ids, "counts": NO_IDS, "log_probs": -draw.random(len(ids)).astype(np.float16)}
    counts = draw.multinomial(layout.size, draw.dirichlet(np.full(layout.vocabulary, 0.05)))
    return {"ids": np.flatnonzero(counts), "counts": counts[counts > 0], "log_probs": NO_HALFS}


def write_targets(folder: Path, made: Manifest, documents: int = 3, tokens: int = 20) -> list[list[Scored]]:
    """A folder of random targets; what was written, shard by shard."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    write_manifest(folder, made)
    shards = []
    for number in range(made.shards):
        shard = [random_document(draw, made.layout, tokens + i) for i in range(documents)]
        write_shard(folder / made.shard_name(number), shard, made.layout, {KEY: made.key})
        shards.append(shard)
    return shards
