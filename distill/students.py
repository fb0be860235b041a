"""Students: an existing checkpoint, a config with random weights, or a cut from the teacher.

Cutting takes layers (DistilBERT and DistilGPT-2 began as every other layer of their teachers) and channels: those of
the feed-forward and of the hidden state that are most active on a text (Minitron: arXiv:2407.14679). The weights that
are kept are the teacher's; training has to mend what is missing. Models are those of transformers, whose checkpoints
`gguforge convert` takes; code from a checkpoint's folder is never run.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguforge.convert.json_file import read_object
from gguforge.distill.folders import replacing_folder
from gguforge.distill.recipe import StudentPart
from gguforge.quant.errors import InputError, MissingExtraError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

EXTRA = "train"
LAYER = re.compile(r"(.*\.(?:layers|layer|h)\.)(\d+)(\..*)")
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load(package: str) -> Any:
    """Import an optional package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(package, EXTRA) from None


def model_class(config: Mapping[str, Any], path: Path) -> Any:
    """transformers' class that config.json names.

    Raises:
        InputError: it names none that transformers has.
        MissingExtraError: transformers is not installed.
    """
    name = architecture(config)
    found = getattr(load("transformers"), name, None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise InputError("architecture is unknown to transformers", path=path, found=name or None)
    return found


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a config.json names; empty where it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json stands for a model that reads a whole text at once: its family can find hidden words."""
    name = architecture(config)
    family = name.removesuffix("Model") if name.endswith("Model") else name.removesuffix("ForMaskedLM")
    return family != name and hasattr(load("transformers"), f"{family}ForMaskedLM")


def open_model(folder: Path) -> Any:
    """A checkpoint's model in float32 on the CPU, ready to be trained.

    Raises:
        InputError: it is no checkpoint that transformers can open.
        MissingExtraError: torch or transformers is not installed.
    """
    torch = load("torch")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError("config.json is missing", path=folder, remedy="Give the folder of a Hugging Face checkpoint.")
    kind = model_class(read_object(path), path)
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot be opened: {str(error).splitlines()[0]}", path=folder) from error


def fresh_model(config: Mapping[str, Any], path: Path, seed: int) -> Any:
    """A model with random weights.

    Args:
        config: the content of a config.json.
        path: where it lies, for messages.

    Raises:
        InputError: transformers refuses it.
    """
    torch = load("torch")
    kind = model_class(config, path)
    torch.manual_seed(seed)
    try:
        return kind(kind.config_class.from_dict(dict(config))).float()
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"transformers refuses it: {error}", path=path) from error


def even_layers(count: int, wanted: int) -> tuple[int, ...]:
    """So many layers, evenly spaced, first and last among them.

    >>> even_layers(12, 6)
    (0, 2, 4, 7, 9, 11)
    >>> even_layers(8, 1)
    (0,)
    """
    return tuple(round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted))


def pick_layers(weights: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The state dictionary of a model that keeps only some layers, numbered anew."""
    number = {old: new for new, old in enumerate(layers)}
    found = {}
    for name, weight in weights.items():
        match = LAYER.fullmatch(name)
        if match is None:
            found[name] = weight
        elif (old := int(match[2])) in number:
            found[f"{match[1]}{number[old]}{match[3]}"] = weight
    return found


# The axes of the weights of Llama-like models that run over the hidden state and over the feed-forward.
AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("", "hidden"), "lm_head.weight": ("", "hidden"), "norm.weight": ("hidden",),
    "q_proj.weight": ("", "hidden"), "k_proj.weight": ("", "hidden"), "v_proj.weight": ("", "hidden"),
    "o_proj.weight": ("hidden", ""), "o_proj.bias": ("hidden",), "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",), "gate_proj.weight": ("ffn", "hidden"),
    "up_proj.weight": ("ffn", "hidden"), "down_proj.weight": ("hidden", "ffn"), "gate_proj.bias": ("ffn",),
    "up_proj.bias": ("ffn",), "down_proj.bias": ("hidden",),
}  # fmt: skip
PRUNABLE = ("llama", "mistral", "qwen2", "qwen3")
HEADS_FILL_WIDTH = ("qwen2",)
"""Of these, llama.cpp's graph wants all heads together to be as wide as the hidden state, which stays as it is then."""


def axes_of(name: str) -> tuple[str, ...]:
    """What each axis of a weight runs over; empty for weights that no pruning touches."""
    return next((axes for ending, axes in AXES.items() if name == ending or name.endswith("." + ending)), ())


def activity(model: Any, batches: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """How active the channels of a Llama-like model are on a text: means of the absolute values.

    Args:
        batches: token ids, shape (batch, length).

    Returns:
        Of the hidden state after all norms together, shape (hidden,), and of each layer's feed-forward, (ffn,).
    """
    torch = load("torch")
    hidden: list[Any] = []
    ffn: list[list[Any]] = [[] for _ in model.model.layers]

    def means(states: Tensor) -> Tensor:
        return states.detach().abs().flatten(0, -2).mean(0)

    hooks = []
    for into, layer in zip(ffn, model.model.layers, strict=True):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(lambda _, __, out: hidden.append(means(out))))
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, into=into: into.append(means(given[0])))
        )
    try:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(hidden).sum(0), [torch.stack(layer).mean(0) for layer in ffn]


