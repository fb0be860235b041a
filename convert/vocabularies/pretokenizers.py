"""Which of llama.cpp's pre-tokenizers (`tokenizer.ggml.pre`) cuts a text as a tokenizer.json does.

llama.cpp has no general regex engine: it knows pre-tokenizers by name. The name is found from the structure of
tokenizer.json (its pre_tokenizer's steps and regular expressions), not from the ids of a test text, so a fine-tune with
added tokens is still recognised. Names of one regex differ only in flags: `ignore_merges`, and whether decoding tidies
spaces up. The regexes are those of the published tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguforge.convert.json_file import Json, objects
from gguforge.quant.errors import CheckpointError

Warn = Callable[[str], None]
Step = tuple[str, str]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_CASED_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = "|".join(f"{words}{_CONTRACTIONS}?" for words in _CASED)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
)
_HAN = r"[一-龥ࠀ-一가-퟿]+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

_BYTES: Step = ("bytes", "")
_GPT2: Step = ("bytes", "words")
_DIGIT: Step = ("digits", "each")


def _split(regex: str) -> Step:
    return "split", regex


STRUCTURES: dict[tuple[Step, ...], str] = {
    (_split(f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_END}"), _BYTES): "llama-bpe",
    (_split(f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_END}"), _BYTES): "qwen2",
    (
        _split(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _BYTES,
    ): "qwen35",
    (_GPT2,): "gpt-2",
    (_DIGIT, _GPT2): "smollm",
    (_split("|".join([*_CASED, r"\p{N}", _CASED_END])), _BYTES): "tekken",
    (_split("|".join([_GPT4O, r"\p{N}{1,3}", _CASED_END])), _BYTES): "gpt-4o",
    (
        _split(r"\p{N}{1,3}"),
        _split("[一-龥぀-ゟ゠-ヿ]+"),
        _split(_DEEPSEEK3 + r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
        _BYTES,
    ): "deepseek-v3",
    (_split(r"[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(_HAN), _DIGIT, _BYTES): "deepseek-coder",
    (("punctuation", ""), _GPT2, ("digits", "runs"), _split("[0-9][0-9][0-9]")): "falcon",
    (("punctuation", ""), _GPT2, _split("[0-9][0-9][0-9]")): "falcon",
    (_split(_BLOOM), _BYTES): "bloom",
    (_split(_BLOOM), _DIGIT, _BYTES): "viking",
    (
        _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"),
        _BYTES,
    ): "seed-coder",
    (_split(r"\p{N}{1,3}"), _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_END}"), _BYTES): "minicpm5",
}
"""Steps of a pre_tokenizer, in order, and the name that llama.cpp knows the whole by."""

DEEPSEEK_LLM_OPENING = (_split(r"[\r\n]"), _split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ"))
"""DeepSeek LLM's second regex goes on for 700 characters of letter ranges; its opening is enough."""

NAMES = frozenset(STRUCTURES.values()) | frozenset(
    """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bert-bge bert-bge-large chameleon chatglm-bpe codeshell command-r dbrx
    deepseek-llm deepseek-r1-qwen default exaone exaone-moe exaone4 f2llmv2 falcon-h1 falcon3 gigachat glm4
    gpt3-finnish granite-docling grok-2 hunyuan hunyuan-dense jais jais-2 jina-v1-en jina-v2-code jina-v2-en kanana2
    kimi-k2 kormo laguna lfm2 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minimax-m2 mpt olmo phi-2
    pixtral poro-chat refact roberta-bpe seed-coder smaug-bpe solar-open stablelm2 starcoder superbpe talkie
    tiny_aya trillion ufakzeka youtu
    """.split()  # noqa: SIM905 - sixty quotes less
)
"""Every name that `--pre` takes."""


