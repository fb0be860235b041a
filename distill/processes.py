"""One process, or the several of `torchrun`, each with a copy of the student and documents of its own."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguforge.distill.students import load
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 1 << 24  # elements that are averaged at once
POLL = 0.2  # seconds between two looks for a word


@dataclass(frozen=True)
class Group:
    """This process among all.

    Attributes:
        number, count: 0 and 1 when it is alone.
        device: torch's device.
        store: what all of them can write and read; None when it is alone.
    """

    number: int
    count: int
    device: Any
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.number == 0

    def average(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its mean over all processes; None counts for nothing anywhere."""
        if self.count == 1:
            return
        import torch

        bucket: list[Tensor] = []
        for tensor in (one for one in tensors if one is not None):
            bucket.append(tensor)
            if sum(one.numel() for one in bucket) >= BUCKET:
                self._average(torch, bucket)
                bucket = []
        if bucket:
            self._average(torch, bucket)

    def _average(self, torch: Any, bucket: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()

    def say(self, name: str, word: str) -> None:
        """In the first process: let the others hear a word."""
        if self.store is not None:
            self.store.set(name, word)

    def hear(self, name: str) -> str:
        """In the others: what the first one said under a name, however long that takes."""
        while not self.store.check([name]):
            time.sleep(POLL)
        return str(self.store.get(name).decode())


@contextlib.contextmanager
def processes(device: str, threads: int = 0) -> Iterator[Group]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        threads: of the CPU; 0 for torch's choice.

    Raises:
        InputError: there is no such device here.
        MissingExtraError: torch is not installed.
    """
    torch = load("torch")
    if threads:
        torch.set_num_threads(threads)
    chosen = _device(torch, device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Group(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store, number, count = next(torch.distributed.rendezvous("env://"))
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    ours, theirs = (torch.distributed.PrefixStore(name, store) for name in ("gguforge", "torch"))
    torch.distributed.init_process_group(backend, store=theirs, rank=number, world_size=count)
    try:
        yield Group(number, count, chosen, ours)
    finally:
        torch.distributed.destroy_process_group()


def _device(torch: Any, wanted: str) -> Any:
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has[wanted]:
        raise InputError(f"there is no {wanted} here", remedy="Set hardware.device to 'auto'.")
    return torch.device(wanted, int(os.environ.get("LOCAL_RANK", "0"))) if wanted == "cuda" else torch.device(wanted)