def most_active(values: Tensor, count: int) -> Tensor:
    """The places of the largest values, in their order; shape (count,)."""
    return values.topk(count).indices.sort().values


def prune_width(model: Any, batches: Iterable[Tensor], hidden: int | None, ffn: int | None) -> dict[str, Tensor]:
    """The state dictionary with only the most active channels; None keeps all of a kind."""
    of_hidden, of_ffn = activity(model, batches)
    kept_hidden = None if hidden is None else most_active(of_hidden, hidden)
    found = {}
    for name, weight in model.state_dict().items():
        match = LAYER.fullmatch(name)
        kept = {"hidden": kept_hidden, "ffn": None}
        if match is not None and ffn is not None:
            kept["ffn"] = most_active(of_ffn[int(match[2])], ffn)
        for axis, over in enumerate(axes_of(name)):
            places = kept.get(over)
            weight = weight if places is None else weight.index_select(axis, places)
        found[name] = weight.clone()
    return found


def cut(teacher: Any, config: Mapping[str, Any], part: StudentPart, path: Path, batches: Iterable[Tensor]) -> Any:
    """A student cut from a teacher: channels first, which need the whole teacher's activity, then layers.

    Args:
        teacher: the model.
        config: the content of its config.json.
        path: where that lies, for messages.
        batches: token ids to look for activity on, shape (batch, length); only read where channels are cut.

    Raises:
        InputError: more is asked for than the teacher has, or its architecture cannot be cut that way.
    """
    made, layers = cut_config(config, part, path)
    weights: Mapping[str, Any] = teacher.state_dict()
    if part.hidden_size is not None or part.intermediate_size is not None:
        weights = prune_width(teacher, batches, part.hidden_size, part.intermediate_size)
    student = fresh_model(made, path, seed=0)
    student.load_state_dict(weights if layers is None else pick_layers(weights, layers))
    return student


def cut_config(
    config: Mapping[str, Any], part: StudentPart, path: Path
) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """The config.json of a student that is cut, and the teacher's layers that it keeps, None for all; see `cut`."""
    made, layers = dict(config), None
    if part.hidden_size is not None or part.intermediate_size is not None:
        _check_width(config, part, path)
        heads = int(config["num_attention_heads"])
        made["head_dim"] = config.get("head_dim") or int(config["hidden_size"]) // heads
        made["hidden_size"] = part.hidden_size or config["hidden_size"]
        made["intermediate_size"] = part.intermediate_size or config["intermediate_size"]
    if part.layers is not None:
        key = next((key for key in ("num_hidden_layers", "n_layer", "n_layers") if key in config), "num_hidden_layers")
        layers = _layers(part.layers, int(config.get(key, 0)), path)
        made[key] = len(layers)
        if isinstance(config.get("layer_types"), list):
            made["layer_types"] = [config["layer_types"][layer] for layer in layers]
    return made, layers


def count_weights(config: Mapping[str, Any], path: Path) -> int:
    """Parameters of a model, which is not made for that; errors as `fresh_model`."""
    torch = load("torch")
    kind = model_class(config, path)
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(dict(config)))
    return sum(int(weight.numel()) for weight in model.parameters())


def _layers(wanted: int | Sequence[int], count: int, path: Path) -> tuple[int, ...]:
    layers = even_layers(count, wanted) if isinstance(wanted, int) else tuple(wanted)
    number = wanted if isinstance(wanted, int) else len(layers)
    if not 1 <= number <= count or any(not 0 <= layer < count for layer in layers) or len(set(layers)) < len(layers):
        raise InputError("student.layers", path=path, expected=f"of the teacher's {count} layers", found=wanted)
    return layers


def _check_width(config: Mapping[str, Any], part: StudentPart, path: Path) -> None:
    if config.get("model_type") not in PRUNABLE:
        raise InputError(
            "channels of this architecture cannot be cut", path=path, expected=" or ".join(PRUNABLE),
            found=config.get("model_type"), remedy="Cut layers instead.",
        )  # fmt: skip
    if part.hidden_size is not None and config.get("model_type") in HEADS_FILL_WIDTH:
        raise InputError(
            "student.hidden_size: llama.cpp cannot run a Qwen2 that is narrower than its heads", path=path,
            remedy="Cut layers and intermediate_size.",
        )  # fmt: skip
    for key in ("hidden_size", "intermediate_size"):
        wanted, there = getattr(part, key), int(config[key])
        if wanted is not None and not 0 < wanted <= there:
            raise InputError(f"student.{key}", path=path, expected=f"at most the teacher's {there}", found=wanted)


def save_model(model: Any, folder: Path, tokenizer: Path, add: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a checkpoint that `gguforge convert` takes: it appears whole, in place of an older one.

    Args:
        tokenizer: the folder whose tokenizer's files are copied.
        add: writes more files into the folder before it appears.

    Raises:
        OutputError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise OutputError("the folder holds something that is no checkpoint", path=folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as part:
        model.save_pretrained(part, safe_serialization=True)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, part / name)
        add(part)
