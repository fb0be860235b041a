"""Byte-level vocabularies of older checkpoints: vocab.json and merges.txt, without a tokenizer.json.

How such a tokenizer cuts a text and what its special tokens are called is not in these files but in the class that
reads them, so the classes known here are few.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import TOKENIZER_LIMIT, Json
from gguforge.convert.vocabularies.bpe import BPE, checked_merges
from gguforge.convert.vocabularies.tables import AddedToken, added_tokens_file, added_tokens_of, checked_vocabulary
from gguforge.quant.errors import CheckpointError

VOCABULARY, MERGES = "vocab.json", "merges.txt"


@dataclass(frozen=True)
class TokenizerClass:
    """What transformers' class adds to the files.

    Attributes:
        pre: llama.cpp's name of its pre-tokenizer.
        names: its special tokens, where tokenizer_config.json names none.
        surrounds: whether it puts a token before and after every text, as RoBERTa does.
    """

    pre: str
    names: dict[str, str]
    surrounds: bool = False


END = "<|endoftext|>"
GPT2 = TokenizerClass("gpt-2", {"bos_token": END, "eos_token": END, "unk_token": END})
QWEN2 = TokenizerClass("qwen2", {"eos_token": END, "unk_token": END, "pad_token": END})
ROBERTA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
                 "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
ROBERTA = TokenizerClass("roberta-bpe", ROBERTA_NAMES, surrounds=True)
CLASSES = {"GPT2Tokenizer": GPT2, "Qwen2Tokenizer": QWEN2, "RobertaTokenizer": ROBERTA}
MODEL_TYPES = {"gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN2, "roberta": ROBERTA}
"""The class that transformers takes for a model whose files name none."""


def has_vocabulary_files(checkpoint: Checkpoint) -> bool:
    """Whether there is a vocab.json."""
    return checkpoint.has(VOCABULARY)


def read_vocabulary_files(checkpoint: Checkpoint) -> tuple[BPE, str]:
    """The tokenizer in vocab.json and merges.txt, and the name of its pre-tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged, or the tokenizer's class is not known.
    """
    if not checkpoint.has(MERGES):
        what = f"{MERGES} is missing beside {VOCABULARY}"
        raise CheckpointError(what, path=checkpoint.folder, remedy="Add it, or tokenizer.json.")
    found = _class(checkpoint)
    folder = checkpoint.folder
    vocabulary = checked_vocabulary(checkpoint.object(VOCABULARY, TOKENIZER_LIMIT), folder / VOCABULARY)
    merges = checked_merges(_merges(checkpoint.text(MERGES)), folder / MERGES)
    added = added_tokens_of(added_tokens_file(checkpoint), vocabulary, checkpoint, found.names)
    return BPE(_processing(found, added), vocabulary, merges, added), found.pre


def _processing(found: TokenizerClass, added: dict[int, AddedToken]) -> Json:
    """What a tokenizer.json would say of the tokens around a text; {} where the class puts none."""
    if not found.surrounds:
        return {}
    listed = [{"id": i, "content": token.text} for i, token in added.items()]
    return {"added_tokens": listed, "post_processor": {"type": "RobertaProcessing"}}


def _class(checkpoint: Checkpoint) -> TokenizerClass:
    configs = (checkpoint.object("tokenizer_config.json"), checkpoint.config)
    name = next((str(config["tokenizer_class"]) for config in configs if config.get("tokenizer_class")), None)
    kind = checkpoint.config.get("model_type")
    found = CLASSES.get(name.removesuffix("Fast")) if name is not None else MODEL_TYPES.get(str(kind))
    if found is None:
        remedy = "Save the tokenizer with transformers (AutoTokenizer.save_pretrained): it writes tokenizer.json."
        sides = {"expected": " or ".join(CLASSES), "found": str(name or kind)[:60]}
        raise CheckpointError(f"the class that reads {VOCABULARY} is not known", path=checkpoint.folder, remedy=remedy,
                              **sides)  # fmt: skip
    return found


def _merges(text: str) -> list[str]:
    """The lines of merges.txt: two words each, after a first line that may hold a version.

    >>> _merges("#version: 0.2\\n\u0120 t\\n\\nh e\\n")
    ['\u0120 t', 'h e']
    """
    lines = [line.strip() for line in text.split("\n")]
    return [" ".join(line.split()) for line in lines[lines[0].startswith("#") :] if line]
