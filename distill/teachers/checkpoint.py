"""A Hugging Face checkpoint as a teacher: torch and transformers, on the CPU or a GPU.

The body reads a document at once; the head is applied to some positions at a time, so that no more than these have
scores of vocabulary size. On a GPU probabilities stay there: block sums and the few blocks that draws hit come over.
Code from the checkpoint's folder is never run and no pickle is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gguforge.convert.checkpoint import Checkpoint, read_checkpoint
from gguforge.distill.sampling import BLOCK, Doubles, Masses, Reducer, full_rows, pick, sampled_rows, top_k_rows
from gguforge.distill.shards import KINDS, Ids, Rows
from gguforge.distill.students import load, model_class
from gguforge.distill.targets import TeacherRecord
from gguforge.distill.teachers.base import Teacher
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import DataError, InputError
from gguforge.runtime.machine import physical_cores

_SAMPLE = 4096  # bytes of each tensor that identify a checkpoint
_SCORES_AT_A_TIME = 1 << 25  # 128 MiB in float32
_PROBE = 8  # tokens on which the head is tried


class CheckpointTeacher(Teacher):
    """A causal language model of transformers."""

    kinds = KINDS

    def __init__(self, model: Any, tokenizer: Tokenizer, record: TeacherRecord, device: str) -> None:
        self._torch, self._model, self._device = load("torch"), model, device
        self.threads = int(self._torch.get_num_threads()) if device == "cpu" else 1
        self.tokenizer, self.record = tokenizer, record
        self._head = model.get_output_embeddings()
        self.vocabulary = int(self._head.weight.shape[0])
        self._interrupted = False
        self._check_head()

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, context: int, threads: int | None = None, device: str | None = None
    ) -> Self:
        """Load a checkpoint for documents of at most `context` tokens.

        Args:
            threads: of the CPU; None for the physical cores.
            device: "cpu", "cuda", "mps"...; None for a GPU where there is one. The weights keep their type on a GPU
                and become float32 on the CPU.

        Raises:
            InputError: it is damaged, not understood, or was trained for shorter contexts.
            MissingExtraError: torch or transformers is not installed.
        """
        torch, path = load("torch"), Path(folder)
        checkpoint = read_checkpoint(path)
        config_path = checkpoint.folder / "config.json"
        kind = model_class(checkpoint.config, config_path)
        trained = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
        if isinstance(trained, int) and trained < context:
            raise InputError(
                "was trained for shorter contexts", path=path, expected=f"at most {trained} tokens", found=context,
                remedy=f"Pass --context {trained}.",
            )  # fmt: skip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cpu":
            torch.set_num_threads(threads or physical_cores())
        try:
            model = kind.from_pretrained(
                checkpoint.folder, dtype=torch.float32 if device == "cpu" else "auto", local_files_only=True,
                use_safetensors=True,
            ).to(device).eval()  # fmt: skip
        except (OSError, ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it knows the device
            raise InputError(f"cannot be opened: {str(error).splitlines()[0]}", path=path) from error
        engine = f"torch {torch.__version__}, transformers {load('transformers').__version__}, {device}"
        stored = next(iter(checkpoint.tensors.values())).dtype
        record = TeacherRecord(checkpoint.name, stored, engine, identity(checkpoint), 1.0)
        return cls(model, Tokenizer.open(path), record, device)

    def rows(self, input_ids: Ids, positions: NDArray[np.int64], reduce: Reducer, at: Doubles) -> Rows | None:
        if self._device != "cpu" and not isinstance(reduce, DeviceReducer):
            reduce = DeviceReducer(reduce)
        parts = []
        with self._torch.inference_mode():
            hidden = self._hidden(input_ids[: positions[-1] + 1])
            for part in self._slices(len(positions)):
                if self._interrupted:
                    return None
                wanted = self._torch.from_numpy(positions[part]).to(self._device)
                scores = self._scores(hidden[wanted])
                held = scores.numpy() if self._device == "cpu" else scores
                parts.append(reduce(held, input_ids[positions[part] + 1], at[part]))
        return Rows.joined(parts)

    def _slices(self, rows: int) -> Iterator[slice]:
        step = max(1, _SCORES_AT_A_TIME // self.vocabulary)
        return (slice(start, start + step) for start in range(0, rows, step))

    def _hidden(self, input_ids: Ids) -> Any:
        """The body's last state, shape (tokens, width)."""
        ids = self._torch.from_numpy(input_ids.astype(np.int64)).to(self._device)[None]
        return self._model.base_model(input_ids=ids, use_cache=False)[0][0]

    def _scores(self, hidden: Any) -> Any:
        """The head, and what some models do to its scores, in float32."""
        scores = self._head(hidden).float()
        config = self._model.config
        cap = getattr(config, "final_logit_softcapping", None)
        if cap:
            scores = self._torch.tanh(scores / cap) * cap
        return scores * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)

    def _check_head(self) -> None:
        """That body and head by themselves give what the model gives."""
        ids = np.arange(_PROBE, dtype=np.int32) % self.vocabulary
        with self._torch.inference_mode():
            inputs = self._torch.from_numpy(ids.astype(np.int64)).to(self._device)[None]
            whole = self._model(input_ids=inputs, use_cache=False).logits[0].float()
            alone = self._scores(self._hidden(ids))
        if not self._torch.allclose(whole, alone, rtol=1e-2, atol=1e-2):
            raise InputError(
                "this model does more to its scores than is known here", path=self.record.name,
                remedy="Convert it with gguforge convert and give the GGUF file.",
            )  # fmt: skip

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        self.tokenizer.close()
        self._model = self._head = None


