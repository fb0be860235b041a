"""How much each tensor matters: the divergence of the model in which it alone is quantized coarsely.

Measured by the real kernels on a text, one evaluation a tensor. Results are kept in a file as they come, so a stopped
sweep goes on where it was, and one sweep serves every size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from gguforge.quant.files import replacing
from gguforge.quant.following import fingerprint
from gguforge.quant.plan import Plan
from gguforge.runtime.hybrid import hybrid
from gguforge.runtime.meter import Meter

Progress = Callable[[int, int], None]


def sensitivities(
    base: Plan,
    coarse: Plan,
    names: Sequence[str],
    meter: Meter,
    settings: str,
    store: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean divergence, nats, that each tensor causes when it alone comes from the coarse plan.

    Args:
        base: the unquantized model.
        coarse: the same model with every tensor in a coarse type.
        names: tensors to measure.
        meter: the text, and the reference.
        settings: what else the figures depend on (text, chunks), for the file.
        store: the file that keeps them; of another model, text or type it is begun anew.
        progress: called with how many are done, and their number.

    Raises:
        GGUForgeError: see `Meter.divergence`.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; what was measured is kept.
    """
    key = hashlib.sha256(f"{fingerprint(coarse)} {settings}".encode()).hexdigest()
    found = _read(store, key)
    tell = progress or (lambda done, total: None)
    for done, name in enumerate(names):
        tell(done, len(names))
        if name not in found:
            found[name] = meter.divergence(hybrid(base, coarse, [name]))
            _write(store, key, found)
    tell(len(names), len(names))
    return {name: found[name] for name in names}


def _read(store: Path, key: str) -> dict[str, float]:
    try:
        kept = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict) or kept.get("of") != key or not isinstance(kept.get("divergence"), dict):
        return {}
    return {str(name): float(value) for name, value in kept["divergence"].items()}


def _write(store: Path, key: str, found: dict[str, float]) -> None:
    data = json.dumps({"of": key, "divergence": found}, indent=1).encode()
    with replacing(store, len(data), overwrite=True) as part, open(part, "r+b") as file:
        file.write(data)
