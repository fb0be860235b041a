"""The shape of the house: what may lean on what, what starts quickly, what is never imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_USE = {
    "quant": {"quant"},
    "convert": {"convert", "quant"},
    "runtime": {"runtime", "quant"},
    "distill": {"distill", "runtime", "convert", "quant"},
    "cli": {"cli", "distill", "runtime", "convert", "quant"},
}
TORCH_ITSELF = ("distill/demo/", "distill/muon.py")  # made of torch's classes; imported inside functions
SOURCES = [path for stage in MAY_USE for path in sorted((ROOT / stage).rglob("*.py"))]


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_runs_back_up(path: Path) -> None:
    stage = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("gguforge.")}
    assert used <= MAY_USE[stage]
    if stage != "cli":
        assert "click" not in set(imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_giants_stay_out(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    distill = name.startswith("distill/")  # may import them inside functions
    roots = {name.split(".")[0] for name in imports(path, top_level=distill)}
    assert "transformers" not in roots
    if not name.startswith(TORCH_ITSELF):
        assert "torch" not in roots
        assert "gguforge.distill.muon" not in set(imports(path, top_level=distill))


def modules_after(statement: str) -> set[str]:
    """Modules that are loaded after a statement, in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("stage", MAY_USE)
def test_stages_are_light_to_import(stage: str) -> None:
    heavy = {"torch", "transformers", "tokenizers", "llama_cpp", "requests", "jinja2"}
    assert not heavy & modules_after(f"import gguforge.{stage}")


def test_converting_never_loads_torch_or_transformers() -> None:
    loaded = modules_after("import gguforge.convert.conversion")
    assert not {"torch", "transformers", "tokenizers", "llama_cpp"} & loaded
