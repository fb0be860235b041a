"""Checks a model file: against the hashes in its receipt, and against what it was made from, by encoding again.

Encoding is the same on every platform, byte for byte, so any difference means another source, another importance
matrix, or damage. It needs nobody's word: a file without a receipt is compared with its source all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gguforge.quant.blocks import block_type
from gguforge.quant.constants import GGML_QUANT_SIZES, Keys
from gguforge.quant.errors import InputError
from gguforge.quant.inputs import Inputs
from gguforge.quant.plan import Plan, TensorPlan, dimensions_on_disk
from gguforge.quant.presets import UNQUANTIZED
from gguforge.quant.provenance import essentials
from gguforge.quant.pruning import without_layers
from gguforge.quant.quality import QUALITY_KEY
from gguforge.quant.reader import GGUFFile, TensorInfo
from gguforge.quant.receipt import Receipt
from gguforge.quant.relative_error import relative_error
from gguforge.quant.search.recover import gives_back
from gguforge.quant.slabs import Slab, encoded, naming, slabs
from gguforge.quant.sources import Bytes, Floats, map_window
from gguforge.quant.workers import Team, processors

CHUNK = 1 << 22  # bytes mapped at once
IMPORTANCE_KEY = "quantize.imatrix.file"
REPEATABLE = frozenset({"exact", "lossless"})
"""Levels of `--quality` that give the same bytes everywhere."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Difference:
    """What does not agree: a tensor, or "" for the file as a whole, and how."""

    tensor: str
    what: str


def check_hashes(file: GGUFFile, receipt: Receipt, progress: Progress = lambda _: None) -> list[Difference]:
    """Compare one GGUF file with its receipt, reading all of it.

    Args:
        file: what to check.
        receipt: what it should be.
        progress: receives the bytes read since the last call.
    """
    found = []
    header = hashlib.sha256(map_window(str(file.path), 0, file.data_offset).data)
    if file.size != receipt.bytes:
        found.append(Difference("", f"has {file.size} bytes and not {receipt.bytes}"))
    if header.hexdigest() != receipt.header_sha256:
        found.append(Difference("", "has another header"))
    known = {tensor.name: tensor for tensor in receipt.tensors}
    digests = [header.digest()]
    for tensor in file.tensors:
        digests.append(_hash(tensor, progress))
        expected = known.pop(tensor.name, None)
        if expected is None:
            found.append(Difference(tensor.name, "is not in the receipt"))
        elif (expected.type, dimensions_on_disk(tuple(expected.shape))) != _layout(tensor):
            found.append(Difference(tensor.name, "has another type or shape"))
        elif expected.sha256 != digests[-1].hex():
            found.append(Difference(tensor.name, "has other bytes"))
    found += [Difference(name, "is missing") for name in known]
    if not found and hashlib.sha256(b"".join(digests)).hexdigest() != receipt.digest:
        found.append(Difference("", "has another digest than the receipt, whose hashes of the parts are right"))
    return found


def check_facts(file: GGUFFile, receipt: Receipt) -> list[Difference]:
    """Compare what a file's metadata say of its making with its receipt, and see that its measurements are its own."""
    told = essentials(receipt.tool, receipt.settings, receipt.sources)
    if Keys.Split.LLM_KV_SPLIT_COUNT in file.metadata:  # the receipt of one file knows only what that was made from
        told = {key: value for key, value in told.items() if not key.endswith("source.sha256")}
    wrong = [key for key, value in told.items() if key in file.metadata and file.metadata[key] != value]
    found = [Difference("", f"says otherwise than the receipt: {key}") for key in wrong]
    foreign = [measured for measured in receipt.measured if measured.digest not in ("", receipt.digest)]
    return found + [Difference("", f"has a measurement of another file: {measured.words()}") for measured in foreign]


def _layout(tensor: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return tensor.type.name, dimensions_on_disk(tensor.shape)


def _hash(tensor: TensorInfo, progress: Progress) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, tensor.nbytes, CHUNK):
        window = map_window(str(tensor.path), tensor.offset + start, min(CHUNK, tensor.nbytes - start))
        digest.update(window.data)
        progress(window.size)
    return digest.digest()


def expected_plan(
    file: GGUFFile, source: Plan, importance: Mapping[str, Floats] | None, pruned: Collection[int] = ()
) -> tuple[Plan, list[Difference]]:
    """The plan by which the tensors of a file were made from a source, and what cannot be compared.

    Args:
        file: the model.
        source: a plan with tensors of the same names.
        importance: by tensor name, shape (matrices, columns), or None where no importance matrix is given.
        pruned: layers of the source that the file was made without; all names but the file's are those before that.

    Raises:
        InputError: the file was made with an importance matrix, and none is given; or with another search; or there
            are no such layers.
    """
    if importance is None and IMPORTANCE_KEY in file.metadata:
        made_with = file.metadata[IMPORTANCE_KEY].value
        raise InputError(
            "was made with an importance matrix", path=file.path, found=made_with, remedy="Give it with --imatrix."
        )
    if quality_of(file) not in REPEATABLE:
        raise InputError(
            "was not made with llama.cpp's encoders",
            path=file.path,
            found=f"--quality {quality_of(file)}",
            remedy="Check it by its receipt alone, without --source.",
        )
    names = {tensor.name: tensor.name for tensor in source.tensors}
    if pruned:
        names = without_layers(names, pruned)[0]
    stored = {names[tensor.name]: tensor for tensor in source.tensors if tensor.name in names}
    tensors, found = [], []
    for tensor in file.tensors:
        origin = stored.get(tensor.name)
        if origin is None:
            found.append(Difference(tensor.name, "is not in the source"))
        elif origin.elements != tensor.elements or origin.row_length != tensor.shape[-1]:
            found.append(Difference(tensor.name, "has another shape in the source"))
        else:
            guided = _guided(replace(origin, type=tensor.type, importance=None), importance or {})
            tensors.append(replace(guided, name=tensor.name))
    return Plan({}, tuple(tensors)), found


