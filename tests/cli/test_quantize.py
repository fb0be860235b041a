"""`gguforge quantize` as a user meets it: what it prints, what it refuses, and what it leaves when it is ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import models
import pytest
from running import COMMAND, alive, children, has_data, linux, peak_memory, refused, run, run_here, start, wait_until

from gguforge.cli.main import main
from gguforge.quant import files, slabs
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.metadata import uint32
from gguforge.quant.plan import Plan
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny-F16.gguf"
    write(models.build(path.parent, T.F16, layers=2), path, workers=1)
    return path


def repeated(folder: Path, layers: int) -> Path:
    """A model of `layers` MiB-sized layers, all reading the same numbers."""
    plan = models.build(folder, T.F16, layers=1, ffn=2048)
    one = next(tensor for tensor in plan.tensors if tensor.name == "blk.0.ffn_up.weight")
    metadata = plan.metadata | {"llama.block_count": uint32(layers)}
    tensors = tuple(replace(one, name=f"blk.{i}.ffn_up.weight") for i in range(layers))
    path = folder / f"{layers}.gguf"
    write(Plan(metadata, tensors), path, workers=1)
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of work."""
    return repeated(tmp_path_factory.mktemp("long"), 80)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "m.gguf"


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_dry_run_tells_what_the_run_does(model: Path, out: Path) -> None:
    words = ("quantize", model, "--type", "q4_k_m", "-o", out, "--workers", 2)
    planned = json.loads(run(*words, "--dry-run", "--json").stdout)
    text = run(*words, "--dry-run").stdout
    assert left(out) == []
    done = json.loads(run(*words, "--json").stdout)
    assert done.pop("seconds") >= 0
    assert {key: planned[key] for key in done} == done
    assert planned["bytes"] == out.stat().st_size == read_gguf(out).size
    assert planned["output"] == str(out)
    assert f"size    {planned['bytes']:,} bytes" in text
    assert "for 2 workers" in text
    types = {tensor.type.name for tensor in read_gguf(out).tensors}
    assert set(planned["types"]) == types
    assert all(f"{name}  " in text for name in types)


def test_default_name_stands_beside_the_model(model: Path) -> None:
    done = run("quantize", model, "-t", "Q8_0")
    output = model.with_name("tiny-Q8_0.gguf")
    assert done.stdout.startswith(f"{output}: ")
    assert done.stderr == ""
    assert output.exists()
    assert run("quantize", model, "-t", "Q8_0", "--overwrite", "--quiet").stdout == ""
    output.unlink()
    Path(f"{output}.json").unlink()


def test_a_number_is_a_type(model: Path, out: Path) -> None:
    assert json.loads(run("quantize", model, "-t", "18", "-o", out, "--json").stdout)["type"] == "Q6_K"


