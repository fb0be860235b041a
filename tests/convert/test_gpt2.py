"""GPT-2: what its checkpoints have that others do not, and its answers against those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import build, like, weights, write_shards
from learned_checkpoints import CASES, FILES, GPT2, GPT2_K, gpt2, gpt2_tensors
from parity import opened, published, run, tokens_of

from gguforge.convert import convert, plan
from gguforge.convert.conversion import plan_vocabulary
from gguforge.quant.errors import CheckpointError, EngineError
from gguforge.quant.quantize import quantize
from gguforge.quant.writer import write
from gguforge.runtime.engine import Engine, Stats
from gguforge.runtime.sampling import Sampling

TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


def quiet(line: str) -> None:
    """A warning that the test does not ask about."""


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        plan(folder, warn=quiet)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["Q4_0", "Q8_0", "Q4_K_M", "Q2_K", "Q6_K"])
def test_one_pass_equals_two(preset: str, tmp_path: Path) -> None:
    folder = build(gpt2(GPT2_K), tmp_path)
    convert(folder, tmp_path / "one.gguf", type=preset, workers=1, warn=quiet)
    convert(folder, tmp_path / "auto.gguf", workers=1, warn=quiet)
    quantize(tmp_path / "auto.gguf", tmp_path / "two.gguf", preset, workers=1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_constants_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    old = build(gpt2(tensors=gpt2_tensors(prefix="", masks=True)), tmp_path / "old")
    new = build(CASES["gpt2-no-prefix"], tmp_path / "new")
    for folder in (old, new):
        convert(folder, folder / "out.gguf", workers=1, warn=quiet)
    assert (old / "out.gguf").read_bytes() == (new / "out.gguf").read_bytes()


def test_a_config_without_the_old_context_field(tmp_path: Path) -> None:
    metadata = plan(build(gpt2(like(GPT2, n_ctx=None, n_layer=1)), tmp_path), warn=quiet).metadata
    assert metadata["gpt2.context_length"].value == 96


def test_a_wider_feed_forward_is_written_as_it_is(tmp_path: Path) -> None:
    """llama.cpp's converter writes four times the hidden size whatever the config says."""
    folder = build(gpt2(), tmp_path)
    tensors = gpt2_tensors()
    for i in range(2):
        tensors |= {f"transformer.h.{i}.mlp.c_fc.weight": (64, 96), f"transformer.h.{i}.mlp.c_fc.bias": (96,),
                    f"transformer.h.{i}.mlp.c_proj.weight": (96, 64)}  # fmt: skip
    folder = build(gpt2(like(GPT2, n_inner=96), tensors=tensors), tmp_path / "wide")
    made = plan(folder, warn=quiet)
    assert made.metadata["gpt2.feed_forward_length"].value == 96
    assert next(t for t in made.tensors if t.name == "blk.1.ffn_down.weight").shape == (64, 96)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation_function": "relu"}, "'activation_function' cannot be used.*gelu_new.*found 'relu'"),
        ({"n_head": 5}, "'n_embd' cannot be used .expected a multiple of the number of heads"),
        ({"n_embd": "64"}, "'n_embd' cannot be used"),
        ({"n_layer": 3}, "'h.2.ln_1.weight': tensor is missing"),
        ({"n_layer": 1}, "h.1.attn.c_attn.bias': tensor has no place in gpt2"),
        ({"n_positions": 95}, "wpe.weight'.*shape does not fit config.json"),
        ({"vocab_size": 299}, "the tokenizer has more tokens than the model|shape does not fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(build(gpt2(GPT2 | changes, tensors=gpt2_tensors()), tmp_path), match)


def test_a_matrix_stored_as_a_linear_layer_would(tmp_path: Path) -> None:
    folder = build(gpt2(), tmp_path)
    tensors = {name: weights(name, shape, "BF16") for name, shape in gpt2_tensors().items()}
    name = "transformer.h.0.attn.c_attn.weight"
    tensors[name] = weights(name, (192, 64), "BF16")
    write_shards(folder, tensors, 1)
    refused(folder, r"c_attn.weight': .*expected \[64, 192\] from config.json, found \[192, 64\]")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("merges.txt", None, "merges.txt is missing beside vocab.json"),
        ("vocab.json", None, "no tokenizer that can be read.*vocab.json with merges.txt"),
        ("vocab.json", "[]", "vocab.json.*expected an object"),
        ("vocab.json", '{"a": "b"}', "vocab.json: vocab is no table of ids"),
        ("vocab.json", "{", "vocab.json: this is not JSON"),
        ("merges.txt", "#version\nonly\n", "merges.txt: a merge is no pair of texts.*'only'"),
        ("tokenizer_config.json", '{"tokenizer_class": "MyTokenizer"}', "class that reads vocab.json.*'?MyTokenizer"),
    ],
)  # fmt: skip
def test_damaged_vocabulary_files_are_refused(name: str, content: str | None, match: str, tmp_path: Path) -> None:
    folder = build(FILES, tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    refused(folder, match)


def test_other_ways_to_scale_attention_are_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    config = GPT2 | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": True, "summary_type": "cls_index"}
    plan(build(gpt2(config), tmp_path), warn=lines.append)
    assert len(lines) == 1
    assert "scale_attn_by_inverse_layer_idx = True has no counterpart" in lines[0]


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = build(FILES, tmp_path)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    convert(folder, tmp_path / "out.gguf", type="F32", workers=1, warn=quiet)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the quick brown fox, she'll sell 12 shells caf\u00e9"
    with opened(tmp_path / "out.gguf") as loaded, torch.inference_mode():
        tokens = tokens_of(loaded, text)
        assert tokens == tokenizer.encode(text)
        for _ in range(5):
            theirs = model(torch.tensor([tokens])).logits[0].numpy()
            ours = run(loaded, tokens, embeddings=False)
            # llama.cpp looks the activation up in a table of half precision
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).max())
            assert ours[-1].argmax() == theirs[-1].argmax()
            tokens.append(int(theirs[-1].argmax()))


def test_a_context_ends_where_the_table_of_positions_does(tmp_path: Path) -> None:
    """llama.cpp rounds a context up, and ends the process at the first position beyond the table."""
    convert(build(gpt2(), tmp_path), tmp_path / "out.gguf", workers=1, warn=quiet)
    with Engine.open(tmp_path / "out.gguf", threads=1) as engine:
        assert engine.context == 96
        stats = Stats()
        sampler = engine.sampler(Sampling(temperature=0))
        assert len(list(engine.generate(list(range(90)), sampler, stats))) == 7
        assert stats.stop == "context"
    for context in (97, 512):
        with pytest.raises(EngineError, match=r"longer than the model's table of positions .expected at most 96"):
            Engine.open(tmp_path / "out.gguf", context=context)


@pytest.mark.skipif(not (TOKENIZERS / "gpt2-hf").is_dir(), reason="the real tokenizers are not here")
@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("vocab.json", "merges.txt")])
def test_real_texts_are_cut_as_published(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("config.json", *files):
        (tmp_path / name).write_bytes((TOKENIZERS / "gpt2-hf" / name).read_bytes())
    write(plan_vocabulary(tmp_path, warn=quiet), tmp_path / "out.gguf", workers=1)
    with opened(tmp_path / "out.gguf", vocab_only=True) as model:
        for text, ids in published(TOKENIZERS / "ggml-vocab" / "ggml-vocab-gpt-2.gguf"):
            assert tokens_of(model, text, special=False) == ids, repr(text)
