"""The small plan of the tests of files, and what must become of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import small_plan

from gguforge.quant.plan import Plan
from gguforge.quant.writer import write


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return small_plan(tmp_path)


@pytest.fixture
def whole(plan: Plan, tmp_path: Path) -> bytes:
    """What the plan's file must be."""
    write(plan, tmp_path / "whole.gguf", workers=1)
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "whole.gguf").unlink()
    return data
