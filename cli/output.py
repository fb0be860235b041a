"""What is said of a model that is, or would be, written: sizes, needs, types, rules."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import in_words, table
from gguforge.quant.errors import printable

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan


@dataclass(frozen=True)
class Output:
    """The files of one model.

    Attributes:
        label: the type's name.
        files: each file with its plan.
    """

    label: str
    files: list[tuple[Path, Plan]]

    @property
    def name(self) -> str:
        """The file; of several, the first, and how many they are."""
        first, count = self.files[0][0], len(self.files)
        return str(first) if count == 1 else f"{first} and {count - 1} more"

    @cached_property
    def whole(self) -> Plan:
        """The tensors of all files in one plan."""
        from gguforge.quant.plan import Plan

        return Plan({}, tuple(tensor for _, plan in self.files for tensor in plan.tensors))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(plan.size for _, plan in self.files)

    @property
    def size_in_words(self) -> str:
        """Size and bits per weight, for people."""
        return f"{in_words(self.size)}, {self.whole.bits_per_weight:.2f} bits per weight"

    def summary(self) -> dict[str, Any]:
        """The facts that `--json` prints."""
        from gguforge.quant.quantize import types_count

        types = types_count(self.whole).items()
        return {
            "output": str(self.files[0][0]),
            "files": [
                {"path": str(path), "bytes": plan.size, "tensors": len(plan.tensors)} for path, plan in self.files
            ],
            "type": self.label,
            "bytes": self.size,
            "bits_per_weight": round(self.whole.bits_per_weight, 4),
            "tensors": len(self.whole.tensors),
            "weights": self.whole.elements,
            "types": {kind.name: {"tensors": n, "bytes": nbytes} for kind, (n, nbytes) in types},
            "fallbacks": [
                {"tensor": t.name, "row_length": t.row_length, "wanted": t.fallback.name, "type": t.type.name}
                for t in self.whole.tensors
                if t.fallback is not None
            ],
        }

    def needs(self, workers: int | None) -> dict[str, int | None]:
        """Memory and disk that writing takes, in bytes; what is free is None where the folder is missing."""
        from gguforge.quant.writer import peak_memory

        folder = self.files[0][0].absolute().parent
        free = shutil.disk_usage(folder).free if folder.is_dir() else None
        memory = max(peak_memory(plan, workers) for _, plan in self.files)
        return {"memory_bytes": memory, "disk_bytes": self.size, "disk_free_bytes": free}

    def print_dry_run(self, workers: int | None) -> None:
        """What writing will cost."""
        from gguforge.quant.quantize import types_count
        from gguforge.quant.writer import default_workers

        need = self.needs(workers)
        free = need["disk_free_bytes"]
        workers = workers or max(default_workers(plan) for _, plan in self.files)
        for path, plan in self.files:
            part = f"  {plan.size:,} bytes, {len(plan.tensors)} tensors" if len(self.files) > 1 else ""
            click.echo(f"output  {path}{part}")
        click.echo(f"size    {self.size:,} bytes ({self.size_in_words})")
        most = in_words(need["memory_bytes"] or 0)
        click.echo(f"memory  at most {most} for {workers} worker{'s' if workers > 1 else ''}")
        left = f" ({in_words(free)} free)" if free is not None else ""
        click.echo(f"disk    {in_words(self.size)} in {self.files[0][0].absolute().parent}{left}")
        click.echo()
        rows = [["type", "tensors", "bytes"]]
        rows += [[kind.name, str(count), f"{nbytes:,}"] for kind, (count, nbytes) in types_count(self.whole).items()]
        click.echo(table(rows, right=(1, 2)))

    def print_explanation(self) -> None:
        """Name, type and the rule that chose it, a line each."""
        rows = [["name", "type", "rule"]]
        rows += [[printable(tensor.name), tensor.type.name, tensor.reason] for tensor in self.whole.tensors]
        click.echo(table(rows))

    def print_fallbacks(self) -> None:
        """Say on stderr which tensors got another type than the preset wanted, and why; equal cases share a line."""
        groups: dict[tuple[str, str, int], list[str]] = {}
        for tensor in self.whole.tensors:
            if tensor.fallback is not None:
                groups.setdefault((tensor.fallback.name, tensor.type.name, tensor.row_length), []).append(tensor.name)
        for (wanted, got, length), names in groups.items():
            shown = printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            click.echo(f"{got} instead of {wanted} (rows of {length} are no whole number of blocks): {shown}", err=True)