def find_pretokenizer(tokenizer: Json, tidies_spaces: bool, path: Path) -> str:
    """The name for a tokenizer.json.

    Args:
        tokenizer: tokenizer.json.
        tidies_spaces: tokenizer_config.json's clean_up_tokenization_spaces.
        path: where tokenizer.json lies, for the message.

    Raises:
        CheckpointError: llama.cpp has no such pre-tokenizer, or its name is not known here.
    """
    steps = structure(tokenizer.get("pre_tokenizer"))
    name = STRUCTURES.get(steps)
    if name == "gpt-2" and _is_roberta(tokenizer):
        return "roberta-bpe"  # the same cuts; llama.cpp then adds the separator that RoBERTa puts between texts
    if (
        name is None
        and len(steps) > 2
        and steps[0] == DEEPSEEK_LLM_OPENING[0]
        and steps[1][1].startswith(DEEPSEEK_LLM_OPENING[1][1])
    ):
        name = "deepseek-llm"
    if name is None:
        shown = " + ".join(kind + (f" {detail[:30]!r}" if detail else "") for kind, detail in steps) or "none"
        remedy = "If you know which of llama.cpp's it equals, give it with --pre NAME."
        raise CheckpointError("pre_tokenizer is not known", path=path, found=shown, remedy=remedy)
    model = tokenizer.get("model")
    ignores_merges = isinstance(model, dict) and model.get("ignore_merges") is True
    if name == "llama-bpe" and not ignores_merges and not _begins_with_bos(tokenizer):
        return "smaug-bpe"  # the same cuts, without taking whole words from the vocabulary first
    if name == "smollm" and tidies_spaces:
        return "starcoder"
    return name


def _is_roberta(tokenizer: Json) -> bool:
    processor = tokenizer.get("post_processor")
    return isinstance(processor, dict) and processor.get("type") == "RobertaProcessing"


def _begins_with_bos(tokenizer: Json) -> bool:
    """Whether a template puts a token before every text, as Llama 3's does."""
    processor = tokenizer.get("post_processor")
    parts = objects(processor.get("processors", [processor])) if isinstance(processor, dict) else []
    return any("SpecialToken" in step for part in parts for step in objects(part.get("single"))[:1])


def structure(pre_tokenizer: object) -> tuple[Step, ...]:
    r"""The steps of a pre_tokenizer in a form that can be looked up.

    How a split treats its matches (isolated, or the rest removed) is left out: for regexes that match everything, and
    these do, it comes to the same.

    >>> structure({"type": "Split", "pattern": {"Regex": "\\s+\n"}, "behavior": "Isolated", "invert": False})
    (('split', '\\s+\\n'),)
    """
    if not isinstance(pre_tokenizer, dict):
        return ()
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            return tuple(step for part in steps for step in structure(part))
        case {"type": "Split", "pattern": {"Regex": str(regex)} | {"String": str(regex)}}:
            return (_split(_canonical(regex)),)
        case {"type": "Digits"}:
            return (("digits", "each" if pre_tokenizer.get("individual_digits") else "runs"),)
        case {"type": "ByteLevel"}:
            return (_GPT2 if pre_tokenizer.get("use_regex", True) else _BYTES,)
        case {"type": "Punctuation"}:
            return (("punctuation", ""),)
        case _:
            return ((str(pre_tokenizer.get("type")).lower()[:30], ""),)


def _canonical(regex: str) -> str:
    """One spelling for regexes that mean the same: escapes for line breaks, no `{1}`."""
    return regex.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t").replace("{1}", "")


def normalizer_metadata(tokenizer: Json, warn: Warn) -> dict[str, bool]:
    """Lower-casing and accent stripping, which llama.cpp can do; other normalizers are reported.

    Unicode composition (NFC) and the handling of spaces are passed over: llama.cpp's tokenizers assume them done.
    """
    flags: dict[str, bool] = {}

    def read(normalizer: Json) -> None:
        kind = normalizer.get("type")
        if kind == "Sequence":
            for part in objects(normalizer.get("normalizers")):
                read(part)
        elif kind == "Lowercase":
            flags["lowercase"] = True
        elif kind == "StripAccents":
            flags["strip_accents"] = True
        elif kind == "BertNormalizer":
            flags.update({name: normalizer[name] for name in ("lowercase", "strip_accents")
                          if isinstance(normalizer.get(name), bool)})  # fmt: skip
            if normalizer.get("handle_chinese_chars") is False:
                warn("tokenizer.json: llama.cpp cuts every Chinese character apart, which this tokenizer does not")
        elif kind not in ("NFC", "Prepend", "Replace"):
            warn(
                f"tokenizer.json: normalizer {str(kind)[:40]} is not applied by llama.cpp: texts may be cut differently"
            )

    if isinstance(normalizer := tokenizer.get("normalizer"), dict):
        read(normalizer)
    return {name: flags[name] for name in ("lowercase", "strip_accents") if name in flags}