def test_types_of_single_tensors(model: Path, tmp_path: Path, out: Path) -> None:
    listed = tmp_path / "types.txt"
    listed.write_text("attn_v=Q6_K blk.0.ffn_(up|gate)=q5_0\nno_such=Q4_0")
    words = ["--tensor-type", "ffn_down=Q8_0", "--tensor-type-file", listed, "--token-embedding-type", "q5_1"]
    done = run_here("quantize", model, "-t", "Q4_0", *words, "-o", out, "--dry-run", "--explain", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: no tensor has a name that fits 'no_such' of --tensor-type\n"
    types = {rule["tensor"]: rule["type"] for rule in json.loads(done.stdout)["rules"]}
    wanted = {"blk.0.ffn_down": "Q8_0", "blk.0.attn_v": "Q6_K", "blk.0.ffn_up": "Q5_0", "token_embd": "Q5_1"}
    assert {name: types[f"{name}.weight"] for name in wanted} == wanted
    assert types["blk.0.attn_q.weight"] == "Q4_0"


def test_fallbacks_are_told_and_hostile_names_are_shown_escaped(tmp_path: Path, out: Path) -> None:
    plan = models.build(tmp_path, T.F16, hidden=160, ffn=352, heads=4, layers=1)
    tensors = [replace(t, name=t.name.replace("attn_q", "\x1b[2Jattn_q")) for t in plan.tensors]
    write(replace(plan, tensors=tuple(tensors)), tmp_path / "odd.gguf", workers=1)
    done = run("quantize", tmp_path / "odd.gguf", "-t", "Q4_K_M", "-o", out)
    assert "Q5_0 instead of Q4_K (rows of 160 are no whole number of blocks)" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\\x1b[2Jattn_q" in done.stderr


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["{model}", "-t", "Q4_KM", "-o", "{out}"], "unknown type 'Q4_KM'. Did you mean Q4_K_M", 1),
        (["{model}", "-o", "{out}"], "Give one of --type, --target-size, --target-bpw and --fit", 2),
        (["-t", "Q8_0"], "Missing argument 'MODEL'", 2),
        (["{model}", "-t", "Q8_0", "--workers", "0"], "--workers", 2),
        (["{folder}/absent.gguf", "-t", "Q8_0"], "absent.gguf: no such file or directory", 1),
        (["{folder}", "-t", "Q8_0"], "this is not a file", 1),
        (["{model}", "-t", "Q8_0", "-o", "{folder}"], "this is a folder. Give the path of a file.", 1),
        (["{model}", "-t", "Q8_0", "-o", "{folder}/no/m.gguf"], "no such folder", 1),
        (["{model}", "-t", "Q8_0", "-o", "{model}", "--overwrite"], "output and input are the same file", 1),
    ],
)
def test_refusals(words: list[str], message: str, code: int, model: Path, out: Path) -> None:
    before = model.read_bytes()
    words = [word.format(model=model, out=out, folder=out.parent) for word in words]
    refused(run_here("quantize", *words), message, code)
    assert left(out) == []
    assert model.read_bytes() == before


def test_an_output_that_exists_is_kept(model: Path, out: Path) -> None:
    out.write_text("precious")
    refused(run("quantize", model, "-t", "Q8_0", "-o", out), "file exists. Pass --overwrite to replace it.")
    assert out.read_text() == "precious"


@pytest.mark.skipif(os.name == "nt", reason="no such devices")
@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_device_is_no_output(device: str, model: Path) -> None:
    refused(run("quantize", model, "-t", "Q8_0", "-o", device, "--overwrite"), "device or pipe")


def test_a_damaged_model(model: Path, tmp_path: Path, out: Path) -> None:
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(model.read_bytes()[:-100])
    refused(run("quantize", damaged, "-t", "Q8_0", "-o", out), "file is cut short")
    assert left(out) == []


def test_a_quantized_model_needs_consent(model: Path, tmp_path: Path, out: Path) -> None:
    small = tmp_path / "small.gguf"
    assert run("quantize", model, "-t", "Q8_0", "-o", small).returncode == 0
    refused(run("quantize", small, "-t", "Q4_K_M", "-o", out), "--allow-requantize")
    assert run("quantize", small, "-t", "Q4_K_M", "-o", out, "--allow-requantize").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_has_left_is_no_reason_for_noise(model: Path, out: Path) -> None:
    end, pipe = os.pipe()
    os.close(end)
    done = run("quantize", model, "-t", "Q8_0", "-o", out, stdout=pipe)
    os.close(pipe)
    assert done.stderr == ""
    assert read_gguf(out).size == out.stat().st_size


def begin(long: Path, out: Path, workers: int = 2) -> subprocess.Popen[str]:
    """A run that is in the middle of its work."""
    process = start("quantize", long, "-t", "Q2_K", "-o", out, "--workers", workers)
    wait_until(lambda: has_data(out.with_name("m.gguf.part")), process)
    return process


