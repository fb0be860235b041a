"""The architectures that can be converted, by Hugging Face class name."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from gguforge.convert.architectures.base import Architecture
from gguforge.convert.architectures.bert import BERT, DISTILBERT
from gguforge.convert.architectures.gpt2 import GPT2
from gguforge.convert.architectures.llama import LLAMA, MISTRAL
from gguforge.convert.architectures.qwen import QWEN2, QWEN3
from gguforge.convert.architectures.roberta import ROBERTA, XLM_ROBERTA
from gguforge.convert.json_file import Json
from gguforge.quant.errors import CheckpointError

ARCHITECTURES: dict[str, Architecture] = {
    name: architecture
    for architecture in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, BERT, DISTILBERT, ROBERTA, XLM_ROBERTA)
    for name in architecture.classes
}


def find_architecture(config: Json, path: Path) -> Architecture:
    """The architecture that config.json names.

    Raises:
        CheckpointError: it names none, or an unknown one; the nearest known names are given.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            "field 'architectures' is missing", path=path, expected="for example ['LlamaForCausalLM']"
        )
    if names[0] in ARCHITECTURES:
        return ARCHITECTURES[names[0]]
    near = get_close_matches(names[0], ARCHITECTURES, n=3, cutoff=0.6) or sorted(ARCHITECTURES)
    raise CheckpointError(
        f"architecture {names[0][:80]!r} is not known", path=path, remedy=f"Known: {', '.join(near)}."
    )
