"""WordPiece vocabularies, BERT's kind: tokenizer.json, or vocab.txt with one token a line.

llama.cpp marks the beginning of a word where WordPiece marks its continuation, so every token is rewritten: `##ing`
becomes `ing`, and `run` gets the block that stands for a space before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import TOKENIZER_LIMIT, Json
from gguforge.convert.vocabularies.special import content
from gguforge.convert.vocabularies.tables import (
    AddedToken,
    added_tokens_file,
    added_tokens_of,
    base_tokens,
    checked_model,
    checked_vocabulary,
)
from gguforge.convert.vocabularies.tokens import META_SPACE, Kind, Token, added
from gguforge.quant.errors import CheckpointError

FILE_NAME, LINES_NAME = "tokenizer.json", "vocab.txt"
CONTINUED = "##"
NAMES = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
"""The special tokens of BertTokenizer, where tokenizer_config.json names none."""

KNOWN_WORDS = {"the": (1996, "jina-v2-en"), "\u7684": (4638, "bert-bge-large")}
"""Two published vocabularies, told by the id of their language's commonest word: English uncased and Chinese.

llama.cpp's converter names them so; llama.cpp itself reads the name for byte-level vocabularies only.
"""

ASSUMED = {"cls": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103}
"""The ids that llama.cpp assumes where a file has none: those of BERT's own vocabularies."""


@dataclass(frozen=True)
class WordPiece:
    """A WordPiece tokenizer.

    Attributes:
        json: tokenizer.json without its vocabulary, {} for a vocab.txt.
        path: the file it was read from.
        vocabulary: id by text.
        added: added tokens by id.
    """

    json: Json
    path: Path
    vocabulary: dict[str, int]
    added: dict[int, AddedToken]

    @property
    def pre(self) -> str:
        """The name that llama.cpp's converter has for this vocabulary."""
        named = (name for word, (i, name) in KNOWN_WORDS.items() if self.vocabulary.get(word) == i)
        return next(named, "default")

    def unusual_ids(self, checkpoint: Checkpoint) -> dict[str, int]:
        """The ids of a vocab.txt's special tokens by role, where llama.cpp would assume others."""
        if self.json:
            return {}
        config = checkpoint.object("tokenizer_config.json")
        ids = {token.text: i for i, token in self.added.items()}
        texts = {role: content(config.get(f"{role}_token")) or NAMES[f"{role}_token"] for role in ASSUMED}
        found = {role: ids[text] for role, text in texts.items() if ids.get(text, ASSUMED[role]) != ASSUMED[role]}
        return {"bos" if role == "cls" else role: i for role, i in found.items()}

    def unusual_normalizer(self, checkpoint: Checkpoint) -> dict[str, bool]:
        """What a vocab.txt's tokenizer does to a text, if it is not llama.cpp's assumption: lower case, no accents."""
        config = checkpoint.object("tokenizer_config.json")
        lowers, strips = config.get("do_lower_case", True) is not False, config.get("strip_accents")
        flags = {} if lowers else {"lowercase": False}
        return flags | ({"strip_accents": strips} if isinstance(strips, bool) and strips != lowers else {})


def read_wordpiece(checkpoint: Checkpoint) -> WordPiece:
    """Read tokenizer.json or, without one, vocab.txt.

    Raises:
        CheckpointError: there is neither, it is damaged, or it holds another kind of tokenizer.
    """
    if not checkpoint.has(FILE_NAME):
        return _read_lines(checkpoint)
    path = checkpoint.folder / FILE_NAME
    tokenizer = checkpoint.object(FILE_NAME, TOKENIZER_LIMIT)
    model = checked_model(tokenizer, "WordPiece", path)
    prefix = model.get("continuing_subword_prefix", CONTINUED)
    if prefix != CONTINUED:
        what = "continued words are marked otherwise than llama.cpp expects"
        raise CheckpointError(what, path=path, expected=CONTINUED, found=repr(prefix)[:60])
    vocabulary = checked_vocabulary(model.pop("vocab", None), path)
    return WordPiece(tokenizer, path, vocabulary, added_tokens_of(tokenizer, vocabulary, checkpoint))


def _read_lines(checkpoint: Checkpoint) -> WordPiece:
    path = checkpoint.folder / LINES_NAME
    if not checkpoint.has(LINES_NAME):
        remedy = f"Add {FILE_NAME} or {LINES_NAME}."
        raise CheckpointError("there is no tokenizer that can be read", path=checkpoint.folder, remedy=remedy)
    lines = checkpoint.text(LINES_NAME).removesuffix("\n").split("\n")
    vocabulary = {text: i for i, text in enumerate(lines)}  # of equal lines the last one counts, as in BERT's own code
    names = {name: text for name, text in NAMES.items() if text in vocabulary}
    return WordPiece(
        {}, path, vocabulary, added_tokens_of(added_tokens_file(checkpoint), vocabulary, checkpoint, names)
    )


def wordpiece_tokens(tokenizer: WordPiece, vocab_size: int) -> list[Token]:
    """The vocabulary in llama.cpp's spelling, padded to `vocab_size`.

    Raises:
        CheckpointError: the tokenizer has ids beyond `vocab_size`, or two tokens would be spelled alike, which
            llama.cpp does not survive.
    """
    tokens = base_tokens(tokenizer.vocabulary, tokenizer.added, vocab_size, tokenizer.path)
    for i, own in tokenizer.added.items():
        tokens[i] = added(own.text, own.special)
    spelled = [Token(_spelled(token), token.kind) for token in tokens]
    first: dict[str, int] = {}
    for i, token in enumerate(spelled):
        if first.setdefault(token.text, i) != i:
            found = f"ids {first[token.text]} and {i} are both {token.text[:40]!r}"
            raise CheckpointError("two tokens are spelled alike", path=tokenizer.path, found=found)
    return spelled


def _spelled(token: Token) -> str:
    if token.kind == Kind.CONTROL:
        return token.text
    return token.text.removeprefix(CONTINUED) if token.text.startswith(CONTINUED) else META_SPACE + token.text
