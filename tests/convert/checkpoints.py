"""Tiny checkpoints made from nothing but NumPy: the inputs of the golden tests and of the attacks.

Everything is deterministic down to the bit (weights come from integer hashing, not from a random generator), so that
the manifests in golden.json, made once with llama.cpp's converter by make_goldens.py, stay true on every machine.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gguforge.convert.vocabularies.bpe import byte_characters

VOCAB = 320
TEXT = "the quick brown fox jumps over the lazy dog; she sells sea shells on the shore, and then the other thing"
SPECIALS = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def like(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A config with some fields changed; None takes a field out."""
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


MISTRAL = like(LLAMA, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096)
QWEN2 = like(
    LLAMA, architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False, rope_theta=1000000.0
)
QWEN3 = like(LLAMA, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32, attention_bias=False)
SMALL_K = like(LLAMA, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        config: config.json.
        tokenizer: "sentencepiece", "byte_fallback", "byte_level", or "none" where `files` has it.
        dtype: of the weights, F32, F16 or BF16.
        shards: number of files.
        pre: the name the byte-level tokenizer stands for.
        files: further files by name, text or JSON.
        extra: further tensors by name.
        tensors: all tensors by name, where they are not a Llama-like decoder's.
        type: the output type asked for.
        folder: the folder's name, which goes into the metadata.
    """

    config: Mapping[str, Any]
    tokenizer: str = "sentencepiece"
    dtype: str = "BF16"
    shards: int = 1
    pre: str = "llama-bpe"
    files: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] | None = None
    type: str = "AUTO"
    folder: str = "Tiny-1M-Instruct-v0.3"


def build(case: Case, parent: Path) -> Path:
    """Write the checkpoint and return its folder."""
    folder = parent / case.folder
    folder.mkdir(parents=True)
    files: dict[str, Any] = {"config.json": dict(case.config)} | TOKENIZERS[case.tokenizer](case) | dict(case.files)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(
                content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8", newline="\n"
            )
    write_shards(folder, {name: weights(name, shape, case.dtype) for name, shape in shapes(case).items()}, case.shards)
    return folder


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Every tensor that such a config stands for."""
    if case.tensors is not None:
        return {**case.tensors, **case.extra}
    c = case.config
    hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head, c.get("num_key_value_heads", c["num_attention_heads"]) * head
    family = c["model_type"]
    table = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not c.get("tie_word_embeddings"):
        table["lm_head.weight"] = (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden), "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }  # fmt: skip
        if family == "qwen2" or c.get("attention_bias"):
            layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if family == "llama" and c.get("attention_bias"):
            layer["self_attn.o_proj.bias"] = (hidden,)
        if c.get("mlp_bias"):
            layer |= {"mlp.gate_proj.bias": (ffn,), "mlp.up_proj.bias": (ffn,), "mlp.down_proj.bias": (hidden,)}
        if family == "qwen3":
            layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        table |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return table | dict(case.extra)


def weights(name: str, shape: tuple[int, ...], dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """Numbers between -0.5 and 0.5 (norms around 1), from hashing the tensor's name and the element's position."""
    count = int(np.prod(shape))
    seed = np.uint64(zlib.crc32(name.encode()))
    hashed = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + seed * np.uint64(40503)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    numbers = (hashed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    if name.endswith("norm.weight"):
        numbers += np.float32(1)
    return dtype, shape, encode(numbers, dtype)


def encode(numbers: np.ndarray, dtype: str) -> bytes:
    """Numbers as safetensors stores them; bfloat16 by cutting the lower half off."""
    if dtype == "BF16":
        return (np.asarray(numbers, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I32": "<i4", "I8": "i1"}
    return np.asarray(numbers).astype(kinds[dtype]).tobytes()


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def write_shards(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], shards: int) -> None:
    """All tensors in `shards` files, with an index if there are several."""
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        (folder / name).write_bytes(safetensors(part))
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(len(data) for _, _, data in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def learn_merges(symbols: list[list[str]], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding, the slow and readable way; ties go to the pair that sorts first."""
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: dict[tuple[str, str], int] = {}
        for word in symbols:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = [_merged(word, best) for word in symbols]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for symbol in word:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def _spm_symbols() -> list[list[str]]:
    return [list("\u2581" + word) for word in TEXT.split(" ")]


def spm_pieces() -> list[tuple[str, float, int]]:
    """Text, score and type of every piece: specials, bytes, merged pieces, single characters."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [
        (f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)
    ]
    texts = list(dict.fromkeys(left + right for left, right in learn_merges(_spm_symbols(), 20)))
    texts += sorted({c for word in _spm_symbols() for c in word})
    return pieces + [(text, -float(i), 1) for i, text in enumerate(texts)]


def sentencepiece_model(
    pieces: list[tuple[str, float, int]] | None = None, kind: int = 2, charsmap: bytes = b""
) -> bytes:
    """The protobuf that sentencepiece would write for these pieces: a BPE model (2) or a Unigram one (1)."""
    listed = spm_pieces() if pieces is None else pieces

    def number(tag: int, value: int) -> bytes:
        out = bytes([tag << 3])
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def block(tag: int, data: bytes) -> bytes:
        return bytes([tag << 3 | 2]) + number(0, len(data))[1:] + data

    body = b"".join(
        block(1, block(1, text.encode()) + bytes([2 << 3 | 5]) + np.float32(score).tobytes() + number(3, type_))
        for text, score, type_ in listed
    )
    trainer = (
        number(3, kind) + number(4, len(listed)) + (b"\x98\x02\x01" if kind == 2 else b"")
    )  # BPE, size, byte_fallback (field 35)
    normalizer = (
        block(1, b"identity")
        + (block(2, charsmap) if charsmap else b"")
        + number(3, 1)
        + number(4, int(kind == 1))
        + number(5, 1)
    )
    return body + block(2, trainer) + block(3, normalizer)


def _added(texts: list[str], first: int, special: bool = True) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return [{"id": first + i, "content": text, **flags} for i, text in enumerate(texts)]


def _sentencepiece(case: Case) -> dict[str, Any]:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
              "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}  # fmt: skip
    return {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": config}


def _byte_fallback(case: Case) -> dict[str, Any]:
    vocabulary = {text: i for i, (text, _, _) in enumerate(spm_pieces())}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": _added(SPECIALS, 0),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [start, a], "pair": [start, a, start, b],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": [f"{a} {b}" for a, b in learn_merges(_spm_symbols(), 20)]},
    }  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _byte_level(case: Case) -> dict[str, Any]:
    by_byte = {byte: c for c, byte in byte_characters().items()}
    words = [[by_byte[byte] for byte in (" " + word).encode()] for word in TEXT.split(" ")]
    merges = learn_merges(words, 40)
    texts = [by_byte[byte] for byte in range(256)] + [left + right for left, right in merges]
    base = len(texts)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": _added(specials, base) + _added(["<tool_call>", "caf\u00e9"], base + 3, special=False),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": PRE_TOKENIZERS[case.pre],
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": case.pre == "llama-bpe",
                  "vocab": {text: i for i, text in enumerate(texts)}, "merges": [[a, b] for a, b in merges]},
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "unk_token": None, "clean_up_tokenization_spaces": False}  # fmt: skip
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


TOKENIZERS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "sentencepiece": _sentencepiece,
    "byte_fallback": _byte_fallback,
    "byte_level": _byte_level,
    "none": lambda case: {},
}


def _split_then_bytes(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[str, Any] = {
    "llama-bpe": _split_then_bytes(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": _split_then_bytes(_WORDS + r"\p{N}" + _REST),
    "gpt-2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "smollm": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
}  # fmt: skip

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}  # fmt: skip
LLAMA3_BOS = {"type": "Sequence", "processors": [
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    {"type": "TemplateProcessing",
     "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
     "pair": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "<|endoftext|>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
     "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [296], "tokens": ["<|endoftext|>"]}}},
]}  # fmt: skip


def _tokenizer(pre: str, **changes: Any) -> dict[str, Any]:
    return _byte_level(Case(LLAMA, pre=pre))["tokenizer.json"] | changes


CARD = """---
license: apache-2.0
license_name: own
license_link: https://example.org/license
language:
- en
- no
tags: [text-generation, tiny]
pipeline_tag: text-generation
base_model:
- example-org/Base-7B-v0.1
- https://huggingface.co/example-org/Other-Model-1.5B
datasets: example-org/corpus
model_creator: Example
version: v9
---
# A model card
"""
ADDED = {
    "300": ("<|im_start|>", True),
    "301": ("<tool_call>", False),
    "302": ("\u2581two\u2581words", False),
    "2": ("</s>", True),
}
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
DECODER = {key: {"content": text, "special": special, **FLAGS} for key, (text, special) in ADDED.items()}
SPM_CONFIG = _sentencepiece(Case(LLAMA))["tokenizer_config.json"]

CASES: dict[str, Case] = {
    "llama": Case(LLAMA),
    "llama-tied": Case(like(LLAMA, tie_word_embeddings=True)),
    "llama-f16": Case(LLAMA, dtype="F16"),
    "llama-f32-auto": Case(LLAMA, dtype="F32"),
    "llama-f32-to-bf16": Case(LLAMA, dtype="F32", type="BF16"),
    "llama-bf16-to-f16": Case(LLAMA, type="F16"),
    "llama-bf16-to-f32": Case(LLAMA, type="F32"),
    "llama-f64": Case(like(LLAMA, num_hidden_layers=1), dtype="F64", type="F32"),
    "llama-full-heads": Case(like(LLAMA, num_key_value_heads=None)),
    "llama-biases": Case(like(LLAMA, attention_bias=True, mlp_bias=True)),
    "llama-head-dim": Case(like(LLAMA, head_dim=32)),
    "llama-sharded": Case(LLAMA, shards=3),
    "llama-inv-freq": Case(LLAMA, extra={"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}),
    "llama-linear": Case(like(LLAMA, rope_scaling={"type": "linear", "factor": 4.0})),
    "llama-llama3-rope": Case(like(LLAMA, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0)),
    "llama-rope-parameters": Case(
        like(LLAMA, rope_theta=None, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}), dtype="F16"
    ),
    "llama-yarn": Case(
        like(
            LLAMA,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 0.9,
            },
        )
    ),
    "llama-sparse-config": Case(
        like(
            LLAMA, max_position_embeddings=None, rms_norm_eps=None, rope_theta=None, hidden_act=None, bos_token_id=None
        )
    ),
    "llama-added-tokens": Case(
        LLAMA,
        files={"tokenizer_config.json": {**SPM_CONFIG, "added_tokens_decoder": DECODER, "add_prefix_space": False}},
    ),
    "llama-added-tokens-file": Case(LLAMA, files={"added_tokens.json": {"<extra>": 310, "<beyond>": 999}}),
    "llama-card": Case(LLAMA, files={"README.md": CARD}),
    "llama-name-or-path": Case(like(LLAMA, _name_or_path="example-org/My-Model-2-7b-chat"), folder="checkpoint"),
    "llama-plain-name": Case(LLAMA, folder="some model here"),
    "llama-sampling": Case(
        LLAMA,
        files={
            "generation_config.json": {
                "temperature": 0.6,
                "top_p": 0.95,
                "top_k": 20,
                "repetition_penalty": 1.05,
                "min_p": 0.05,
                "eos_token_id": [2, 5],
            }
        },
    ),
    "llama-templates": Case(
        LLAMA,
        files={
            "tokenizer_config.json": {
                **SPM_CONFIG,
                "chat_template": [
                    {"name": "default", "template": TEMPLATE},
                    {"name": "tool-use", "template": "{{ tools }}"},
                ],
            }
        },
    ),
    "llama-jinja": Case(LLAMA, files={"chat_template.jinja": TEMPLATE + "\u00e9"}),
    "llama-byte-fallback": Case(like(LLAMA, vocab_size=len(spm_pieces())), tokenizer="byte_fallback"),
    "llama-byte-level": Case(LLAMA, tokenizer="byte_level"),
    "llama-byte-level-bos": Case(
        LLAMA, tokenizer="byte_level", files={"tokenizer.json": _tokenizer("llama-bpe", post_processor=LLAMA3_BOS)}
    ),
    "llama-smollm": Case(LLAMA, tokenizer="byte_level", pre="smollm"),
    "mistral": Case(MISTRAL),
    "mistral-null-window": Case(MISTRAL | {"sliding_window": None, "head_dim": 32}, dtype="F16"),
    "qwen2": Case(QWEN2, tokenizer="byte_level", pre="qwen2"),
    "qwen2-yarn-tied": Case(
        like(
            QWEN2,
            tie_word_embeddings=True,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        tokenizer="byte_level",
        pre="qwen2",
        shards=2,
    ),
    "qwen3": Case(QWEN3, tokenizer="byte_level", pre="qwen2"),
    "qwen3-tied-f16": Case(like(QWEN3, tie_word_embeddings=True), tokenizer="byte_level", pre="qwen2", dtype="F16"),
}
