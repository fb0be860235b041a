"""Runs one block of a model at a time: llama.cpp is given a GGUF file of a single block.

`block_count` is 1, the block's tensors are called `blk.0`, and hidden states go in where embeddings would. So memory
holds one block however large the model is, and every architecture works whose blocks hand nothing on but hidden states;
whether that is so is measured (`gguforge.runtime.tune`), not believed. API: llama.cpp, include/llama.h.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.constants import GGUFValueType, Keys
from gguforge.quant.metadata import Value, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.roles import layer
from gguforge.quant.sources import ArraySource
from gguforge.runtime.forward import Tokens
from gguforge.runtime.loaded import Loaded
from gguforge.runtime.probe import Found, Probe, Stage

STUB_VOCABULARY = 32
"""Rows of the embedding of a block that is given hidden states and has no head."""

States = NDArray[np.float32]


def architecture(plan: Plan) -> str:
    """The name that begins the model's own metadata keys."""
    return str(plan.metadata[Keys.General.ARCHITECTURE].value)


def block_count(plan: Plan) -> int:
    """How many blocks the model has."""
    found = plan.metadata[f"{architecture(plan)}.block_count"].value
    assert isinstance(found, int)
    return found


def block_plan(plan: Plan, number: int) -> Plan:
    """A model of one block of a plan; the first keeps the embedding, the last the head."""
    count = block_count(plan)
    ends = number in (0, count - 1)
    tensors = [_of_block(tensor, number) for tensor in plan.tensors if layer(tensor.name) in (-1, number)]
    kept = [_embedding(tensor, ends) for tensor in tensors if tensor.name != "output.weight" or number == count - 1]
    rows = next(tensor.shape[0] for tensor in kept if tensor.name == "token_embd.weight")
    return Plan(_metadata(plan, number, count, rows), tuple(kept), plan.alignment)


def _of_block(tensor: TensorPlan, number: int) -> TensorPlan:
    return replace(tensor, name=tensor.name.replace(f"blk.{number}.", "blk.0.", 1))


def _embedding(tensor: TensorPlan, real: bool) -> TensorPlan:
    if real or tensor.name != "token_embd.weight":
        return tensor
    stub = ArraySource(np.zeros((STUB_VOCABULARY, tensor.row_length), np.float32))
    return TensorPlan(tensor.name, stub.shape, stub.type, stub)


def _metadata(plan: Plan, number: int, count: int, rows: int) -> dict[str, Value]:
    """The model's own keys for one block, without tokenizer; what is given for each layer is cut down to this one's."""
    name = architecture(plan)
    found: dict[str, Value] = {}
    for key, value in plan.metadata.items():
        if key.startswith("tokenizer."):
            continue
        if key.startswith(f"{name}.") and isinstance(value.value, list) and len(value.value) == count:
            value = Value(GGUFValueType.ARRAY, [value.value[number]], value.item)
        found[key] = value
    found["tokenizer.ggml.model"] = string("no_vocab")
    return found | {f"{name}.block_count": uint32(1), f"{name}.vocab_size": uint32(rows)}


class BlockRunner(Loaded):
    """A file whose block number `layer` is run on chunks of tokens or of hidden states.

    Args:
        path: a GGUF file.
        layer: which of its blocks to look into.
        head: whether to look into `output.weight` as well.
        chunk: tokens of a chunk; they are evaluated at once.
        width: of the hidden states that go in; 0 for tokens.
        threads: of llama.cpp.

    Raises:
        EngineError: llama.cpp does not take the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, layer: int, head: bool, chunk: int, width: int, threads: int
    ) -> None:
        self.probe = Probe(layer, head)
        size = {"n_batch": chunk, "n_ubatch": chunk, "n_outputs_max": chunk, "n_outputs_max_per_seq": 0}
        callback = self.probe.callback
        super().__init__(path, context=chunk, threads=threads, continues=False, **size, cb_eval=callback)
        self._batch = batch = self._llama.llama_batch_init(chunk, width, 1)
        batch.n_tokens = chunk
        as_array = np.ctypeslib.as_array
        self._given = as_array(batch.embd, (chunk, width)) if width else as_array(batch.token, (chunk,))
        as_array(batch.pos, (chunk,))[:] = np.arange(chunk)
        as_array(batch.logits, (chunk,))[:] = 1  # else llama.cpp drops rows in the last block
        for i in range(chunk):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0

    def run(self, chunk: Tokens | States, stage: Stage | None = None, output: bool = False) -> Found:
        """Evaluate one chunk and return what was wanted of it: see `Probe.begin`."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._given[...] = chunk
        self.probe.begin(stage, output)
        code = self._llama.llama_decode(self._context, self._batch)
        if code:
            raise self._failure(code)
        self.probe.check()
        return self.probe.found

    def survey(self, chunk: Tokens | States) -> tuple[Stage, ...]:
        """The block's stages."""
        self.run(chunk)
        return self.probe.stages()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._batch is not None:
            self._llama.llama_batch_free(self._batch)
        self._batch = None
        super().close()
