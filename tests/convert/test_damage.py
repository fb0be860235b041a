"""Any damage to a checkpoint's small files ends in a plan or in our own one-line error, never in another exception."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import encoder_checkpoints
import learned_checkpoints
import pytest
from checkpoints import CASES, LLAMA, TEMPLATE, Case, build
from encoder_checkpoints import sentence_transformer

from gguforge.convert import plan
from gguforge.quant.errors import GGUForgeError

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**40,
    1e300,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [None],
    ["a", 1],
    {},
    {"a": None},
    {"id": 3},
]
FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "vocab.json", "added_tokens.json", "modules.json", "1_Pooling/config.json",
)  # fmt: skip
POOLED = sentence_transformer(pooling_mode_cls_token=True)
OWN_CASES = {
    "rope": CASES["llama-yarn"],
    "bos": CASES["llama-byte-level-bos"],
    "gpt2": learned_checkpoints.CASES["gpt2-vocabulary-files-named"],
    "bert": encoder_checkpoints.bert(files=encoder_checkpoints.FILES | POOLED),
    "roberta": encoder_checkpoints.CASES["roberta"],
    "xlm": encoder_checkpoints.CASES["xlm-roberta-json"],
}
SEEDS = range(120)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value; of long tables, the first few."""
    here = [path] if path else []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return here + [place for key, item in items[:12] for place in places(item, (*path, key))]


def damaged(value: Any, dice: random.Random) -> Any:
    """The same JSON with one value replaced or removed."""
    copy = json.loads(json.dumps(value))
    *parents, last = dice.choice(places(copy))
    holder = copy
    for key in parents:
        holder = holder[key]
    if isinstance(holder, dict) and dice.random() < 0.2:
        del holder[last]
    else:
        holder[last] = dice.choice(ODD)
    return copy


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_fallback", "byte_level", *OWN_CASES])
def test_damaged_json_is_planned_or_refused(kind: str, tmp_path: Path) -> None:
    case = OWN_CASES.get(kind) or Case(
        LLAMA,
        kind,
        files={
            "generation_config.json": {"temperature": 0.5, "top_k": 3},
            "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "additional_special_tokens": ["<x>"]},
            "chat_template.jinja": TEMPLATE,
        },
    )
    folder = build(case, tmp_path)
    sound = {name: json.loads((folder / name).read_text("utf-8")) for name in FILES if (folder / name).exists()}
    for seed in SEEDS if kind in ("byte_level", "sentencepiece") else SEEDS[:60]:
        dice = random.Random(f"{kind} {seed}")
        name = dice.choice(list(sound))
        text = json.dumps(damaged(sound[name], dice))
        (folder / name).write_text(text, "utf-8")
        try:
            assert plan(folder, warn=lambda line: None).header  # packing the metadata is part of planning
        except GGUForgeError:
            pass
        except Exception as error:  # noqa: BLE001 - this is what the test looks for
            pytest.fail(f"{name}: {error!r} for {text[:300]}")
        (folder / name).write_text(json.dumps(sound[name]), "utf-8")


def test_damaged_sentencepiece_models_are_planned_or_refused(tmp_path: Path) -> None:
    folder = build(Case(LLAMA), tmp_path)
    sound = (folder / "tokenizer.model").read_bytes()
    dice = random.Random(7)
    for _ in SEEDS:
        data = bytearray(sound)
        for _ in range(dice.choice([1, 3])):
            data[dice.randrange(len(data))] = dice.randrange(256)
        (folder / "tokenizer.model").write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
        with suppress(GGUForgeError):
            assert plan(folder, warn=lambda line: None).header