class DeviceReducer(Reducer):
    """A reducer of scores that lie in a tensor on a device: what has vocabulary size stays there."""

    def __init__(self, like: Reducer) -> None:
        super().__init__(like.kind, like.size, like.vocabulary, like.temperature)
        self._torch = load("torch")

    def __call__(self, scores: Any, next_ids: Ids, at: Doubles) -> Rows:
        """As `Reducer`, from a float32 tensor, shape (rows, vocabulary)."""
        torch = self._torch
        lse = torch.logsumexp(scores, 1)
        if not bool(torch.isfinite(lse).all()):
            raise DataError("the teacher's scores are not finite numbers", remedy="Use another file of this teacher.")
        chosen = torch.from_numpy(next_ids.astype(np.int64)).to(scores.device)
        next_log_prob = (scores.gather(1, chosen[:, None])[:, 0] - lse).cpu().numpy()
        log_total = lse.cpu().numpy()
        if self.temperature != 1:
            scores = scores / self.temperature
            lse = torch.logsumexp(scores, 1)
        if self.kind == "sampled":
            return sampled_rows(pick(self._masses(scores), at), next_log_prob, log_total)
        log_probs = scores - lse[:, None]
        if self.kind == "full":
            return full_rows(log_probs.cpu().numpy(), next_log_prob, log_total)
        return self._top_k(log_probs, next_log_prob, log_total)

    def _masses(self, scores: Any) -> Masses:
        torch = self._torch
        mass = torch.exp(scores - scores.amax(1, keepdim=True))
        blocks = torch.nn.functional.pad(mass, (0, -mass.shape[1] % BLOCK)).reshape(len(mass), -1, BLOCK)
        flat = blocks.reshape(-1, BLOCK)
        return Masses(
            blocks.sum(2).cpu().numpy(), lambda wanted: flat[torch.from_numpy(wanted).to(flat.device)].cpu().numpy()
        )

    def _top_k(self, log_probs: Any, next_log_prob: Any, lse: Any) -> Rows:
        """Only the best come over."""
        best, ids = log_probs.topk(min(self.size, log_probs.shape[1]), dim=1)
        rows = top_k_rows(best.cpu().numpy(), self.size, next_log_prob, lse)
        columns = rows.ids.reshape(len(best), -1).astype(np.int64)
        return replace(rows, ids=np.take_along_axis(ids.cpu().numpy(), columns, 1).reshape(-1).astype(np.int32))


def identity(checkpoint: Checkpoint) -> str:
    """SHA-256 over a checkpoint's config, and name, type, shape and first bytes of each tensor, hexadecimal."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for tensor in checkpoint.tensors.values():
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            digest.update(file.read(min(_SAMPLE, tensor.nbytes)))
    return digest.hexdigest()