@linux
def test_kill_9_leaves_no_file_no_process_and_no_obstacle(long: Path, out: Path) -> None:
    process = begin(long, out)
    workers = children(process.pid)
    assert len(workers) == 1
    os.killpg(process.pid, signal.SIGSTOP)  # it must not end before the next command has begun
    refused(run("quantize", long, "-t", "Q2_K", "-o", out), "another run is writing this file")
    process.kill()
    os.killpg(process.pid, signal.SIGCONT)
    process.communicate()
    assert left(out) == ["m.gguf.part", "m.gguf.part.journal"]
    wait_until(lambda: not any(map(alive, workers)))
    assert run("quantize", long, "-t", "F16", "-o", out).returncode == 0
    assert left(out) == ["m.gguf"], "a copy has no receipt"
    assert read_gguf(out).size == out.stat().st_size


@linux
@pytest.mark.parametrize(
    ("number", "to_group", "code", "line"),
    [(signal.SIGINT, True, 130, "\ninterrupted\n"), (signal.SIGTERM, False, 143, ""), (signal.SIGTERM, True, 143, "")],
)
def test_signals_end_it_cleanly(
    number: signal.Signals, to_group: bool, code: int, line: str, long: Path, out: Path
) -> None:
    process = begin(long, out)
    workers = children(process.pid)
    assert len(workers) == 1
    (os.killpg if to_group else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=30)
    if number == signal.SIGTERM and to_group and process.returncode == 1:  # the workers' end was noticed first
        code, line = 1, "error: a worker process was killed. Memory may have run out: try fewer --workers.\n"
    assert (process.returncode, output, errors) == (code, "", line)
    assert left(out) == []
    assert not any(map(alive, workers))


@linux
def test_a_killed_worker_gives_one_line(long: Path, out: Path) -> None:
    process = begin(long, out, workers=3)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors == "error: a worker process was killed. Memory may have run out: try fewer --workers.\n"
    assert left(out) == []


def test_out_of_memory_gives_one_line(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(slabs, "encoded", encoded)
    done = run_here("quantize", model, "-t", "Q8_0", "-o", out, "--workers", 1)
    refused(done, "error: out of memory. Close other programs or choose fewer --workers.\n")
    assert left(out) == []


@linux
def test_a_limit_on_file_size(model: Path, out: Path) -> None:
    import resource

    done = run(
        "quantize", model, "-t", "Q8_0", "-o", out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    refused(done, "m.gguf: file too large. The filesystem or this process allows no file of that size.")
    assert left(out) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs root to mount a small filesystem")
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(model: Path, mounted: Path) -> None:
    done = run("quantize", model, "-t", "Q8_0", "-o", mounted / "m.gguf")
    refused(done, "not enough disk space (expected 1,")
    assert " free). Free some space or write to another disk." in done.stderr
    assert list(mounted.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_on_the_way(
    workers: int, model: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where space cannot be reserved, and another program takes it meanwhile, a write fails in the middle."""
    monkeypatch.setattr(files, "preallocate", lambda descriptor, path, size: os.truncate(descriptor, size))
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), "-t", "Q8_0", "-o", str(mounted / "m.gguf"), "--workers", str(workers)])
    assert ended.value.code == 1
    error = f"error: {mounted / 'm.gguf'}: no space left on device. Free some space or write to another disk.\n"
    assert capsys.readouterr().err == error
    assert list(mounted.iterdir()) == []


def test_a_disk_that_is_read_only(model: Path, mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    done = run("quantize", model, "-t", "Q8_0", "-o", mounted / "m.gguf")
    refused(done, "read-only file system. Write to another folder.")


@linux
def test_memory_stays_flat(tmp_path: Path, out: Path) -> None:
    peaks = []
    for layers in (12, 48):  # 12 and 48 MiB of F16
        source = repeated(tmp_path, layers)
        with start("quantize", source, "-t", "Q8_0", "-o", out, "--workers", 2, "--overwrite") as process:
            peaks.append(peak_memory(process))
        assert process.returncode == 0
    assert peaks[0] > 20 << 20
    assert peaks[1] < 1.2 * peaks[0]


def test_the_command_is_the_installed_one() -> None:
    assert run("quantize", "--help").returncode == 0, COMMAND
