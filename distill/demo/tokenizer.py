"""The demo model's tokenizer: sentencepiece BPE with byte fallback, and ChatML around the turns.

A text is cut into ids exactly as llama.cpp does it, so that the model meets in the chat what it met in training:
no space is put before a text, no white space is changed, a newline is always one byte token, and the parts of the
template are cut apart from what the user wrote (so no text can forge the end of a turn).
Formats: sentencepiece's `tokenizer.model`, Hugging Face's `tokenizer_config.json`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

START, END = "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], size: int) -> bytes:
    """The content of a `tokenizer.model` with `size` pieces; the same texts always give the same pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        control_symbols=[START, END],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Tokenizer:
    """Cuts conversations into ids.

    Args:
        model: the content of a `tokenizer.model`.
    """

    def __init__(self, model: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.start: int = self.processor.piece_to_id(START)
        self.end: int = self.processor.piece_to_id(END)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text; a special token written in it is text like any other."""
        ids: list[int] = self.processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.processor.decode(ids)
        return text

    def turn(self, role: str, content: str) -> tuple[list[int], list[bool]]:
        """The ids of one turn, and which of them the assistant says itself (its words and the end of its turn)."""
        said = [*self.encode(content), self.end]
        opening = [self.start, *self.encode(f"{role}\n")]
        closing = self.encode("\n")
        wanted = [False] * len(opening) + [role == "assistant"] * len(said) + [False] * len(closing)
        return opening + said + closing, wanted

    def conversation(self, turns: Iterable[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """The ids of (role, content) turns and the mask of what the assistant says, both of one length."""
        ids: list[int] = []
        wanted: list[bool] = []
        for role, content in turns:
            some, mask = self.turn(role, content)
            ids += some
            wanted += mask
        return ids, wanted

    def prompt(self, question: str) -> list[int]:
        """The ids after which the assistant answers `question`."""
        return [*self.turn("user", question)[0], self.start, *self.encode("assistant\n")]

    def pieces(self) -> Iterator[str]:
        return (self.processor.id_to_piece(i) for i in range(self.processor.vocab_size()))


def tokenizer_config(model: bytes, context: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    tokenizer = Tokenizer(model)
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": END,
        "unk_token": "<unk>",
        "legacy": False,
        "model_max_length": context,
        "added_tokens_decoder": {
            str(tokenizer.start): {"content": START, **special},
            str(tokenizer.end): {"content": END, **special},
        },
        "chat_template": CHAT_TEMPLATE,
    }
