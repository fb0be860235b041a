"""The family that a student belongs to: its teacher's architecture, tokenizer and habits, without the sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gguforge.convert.architectures import find_architecture
from gguforge.convert.config import Config
from gguforge.convert.conversion import plan_vocabulary
from gguforge.convert.json_file import Json, read_object
from gguforge.distill.planning.shapes import Shape, cut_shapes
from gguforge.distill.students import HEADS_FILL_WIDTH, PRUNABLE
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.errors import GGUFError, InputError
from gguforge.quant.metadata import Value, array, string
from gguforge.quant.reader import GGUFFile
from gguforge.quant.splits import read_model

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""The Hugging Face class of each of llama.cpp's graphs of which students are planned."""

SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Fields of config.json and the metadata that says the same."""

OF_ONE_CHECKPOINT = (
    "_name_or_path",
    "layer_types",
    "quantization_config",
    "torch_dtype",
    "dtype",
    "transformers_version",
)
PLAIN: Json = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 64,
    "num_key_value_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
"""A Llama, for those who have no teacher yet."""


@dataclass(frozen=True)
class Family:
    """Where a student comes from.

    Attributes:
        config: config.json of the teacher.
        tokenizer: the tokenizer's metadata.
        teacher: the teacher's checkpoint or GGUF file, if there is one.
    """

    config: Json
    tokenizer: Mapping[str, Value] = field(repr=False)
    teacher: Path | None = None

    @property
    def shape(self) -> Shape:
        """The teacher's own."""
        path = Path("config.json")
        architecture = find_architecture(self.config, path)
        read = Config(self.config, path, architecture.defaults, architecture.aliases)
        names = ("layers", "hidden", "ffn", "heads", "kv_heads", "head")
        sizes = {name: architecture.sizes(read)[name] for name in names}
        return Shape(**sizes, tied=read.flag("tie_word_embeddings"), cut=True)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    @property
    def heads_fill_width(self) -> bool:
        """Whether llama.cpp's graph wants all heads together to be as wide as the hidden state."""
        return self.config.get("model_type") in HEADS_FILL_WIDTH

    def parts(self) -> Iterator[Shape]:
        """The shapes that can be cut from the teacher; none without its checkpoint."""
        for shape in cut_shapes(self.shape) if self.can_be_cut else ():
            if shape.heads * shape.head == shape.hidden or not self.heads_fill_width:
                yield shape

    @property
    def can_be_cut(self) -> bool:
        """Whether a student can begin as a part of the teacher: its weights must be at hand in full precision."""
        return self.teacher is not None and self.teacher.is_dir()

    def config_of(self, shape: Shape) -> Json:
        """The config.json of a student."""
        made = {key: value for key, value in self.config.items() if key not in OF_ONE_CHECKPOINT}
        made |= {
            "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "tie_word_embeddings": shape.tied,
        }  # fmt: skip
        return made if self.heads_fill_width else made | {"head_dim": shape.head}


def family_of(teacher: Path | None) -> Family:
    """The family of a teacher's checkpoint or GGUF file, or of a plain Llama.

    Raises:
        InputError: no students of such a family are planned.
        GGUForgeError: the teacher cannot be read.
    """
    if teacher is None:
        return Family(PLAIN, _plain_tokenizer())
    if teacher.is_dir():
        config = read_object(teacher / "config.json")
        _check(config.get("model_type"), PRUNABLE, teacher)
        metadata = plan_vocabulary(teacher, warn=lambda line: None).metadata
    else:
        file = read_model(teacher)
        metadata = file.metadata
        config = _config_of_file(file)
    return Family(config, {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}, teacher)


def _check(found: object, known: Mapping[str, str] | tuple[str, ...], path: Path) -> None:
    if found not in known:
        raise InputError(
            "students of this family are not planned", path=path, expected=" or ".join(known), found=str(found)
        )


def _config_of_file(file: GGUFFile) -> Json:
    """What config.json would say of a GGUF file; scaled rotary positions become plain ones."""
    architecture = str(file.metadata["general.architecture"].value)
    _check(architecture, CLASSES, file.path)
    names = {tensor.name for tensor in file.tensors}
    embedding = next((tensor for tensor in file.tensors if tensor.name == "token_embd.weight"), None)
    found: Json = {"architectures": [CLASSES[architecture]], "model_type": architecture, "hidden_act": "silu"}
    keys = {**SIZES, "head_dim": "attention.key_length", "rope_theta": "rope.freq_base"}
    for key, name in keys.items():
        entry = file.metadata.get(f"{architecture}.{name}")
        if entry is not None:
            found[key] = entry.value
    if embedding is None or any(not isinstance(found.get(key), int | float) for key in SIZES):
        raise GGUFError("the metadata does not say the model's sizes", path=file.path)
    return found | {"vocab_size": embedding.shape[0], "tie_word_embeddings": "output.weight" not in names}


def _plain_tokenizer() -> dict[str, Value]:
    """As many tokens as `PLAIN` has, that say nothing: a tokenizer costs neither memory nor time here."""
    tokens = [f"<{i}>" for i in range(int(PLAIN["vocab_size"]))]
    return {"tokenizer.ggml.model": string("llama"), "tokenizer.ggml.tokens": array(GGUFValueType.STRING, tokens)}