def quality_of(file: GGUFFile) -> str:
    """The `--quality` that a file was made with; files without the key are llama.cpp's."""
    return str(file.metadata[QUALITY_KEY].value) if QUALITY_KEY in file.metadata else "exact"


def _guided(tensor: TensorPlan, importance: Mapping[str, Floats]) -> TensorPlan:
    weights = importance.get(tensor.name)
    matrices = tensor.shape[-3] if len(tensor.shape) > 2 else 1
    if tensor.is_copy or weights is None or weights.size != matrices * tensor.row_length:
        return tensor
    return replace(tensor, importance=np.ascontiguousarray(weights, np.float32).reshape(matrices, -1))


class _Comparer:
    """Encodes slabs again and compares them with those in the file; or the values of these with the source's."""

    def __init__(self, plan: Plan, places: Mapping[str, tuple[str, int]], every: bool, lossless: bool) -> None:
        self.plan, self.places, self.work, self.lossless = plan, places, chosen(plan, every), lossless

    def do(self, number: int) -> bool:
        """Whether slab `number` agrees."""
        slab = self.work[number]
        tensor = self.plan.tensors[slab.index]
        with naming(tensor):
            expected = tensor.source.raw_rows(slab.start, slab.stop)
            if not tensor.is_copy:
                expected = encoded(tensor, slab.start, expected)
        path, offset = self.places[tensor.name]
        nbytes = (slab.stop - slab.start) * tensor.row_bytes
        found = map_window(path, offset + slab.start * tensor.row_bytes, nbytes)
        same = bool(np.array_equal(np.ascontiguousarray(expected).reshape(-1).view(np.uint8), found))
        return same or (self.lossless and _holds(tensor, slab, found))

    def close(self) -> None:
        """Nothing is open."""


def _holds(tensor: TensorPlan, slab: Slab, data: Bytes) -> bool:
    """Whether blocks hold their source's weights, bit for bit."""
    if tensor.source.type not in UNQUANTIZED or tensor.type in UNQUANTIZED:
        return False
    size, nbytes = GGML_QUANT_SIZES[tensor.type]
    weights = tensor.source.rows(slab.start, slab.stop).reshape(-1, size)
    return bool(gives_back(data.reshape(-1, nbytes), tensor.type, weights, tensor.source.type).all())


def chosen(plan: Plan, every: bool) -> list[Slab]:
    """The slabs to compare: all, or of each tensor one, the n-th of the n-th tensor and so on around."""
    groups: dict[int, list[Slab]] = {}
    for slab in slabs(plan):
        groups.setdefault(slab.index, []).append(slab)
    if every:
        return [slab for group in groups.values() for slab in group]
    return [group[index % len(group)] for index, group in groups.items()]


def check_source(
    file: GGUFFile,
    plan: Plan,
    *,
    every: bool = False,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> list[Difference]:
    """Encode tensors again and compare them with a file.

    Args:
        file: what to check.
        plan: see `expected_plan`.
        every: compare all rows; if not, one slab of each tensor.
        workers: processes, None for all processors.
        progress: called with 1 for each slab of `chosen`.
    """
    for tensor in plan.tensors:
        if not tensor.is_copy:
            with naming(tensor):
                block_type(tensor.type), block_type(tensor.source.type)
    places = {tensor.name: (str(tensor.path), tensor.offset) for tensor in file.tensors}
    work = chosen(plan, every)
    differing: set[int] = set()

    def done(number: int, agrees: bool) -> None:
        progress(1)
        if not agrees:
            differing.add(work[number].index)

    count = min(workers or processors(), max(1, len(work) // 4))
    lossless = quality_of(file) == "lossless"  # then tensors may hold their source's weights
    with Team(partial(_Comparer, plan, places, every, lossless), len(work), count) as team:
        team.run(done)
    return [
        Difference(plan.tensors[index].name, "has other bytes than the source gives") for index in sorted(differing)
    ]


def check_errors(file: GGUFFile, plan: Plan, receipts: Iterable[Receipt]) -> list[Difference]:
    """Compare the relative errors in receipts, those that have them, with what the file and its source give.

    Args:
        file: what to check.
        plan: see `expected_plan`.
        receipts: of its files.
    """
    told = {tensor.name: tensor.relative_error for receipt in receipts for tensor in receipt.tensors}
    places = {tensor.name: (str(tensor.path), tensor.offset) for tensor in file.tensors}
    lossless, found = quality_of(file) == "lossless", []
    with closing(Inputs()) as inputs:
        for tensor in plan.tensors:
            error, (path, offset) = told.get(tensor.name), places[tensor.name]
            if error is None or error == relative_error(tensor, path, offset, inputs):
                continue
            middle = Slab(0, tensor.rows // 2, tensor.rows // 2 + 1)
            row = map_window(path, offset + middle.start * tensor.row_bytes, tensor.row_bytes)
            if not (lossless and error == 0 and _holds(tensor, middle, row)):
                found.append(Difference(tensor.name, "has another relative error than the receipt says"))
    return found
