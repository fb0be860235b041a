"""Shards by a pool of two Ray actors on this machine are those of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gguforge.distill.collect import Progress, collect
from gguforge.distill.collector import Settings
from gguforge.distill.teachers.open import TeacherSource
from gguforge.quant.errors import InputError

pytestmark = pytest.mark.slow
SETTINGS = Settings(context=64, shard_bytes=600)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    package = pytest.importorskip("ray")
    pytest.importorskip("pandas")
    package.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield package
    package.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_two_actors_make_what_one_process_makes(ray: Any, tmp_path: Path, teacher: Path, text: Path) -> None:
    from gguforge.distill.cluster import collect_with_ray

    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    sources = [TeacherSource(str(teacher), threads=1)]
    alone = collect(sources, [lines], tmp_path / "alone", SETTINGS)
    states: list[Progress] = []
    pool = collect_with_ray(sources, [lines], tmp_path / "pool", SETTINGS, workers=2, progress=states.append)
    assert (pool.made, pool.missing, pool.tokens) == (alone.made, 0, alone.tokens)
    assert pool.made > 2
    assert len(states) == pool.made
    assert states[-1].done == states[-1].total
    assert states[-1].tokens == alone.tokens
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "pool" / path.name).read_bytes() == path.read_bytes()
    again = collect_with_ray(sources, [lines], tmp_path / "pool", SETTINGS, workers=2)
    assert (again.made, again.kept) == (0, pool.made)
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps([{"role": "user", "content": "hello"}, {"role": "tool", "content": 1}]) + "\n")
    with pytest.raises(InputError, match="line 1 is neither"):
        collect_with_ray(sources, [talk], tmp_path / "talk", SETTINGS, workers=2)
