"""DistillKit's captured log-probabilities, parquet files beside a compression_config.yaml: read and written.

A row of the table is a text: `input_ids`, and for every token but the last the next token's k most probable ids and
their log-probabilities (see `gguforge.distill.compression`). Written files keep all of them as they are. DistillKit's
older layout (`packed_indices`) is not read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.compression import CONFIG, Compression, decode_log_probs, load, pack, read_compression, unpack
from gguforge.distill.folders import replacing_folder
from gguforge.distill.sampling import log_of_rest
from gguforge.distill.shards import Document, Floats, Ids, Rows, Scored, predicting, write_shard
from gguforge.distill.targets import KEY, Manifest, Targets, TeacherRecord, TextRecord, open_targets, write_manifest
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError, OutputError

_IGNORED = -100  # the label of a token that does not count
_TEXTS_A_FILE = 1000


def import_targets(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> Targets:
    """Turn DistillKit's files into top-k targets, a shard for each file.

    Args:
        tokenizer: a GGUF file or a checkpoint's folder with the teacher's tokenizer, to be recorded.

    Raises:
        InputError: files are missing, damaged or of the older layout, or the tokenizer has another number of tokens.
        OutputError: the output holds other targets, or cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    folder, output = Path(folder), Path(output)
    config = read_compression(folder / CONFIG)
    paths = sorted(folder.glob("*.parquet"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    if not paths:
        raise InputError("holds no parquet files", path=folder)
    manifest = _manifest(folder, config, paths, tokenizer)
    output.mkdir(exist_ok=True)
    write_manifest(output, manifest)
    for number, path in enumerate(paths):
        target = output / manifest.shard_name(number)
        if not target.exists():
            write_shard(target, list(_texts(path, config)), manifest.layout, {KEY: manifest.key})
    return open_targets(output)


def _manifest(folder: Path, config: Compression, paths: list[Path], tokenizer: Any) -> Manifest:
    texts = []
    for path in paths:
        with path.open("rb") as file:
            texts.append(TextRecord(path.name, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size))
    digest = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
    tokens, sha256 = 0, ""
    if tokenizer is not None:
        with Tokenizer.open(tokenizer) as opened:
            tokens, sha256 = opened.identity.tokens, opened.identity.sha256
            if not tokens <= config.d <= opened.size:  # some count the padding at the end, some do not
                raise InputError(
                    "is not the tokenizer of what was captured", path=tokenizer, expected=f"{config.d} tokens",
                    found=f"{tokens}" if tokens == opened.size else f"{tokens} to {opened.size}",
                    remedy="Give the teacher's own.",
                )  # fmt: skip
    return Manifest(
        kind="top-k", size=config.k, draws="", seed=0, temperature=1.0, biased=True, context=0, vocabulary=config.d,
        tokens=tokens, tokenizer_sha256=sha256, template_sha256="",
        teachers=(TeacherRecord(folder.name, "unknown", "DistillKit", digest, 1.0),), text=tuple(texts), shard_bytes=0,
        shards=len(paths),
    )  # fmt: skip


def _texts(path: Path, config: Compression) -> Iterator[Scored]:
    """The documents of a file that predict anything."""
    pyarrow, parquet = load("pyarrow"), load("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if "packed_indices" in names:
                raise InputError("is of DistillKit's older layout, which is not read", path=path)
            columns = ["input_ids", "compressed_logprobs", "bytepacked_indices", *({"labels"} & names)]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    yield from _document(row, config)
    except (pyarrow.ArrowException, KeyError, ValueError, TypeError) as error:
        raise InputError(f"is damaged: {str(error).splitlines()[0]}", path=path) from None


def _document(row: Mapping[str, Any], config: Compression) -> Iterator[Scored]:
    """One text.

    Raises:
        ValueError: its columns do not fit each other.
    """
    ids = np.array(row["input_ids"], np.int32)
    logs = np.array(row["compressed_logprobs"], np.uint8).reshape(len(row["compressed_logprobs"]), -1)
    packed = np.array(row["bytepacked_indices"], np.uint8).reshape(len(logs), -1)
    if len(ids) < 2:
        return
    wanted = (config.row_bytes, -(-config.k * config.id_bits // 8))
    if len(logs) < len(ids) - 1 or (logs.shape[1], packed.shape[1]) != wanted or ids.max() >= config.d:
        raise ValueError("rows do not have the length that the configuration gives them")
    mask = np.ones(len(ids), np.bool_)
    if "labels" in row:
        mask = np.array(row["labels"]) != _IGNORED
    mask[0] = False
    if mask.any():
        at = predicting(mask)
        values = decode_log_probs(logs[at], config)
        yield Scored(ids, mask, _rows(unpack(packed[at], config.id_bits, config.k), values, ids[at + 1], config.d))


def _rows(tokens: NDArray[np.int64], values: Floats, next_ids: Ids, vocabulary: int) -> Rows:
    """Rows of what is kept; an entry of probability 0 is padding."""
    kept = np.isfinite(values) & (tokens < vocabulary)
    values = np.minimum(np.where(kept, values, -np.inf), 0)
    own = np.where(kept & (tokens == next_ids[:, None]), values, -np.inf).max(1)
    none = np.empty(0, np.int32)
    return Rows(
        kept.sum(1), tokens[kept].astype(np.int32), none, values[kept].astype(np.float16),
        log_of_rest(np.exp(values.astype(np.float64)).sum(1)),
        np.where(np.isfinite(own), own, np.nan).astype(np.float32), np.full(len(values), np.nan, np.float32),
    )  # fmt: skip


def export_targets(targets: Targets, output: str | os.PathLike[str]) -> Compression:
    """Write targets for DistillKit, nothing of them lost but the tail, which it does not know.

    A token that does not count has the label -100, and its row is the token itself.

    Raises:
        InputError: the targets are full ones.
        OutputError: the folder exists and is not empty, or cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    if targets.manifest.kind == "full":
        raise InputError("full targets have no such form", path=targets.folder)
    pyarrow, parquet, yaml = load("pyarrow"), load("pyarrow.parquet"), load("yaml")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError("exists and is no empty folder", path=folder, remedy="Choose another folder.")
    k = max((int(np.diff(document.row_ptr).max(initial=1)) for document in targets), default=1)
    config = Compression(targets.manifest.vocabulary, k, k, "float32", delta_encoding=False)
    said = {"d": config.d, "k": k, "exact_k": k, "exact_dtype": "float32", "polynomial_terms": [], "residual_bins": [],
            "delta_encoding": False, "error_diffusion": False}  # fmt: skip
    with replacing_folder(folder) as part:
        for number, start in enumerate(range(0, len(targets), _TEXTS_A_FILE)):
            columns = [_columns(document, config) for document in targets[start : start + _TEXTS_A_FILE]]
            table = {name: [column[name] for column in columns] for name in columns[0]}
            types = [pyarrow.list_(pyarrow.uint64()), pyarrow.list_(pyarrow.int64())]
            types += [pyarrow.list_(pyarrow.list_(pyarrow.uint8()))] * 2
            schema = pyarrow.schema(list(zip(table, types, strict=True)))
            parquet.write_table(pyarrow.table(table, schema=schema), part / f"data_{number}.parquet")
        (part / CONFIG).write_text(yaml.safe_dump(said), "utf-8")
    return config


def _columns(document: Document, config: Compression) -> dict[str, Any]:
    """One text as a row of the table."""
    ids = document.input_ids
    tokens = np.zeros((len(ids) - 1, config.k), np.int64)
    values = np.full((len(ids) - 1, config.k), -np.inf, np.float32)
    tokens[:, 0], values[:, 0] = ids[1:], 0
    for row, position in enumerate(document.positions):
        part = slice(*document.row_ptr[row : row + 2])
        order = np.argsort(-document.weights[part], kind="stable")
        tokens[position] = 0
        tokens[position, : len(order)] = document.ids[part][order]
        values[position] = -np.inf
        values[position, : len(order)] = np.log(document.weights[part][order])
    return {
        "input_ids": ids.tolist(),
        "labels": np.where(document.loss_mask, ids, _IGNORED).tolist(),
        "compressed_logprobs": values.view(np.uint8).reshape(len(values), -1).tolist(),
        "bytepacked_indices": pack(tokens, config.id_bits).tolist(),
    }
