"""config.json with an architecture's defaults, and the report of every field that is not understood.

transformers fills in what a config does not say from its config classes; here those defaults stand beside the
architecture (`gguforge.convert.architectures`). A field that may change what the model computes and that nothing here
reads is reported, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguforge.convert.json_file import Json
from gguforge.quant.errors import CheckpointError

HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout
    attn_implementation attn_pdrop bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cls_token_id
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size eos_token_id eot_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range
    is_decoder is_encoder_decoder is_llama_config label2id length_penalty mask_token_id max_length max_window_layers
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    quantization_config remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905 - sixty quotes less
)
"""Fields that do not change what the weights compute (training, generation, bookkeeping), or are handled apart."""

EXPECTED: Mapping[str, tuple[object, ...]] = {
    "is_causal": (True, False),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Fields of which only these values mean what llama.cpp computes; any other value is reported."""

LARGEST = 3.4e38
"""What float32 metadata can hold, less a little."""

ROPE_FIELDS = frozenset(
    """
    attention_factor attn_factor beta_fast beta_slow extrapolation_factor factor high_freq_factor low_freq_factor
    original_max_position_embeddings rope_theta rope_type type
    """.split()  # noqa: SIM905 - sixty quotes less
)
ROPE_DEFAULTS = (("partial_rotary_factor", 1), ("truncate", True))


@dataclass
class Config:
    """The fields of a config.json, each read once by whoever needs it.

    Args:
        values: config.json.
        path: where it lies, for messages.
        defaults: what the architecture assumes for a field that is absent; a function of the values where it depends
            on others, and then it also stands in for null.
        aliases: what this config calls a field, by the name that most others use.
    """

    values: Json
    path: Path
    defaults: Mapping[str, object | Callable[[Config], object]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def called(self, name: str) -> str:
        """What the config calls a field."""
        return name if name in self.values else self.aliases.get(name, name)

    def get(self, name: str) -> Any:
        """A field's value or its default; None if neither is there."""
        name = self.called(name)
        default = self.defaults.get(name)
        value = self.values.get(name, None if callable(default) else default)
        return default(self) if value is None and callable(default) else value

    def count(self, name: str, most: int = 1 << 31, least: int = 1) -> int:
        """A field that must be a whole number from `least` to `most`.

        Raises:
            CheckpointError: it is absent or something else.
        """
        value = self.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}", value)
        return value

    def number(self, name: str) -> float:
        """A field that must be a number.

        Raises:
            CheckpointError: it is absent or something else.
        """
        return self._number(name, self.get(name))

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
            raise self.wrong(name, "a number", value)
        return value

    def flag(self, name: str) -> bool:
        """Whether a field is true; absent and null mean false."""
        return self.get(name) is True

    def wrong(self, name: str, expected: str, found: object) -> CheckpointError:
        """The error for a field whose value cannot be used."""
        shown = "nothing" if found is None else repr(found)[:60]
        return CheckpointError(
            f"field {self.called(name)!r} cannot be used", path=self.path, expected=expected, found=shown
        )

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        if self.get("head_dim") is not None:
            return self.count("head_dim")
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        if hidden % heads:
            raise self.wrong("hidden_size", f"a multiple of num_attention_heads ({heads})", hidden)
        return hidden // heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; null means as many as query heads."""
        name = "num_attention_heads" if self.get("num_key_value_heads") is None else "num_key_value_heads"
        return self.count(name)

    @property
    def rope(self) -> Json:
        """The rotary embedding's parameters, from transformers 5's `rope_parameters` or the older two fields."""
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise self.wrong("rope_parameters", "an object", rope)
        return {"rope_theta": self.get("rope_theta"), **rope}

    @property
    def rope_type(self) -> str:
        """How the rotary embedding is stretched; "default" for not at all."""
        rope = self.rope
        return str(rope.get("rope_type") or rope.get("type") or "default").lower()

    def rope_number(self, name: str, default: float | None = None) -> float:
        """A number among the rotary embedding's parameters.

        Raises:
            CheckpointError: it is absent without default, or something else.
        """
        value = self.rope.get(name)
        return self._number(name, default if value is None else value)


def unreported(
    config: Config,
    understood: frozenset[str],
    rope_types: tuple[str, ...],
    own: Mapping[str, tuple[object, ...]] = EXPECTED,
) -> list[str]:
    """One line for every field that may change the result and is not understood; `own` goes beside `EXPECTED`."""
    expected = {**EXPECTED, **own}
    known = (
        HARMLESS | understood | {"rope_parameters", "rope_scaling", "layer_types", "sliding_window"} | expected.keys()
    )
    values = {name: value for name, value in config.values.items() if value is not None}
    lines = [_line(name, value, "is not understood") for name, value in values.items() if name not in known]
    for name, accepted in expected.items():
        if name in values and values[name] not in accepted:
            lines.append(_line(name, values[name], "has no counterpart in llama.cpp's graph"))
    lines += _attention_lines(config, values)
    for name, value in config.rope.items():
        if name not in ROPE_FIELDS and value is not None and (name, value) not in ROPE_DEFAULTS:
            lines.append(_line(name, value, "is not understood"))
    if config.rope_type not in rope_types:
        lines.append(_line("rope_type", config.rope_type, "is not understood"))
    return [line + "; the converted model may answer differently from the original." for line in lines]


def _attention_lines(config: Config, values: Json) -> list[str]:
    """Sliding windows: llama.cpp attends to the whole context in these architectures."""
    lines = []
    window = config.get("sliding_window")
    context = config.get("max_position_embeddings")
    switched_off = config.get("use_sliding_window") is False
    if isinstance(window, int) and not switched_off and window < (context or 0):
        lines.append(_line("sliding_window", window, f"is not applied: every layer attends to all {context} positions"))
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        lines.append(_line("layer_types", "...", "is not applied: every layer attends to all positions"))
    return lines


def _line(name: str, value: object, why: str) -> str:
    shown = repr(value)
    return f"config.json: {name} = {shown if len(shown) <= 40 else shown[:37] + '...'} {why}"
