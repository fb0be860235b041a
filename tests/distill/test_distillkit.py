"""DistillKit's files: known bytes decoded, what was exported comes back, damage refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import linux
from target_sets import manifest, write_targets

from gguforge.distill.compression import CONFIG, Bin, Compression, decode_log_probs, pack, read_compression, unpack
from gguforge.distill.targets import open_targets
from gguforge.distill.tokens import identity_of
from gguforge.quant.errors import GGUForgeError, InputError

pytest.importorskip("yaml")

KILLED_EXPORT = """
import os, signal, sys
from gguforge.distill import distillkit, targets
distillkit._columns = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
distillkit.export_targets(targets.open_targets(sys.argv[1]), sys.argv[2])
"""


@given(
    st.integers(1, 32), st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), min_size=1, max_size=4)
)
def test_numbers_of_any_width(bits: int, rows: list[list[int]]) -> None:
    values = np.array(rows, np.int64) & ((1 << bits) - 1)
    packed = pack(values, bits)
    assert packed.shape == (len(rows), -(-3 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, 3), values)


def test_the_highest_bit_comes_first() -> None:
    assert pack(np.array([[0b101, 0b010]]), 3).tolist() == [[0b10101000]]


def test_known_rows() -> None:
    """Two exact values, a + b * rank + c * sqrt(rank), and residuals of 4 bits (scale 0.5) and 1 bit (scale 0.25)."""
    config = Compression(
        1000, 5, 2, "bfloat16", (0, 1, "sqrt"), "float16", (Bin("float32", 4, 2), Bin("float16", 1, 1)), False
    )
    exact = (np.array([-0.5, -1.0], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    terms = np.array([-3.0, -1.0, -0.25], "<f2").tobytes()
    first = np.array([0.5], "<f4").tobytes() + bytes([0b1010_0111])  # 10 - 8, 7 - 8
    second = np.array([0.25], "<f2").tobytes() + bytes([0b1000_0000])
    row = np.frombuffer(exact + terms + first + second, np.uint8)[None]
    assert config.row_bytes == row.shape[1]
    curve = [-3 - rank - 0.25 * rank**0.5 for rank in range(3)]
    wanted = [-0.5, -1, curve[0] + 2 * 0.5, curve[1] - 1 * 0.5, curve[2] + 0.25]
    np.testing.assert_allclose(decode_log_probs(row, config)[0], wanted, rtol=1e-6)
    deltas = Compression(1000, 3, 3, "float32", delta_encoding=True)
    row = np.array([[-0.5, -1, -2]], "<f4").view(np.uint8)
    assert decode_log_probs(row, deltas).tolist() == [[-0.5, -1.5, -3.5]]


@pytest.mark.parametrize(("kind", "size"), [("sampled", 50), ("top-k", 9)])
def test_what_is_exported_comes_back(tmp_path: Path, teacher: Path, kind: Any, size: int) -> None:
    pytest.importorskip("pyarrow")
    from gguforge.distill.distillkit import export_targets, import_targets

    identity = identity_of(teacher)
    made = manifest(kind, size, vocabulary=identity.tokens, shards=2)
    write_targets(tmp_path / "targets", made)
    targets = open_targets(tmp_path / "targets")
    config = export_targets(targets, tmp_path / "captured")
    assert (config.d, config.exact_k) == (identity.tokens, config.k)
    again = import_targets(tmp_path / "captured", tmp_path / "again", teacher)
    assert again.manifest.tokenizer_sha256 == identity.sha256
    assert again.manifest.biased
    assert len(again) == len(targets)
    for one, two in zip(targets, again, strict=True):
        np.testing.assert_array_equal(one.input_ids, two.input_ids)
        np.testing.assert_array_equal(one.loss_mask, two.loss_mask)
        np.testing.assert_array_equal(one.row_ptr, two.row_ptr)
        for row in range(len(one.positions)):
            part = slice(*one.row_ptr[row : row + 2])
            ours, theirs = (dict(zip(d.ids[part].tolist(), d.weights[part], strict=True)) for d in (one, two))
            assert ours.keys() == theirs.keys()
            np.testing.assert_allclose([theirs[token] for token in ours], list(ours.values()), rtol=5e-3)
    with pytest.raises(GGUForgeError, match="no empty folder"):
        export_targets(targets, tmp_path / "captured")
    before = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    import_targets(tmp_path / "captured", tmp_path / "again", teacher)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


@linux
def test_a_killed_export_leaves_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from gguforge.distill.distillkit import export_targets

    targets, output = tmp_path / "targets", tmp_path / "captured"
    write_targets(targets, manifest())
    process = subprocess.run([sys.executable, "-c", KILLED_EXPORT, targets, output], check=False)
    assert process.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {targets}
    assert left.name.startswith("captured.")
    export_targets(open_targets(targets), output)
    assert set(tmp_path.iterdir()) == {targets, output}


def test_rows_as_distillkit_writes_them(tmp_path: Path, teacher: Path) -> None:
    """Without labels, a row more than needed, and an entry that the server did not give (-inf)."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from gguforge.distill.distillkit import import_targets

    folder = tmp_path / "captured"
    folder.mkdir()
    config = {"d": 100, "k": 3, "exact_k": 3, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
    (folder / CONFIG).write_text(json.dumps(config))  # JSON is YAML
    logs = np.log([[0.5, 0.3, 0.1], [0.9, 0.05, 0.01], [0.4, 0.3, 0.2]]).astype("<f4")
    logs[1, 2] = -np.inf
    ids = np.array([[5, 6, 7], [8, 9, 10], [1, 2, 3]])
    for number, texts in enumerate(([[1, 6, 4]], [[1]])):
        columns = {
            "input_ids": texts,
            "compressed_logprobs": [logs.view(np.uint8).reshape(3, -1).tolist()] * len(texts),
            "bytepacked_indices": [pack(ids, 7).tolist()] * len(texts),
        }
        parquet.write_table(pyarrow.table(columns), folder / f"data_{number}.parquet")
    with pytest.raises(InputError, match=r"teacher\.gguf: is not the tokenizer of what was captured"):
        import_targets(folder, tmp_path / "t", teacher)
    assert not (tmp_path / "t").exists()
    targets = import_targets(folder, tmp_path / "t")
    (document,) = targets
    assert document.loss_mask.tolist() == [False, True, True]
    assert document.ids.tolist() == [5, 6, 7, 8, 9]
    np.testing.assert_allclose(document.weights, [0.5, 0.3, 0.1, 0.9, 0.05], rtol=1e-3)
    np.testing.assert_allclose(document.tail, [0.1, 0.05], rtol=1e-2)
    np.testing.assert_allclose(document.next_log_prob, [np.log(0.3), np.nan], rtol=1e-3)
    assert targets.teacher_loss() == pytest.approx(-np.log(0.3), rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [{"k": 0}, {"exact_k": 4}, {"exact_dtype": "int8"}, {"polynomial_terms": ["log"]}, {"d": "many"}, {"more": 1},
     {"residual_bins": [{"scale_dtype": "float16"}]}],
)  # fmt: skip
def test_configurations_with_faults_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    config = {"d": 100, "k": 3, "exact_k": 3, "residual_bins": []}
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(InputError):
        read_compression(tmp_path / CONFIG)


def test_files_with_faults_are_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from gguforge.distill.distillkit import import_targets

    with pytest.raises(InputError, match="is missing"):
        import_targets(tmp_path, tmp_path / "t")
    (tmp_path / CONFIG).write_text(json.dumps({"d": 100, "k": 3, "exact_k": 3, "residual_bins": []}))
    with pytest.raises(InputError, match="holds no parquet files"):
        import_targets(tmp_path, tmp_path / "t")
    path = tmp_path / "data_0.parquet"
    row = {"input_ids": [[1, 2]], "compressed_logprobs": [[[0] * 12]], "bytepacked_indices": [[[0] * 3]]}
    for change, message in (
        ({"bytepacked_indices": [[[0] * 2]]}, "do not have the length"),
        ({"input_ids": [[1, 200]]}, "do not have the length"),
        ({"compressed_logprobs": [[]], "bytepacked_indices": [[]]}, "is damaged"),
        ({"input_ids": [["a"]]}, "is damaged"),
        ({"packed_indices": [1]}, "older layout"),
    ):
        parquet.write_table(pyarrow.table(row | change), path)
        with pytest.raises(InputError, match=message):
            import_targets(tmp_path, tmp_path / "t")
        (tmp_path / "t" / "manifest.json").unlink()
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is damaged"):
        import_targets(tmp_path, tmp_path / "t")
