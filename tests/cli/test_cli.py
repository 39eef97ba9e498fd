"""The command `nfq`: exit codes, JSON alone on stdout, one clear line for bad input, and never a partial file."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import as_json, one_line, run
from safetensors.torch import load_file, save_file
from samples import SMALL_MODEL, random_half, random_unet
from systems import WINDOWS, names_are_bytes
from text_models import TINY, t5

import nfq_core
from nfq_core import errors
from nfq_core.calibration.statistics import Calibration, LayerInputs
from nfq_core.cli import commands as cli
from nfq_core.cli.terminal import progress_bar
from nfq_core.errors import DEBUG
from nfq_core.files.article import write_article_file
from nfq_core.files.container import NFQFile

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "nfq_core"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path):
    """A model, its container, and the article's file of it."""
    save_file(SMALL_MODEL, tmp_path / "model")
    nfq_core.checkpoints.convert.quantize_file(tmp_path / "model", tmp_path / "nfq")
    write_article_file(tmp_path / "article", SMALL_MODEL, 16, 32)
    return tmp_path


def leftovers(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"model", "nfq", "article"}


COMMANDS = [*cli._parser().commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"usage: nfq {command}" in out
    assert "--json" in out


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"nfq {nfq_core.__version__}\n", "")


def test_without_arguments_it_prints_the_help(capsys):
    code, out, error = run(capsys)
    assert (code, error) == (0, "")
    assert out == run(capsys, "--help")[1]
    assert "To begin: `nfq quantize model.safetensors`." in out


USAGE = {
    "an unknown command": ["quantise"],
    "no target": ["import-article", "a"],
    "a size without a unit": ["quantize", "a", "b", "--target-size", "3"],
    "levels without a format": ["quantize", "a", "b", "--levels", "20"],
    "levels that are no number": ["quantize", "a", "b", "--conv-levels", "many"],
    "an unknown format": ["quantize", "a", "b", "--format", "nf16"],
    "a format of the article's": ["quantize", "a", "b", "--conv-format", "article16_b64"],
    "levels and a format": ["quantize", "a", "b", "--levels", "12", "--format", "t4w8_b64"],
    "an unknown effort": ["quantize", "a", "b", "--effort", "slow"],
    "an unknown dtype": ["dequantize", "a", "b", "--dtype", "fp8"],
    "an unknown option": ["info", "a", "--frobnicate"],
    "one file too few": ["compare", "a"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_wrong_usage(capsys, arguments):
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert one_line(error).endswith("--help`)\n")


TYPING_ERRORS = {
    "a command": (["quantise", "a"], "nfq: there is no command 'quantise'; did you mean quantize"),
    "a command after an option": (["--jason", "infos"], "there is no command 'infos'; did you mean info?"),
    "a command like no other": (["xyz"], "there is no command 'xyz'; commands: demo, quantize, batch, "),
    "no command but a file": (["m.safetensors"], "to convert a model, write `nfq quantize m.safetensors`"),
    "an option": (["quantize", "a", "--prest", "small"], "there is no option --prest; did you mean --preset"),
    "an option with its value": (["info", "a", "--jsn=1"], "there is no option --jsn; did you mean --json?"),
    "half an option": (["quantize", "a", "--size", "1GB"], "no option --size; did you mean --target-size"),
    "an option like no other": (["info", "a", "--xyz"], "there is no option --xyz (help: `nfq info --help`)"),
    "an option of another command": (["info", "a", "--levels", "7"], "there is no option --levels"),
    "a name with a space": (["info", "my", "model"], "'model' is not expected; put quotes around names with spaces"),
    "a value": (["quantize", "a", "--preset", "smal"], "invalid choice: 'smal' (choose from "),
}


@pytest.mark.parametrize(("arguments", "told"), TYPING_ERRORS.values(), ids=TYPING_ERRORS)
def test_typing_errors(capsys, arguments, told):
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in one_line(error)


def test_every_line_of_help_stands_alone():
    """It names no other option without saying what that one means, and no page of the documentation."""
    for name, parser in cli._parser().commands.items():
        for action in parser._actions:
            assert action.help, f"nfq {name} {action.dest}"
            assert not re.search(r"docs/|see |as for|those of", action.help), f"nfq {name}: {action.help}"


@pytest.mark.parametrize(
    ("keys", "folder", "node"),
    [
        ({"unet"}, "diffusion_models", "Load NFQ Diffusion Model"),
        ({"unet", "vae"}, "checkpoints, in a web UI to models/Stable-diffusion", "Load NFQ Checkpoint"),
        ({"clip"}, "text_encoders", "Load NFQ CLIP"),
    ],
)
def test_what_to_do_next(capsys, tmp_path, keys, folder, node):
    prefix = "model.diffusion_model." if "vae" in keys else ""
    parts = {
        "unet": {prefix + key: tensor for key, tensor in random_unet().items()},
        "vae": {"first_stage_model.encoder.conv_in.weight": random_half(8, 3, 3, 3)},
        "clip": {key: random_half(*shape) for key, shape in t5(TINY).items()},
    }
    save_file({key: tensor for name in keys for key, tensor in parts[name].items()}, tmp_path / "m.safetensors")
    target = tmp_path / "m-balanced.nfq.safetensors"
    code, out, _ = run(capsys, "quantize", tmp_path / "m.safetensors")
    assert code == 0
    assert out.splitlines()[-1] == f"next: copy it to ComfyUI/models/{folder}; the node is {node}"
    code, out, _ = run(capsys, "dequantize", target)
    assert out.splitlines()[-1] == f"next: copy it to ComfyUI/models/{folder}; the node is {node.replace('NFQ ', '')}"

    place = tmp_path / folder.partition(",")[0]
    place.mkdir()
    _, out, _ = run(capsys, "quantize", tmp_path / "m.safetensors", place)
    assert out.splitlines()[-1] == f"next: press R in ComfyUI and choose it in {node}"


def test_no_advice_about_a_model_of_an_unknown_kind(capsys, folder):
    assert "next:" not in run(capsys, "quantize", folder / "model", folder / "a")[1]


def test_quantize_with_a_calibration(capsys, folder):
    inputs = {"linear.weight": LayerInputs(torch.ones(100), 99), "conv.weight": LayerInputs(torch.ones(16), 99)}
    Calibration(inputs, prompts=1).save(folder / "calibration")
    code, _, error = run(
        capsys,
        "quantize",
        folder / "model",
        folder / "a.nfq.safetensors",
        "--levels",
        16,
        "--calibration",
        folder / "calibration",
    )
    assert code == 0
    assert "only one prompt" in error
    assert as_json(capsys, "info", folder / "a.nfq.safetensors")["settings"]["calibration"] == "calibration"
    code, out, error = run(capsys, "quantize", folder / "model", folder / "b", "--calibration", folder / "model")
    assert (code, out) == (1, "")
    assert "is not a calibration" in one_line(error)
    assert not (folder / "b.nfq.safetensors").exists()


def test_the_whole_story_in_json(capsys, folder):
    result = as_json(
        capsys, "quantize", folder / "model", folder / "a.nfq.safetensors", "--levels", 12, "--conv-levels", 24
    )
    assert (result["quantized"], result["kept"], result["warnings"]) == (2, 1, [])

    info = as_json(capsys, "info", folder / "a.nfq.safetensors")
    assert {
        "container_version",
        "weights",
        "bits_per_weight",
        "packed_bits_per_weight",
        "file_bytes",
        "original_bytes",
        "settings",
        "layers",
    } <= info.keys()
    assert all({"name", "format", "shape", "bits_per_weight"} <= layer.keys() for layer in info["layers"])
    assert {layer["format"] for layer in info["layers"]} == {"nf12_b64", "nf24_b64"}
    assert info["original_bytes"] == (folder / "model").stat().st_size

    assert as_json(capsys, "verify", folder / "a.nfq.safetensors")["ok"] is True

    compared = as_json(capsys, "compare", folder / "model", folder / "a.nfq.safetensors")
    assert compared.keys() == {"sqnr_db", "layers"}
    assert all({"name", "format", "bits_per_weight", "sqnr_db"} <= layer.keys() for layer in compared["layers"])
    # The codebooks of 12 and 24 levels leave some 18 and 23 dB on Gaussian weights.
    assert 15 < compared["sqnr_db"] < 26

    assert (
        as_json(capsys, "dequantize", folder / "a.nfq.safetensors", folder / "b.safetensors", "--dtype", "fp32")[
            "tensors"
        ]
        == 3
    )
    restored = load_file(folder / "b.safetensors")
    assert {key: tensor.dtype for key, tensor in restored.items()} == {
        "linear.weight": torch.float32,
        "conv.weight": torch.float32,
        "norm.bias": torch.float16,
    }
    compared = as_json(capsys, "compare", folder / "b.safetensors", folder / "a.nfq.safetensors")
    assert compared["sqnr_db"] is None

    result = as_json(capsys, "import-article", folder / "article", folder / "c.nfq.safetensors")
    assert result["quantized"] == 2
    assert as_json(capsys, "verify", folder / "c.nfq.safetensors")["ok"] is True


def test_the_whole_story_in_text(capsys, folder):
    for arguments, wanted in [
        (["quantize", folder / "model", folder / "a.nfq.safetensors", "--levels", 16], "2 tensors quantised, 1 kept"),
        (["info", folder / "a.nfq.safetensors"], "2 layers, 8,704 weights, 1 nf16_b64, 1 nf32_b64\n"),
        (["info", folder / "a.nfq.safetensors"], "kept          1 tensors, 14 bytes\n"),
        (["verify", folder / "a.nfq.safetensors"], "all 3 tensors are intact"),
        (["compare", folder / "model", folder / "a.nfq.safetensors"], "all 2 layers together: "),
        (["dequantize", folder / "a.nfq.safetensors", folder / "b.safetensors"], "3 tensors"),
        (["compare", folder / "b.safetensors", folder / "a.nfq.safetensors"], "layers together: equal"),
        (["import-article", folder / "article", folder / "c.nfq.safetensors"], "2 tensors quantised, 1 kept"),
    ]:
        code, out, error = run(capsys, *arguments)
        assert (code, error) == (0, "")
        assert wanted in out


def test_sizes_and_times_as_people_read_them(capsys, folder):
    target = folder / "a.nfq.safetensors"
    _, out, _ = run(capsys, "quantize", folder / "model", target)
    size, original = target.stat().st_size / 1e3, (folder / "model").stat().st_size / 1e3
    sizes = f"{size:.1f} KB, {size / original:.0%} of {original:.1f} KB"
    assert re.fullmatch(rf"{re.escape(f'{target}: {sizes}')}; 2 tensors quantised, 1 kept, in \d+\.\d s\n", out)
    assert run(capsys, "info", target)[1].splitlines()[0] == f"file          {target}, {sizes}"
    assert run(capsys, "compare", folder / "model", target)[1].splitlines()[0] == f"{target}: {sizes}"


def test_compare_lists_the_ten_worst_layers(capsys, tmp_path):
    weights = {
        f"{number:02}.weight": random_half(64, 64, seed=number) ** (1 + 2 * (number % 2)) for number in range(24)
    }
    save_file(weights, tmp_path / "model")
    run(capsys, "quantize", tmp_path / "model", tmp_path / "a", "--levels", 16)
    target = tmp_path / "a.nfq.safetensors"
    layers = as_json(capsys, "compare", tmp_path / "model", target)["layers"]
    assert len(layers) == 24
    worst = sorted(layers, key=lambda layer: layer["sqnr_db"])[:10]

    lines = run(capsys, "compare", tmp_path / "model", target)[1].splitlines()
    assert lines[1].startswith("all 24 layers together: ")
    assert lines[-11] == "the 10 layers with the largest errors (--all lists all 24):"
    assert [line.split()[0] for line in lines[-10:]] == [layer["name"] for layer in worst]

    lines = run(capsys, "compare", tmp_path / "model", target, "--all")[1].splitlines()
    assert [line.split()[0] for line in lines[-24:]] == [layer["name"] for layer in layers]


def test_hints_name_the_python_of_people_without_the_command(capsys, folder, monkeypatch):
    hint = "is quantised already; dequantise it first with "
    assert f"{hint}`nfq dequantize`" in run(capsys, "quantize", folder / "nfq", folder / "out")[2]
    monkeypatch.setenv("PATH", str(folder))
    error = run(capsys, "quantize", folder / "nfq", folder / "out")[2]
    assert f"{hint}`{sys.executable} -m nfq_core dequantize`" in error
    monkeypatch.setattr(sys, "executable", "/my programs/python")
    assert f'{hint}`"/my programs/python" -m nfq_core' in run(capsys, "quantize", folder / "nfq", folder / "out")[2]


@pytest.mark.skipif(WINDOWS, reason="links need privileges there")
def test_the_plugins_folder_is_the_command(tmp_path):
    """In isolated mode, as in ComfyUI's portable build, where `-m` does not look into the current folder."""
    plugin = tmp_path / "custom nodes" / "comfyui-nfq"
    plugin.parent.mkdir()
    plugin.symlink_to(ROOT)
    command = [sys.executable, "-I", "-v", str(plugin), "info", "absent"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "nfq: absent: no such file" in done.stderr
    # What -v says of every module that is imported.
    assert str(plugin / "nfq_core" / "cli" / "commands.py") in done.stderr


def test_hints_name_the_plugins_folder_where_nothing_is_installed(monkeypatch, tmp_path):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert errors.command("info F") == f"`{sys.executable} {ROOT} info F`"
    monkeypatch.setattr(errors, "__file__", "/my nodes/nfq/nfq_core/errors.py")
    assert errors.command("info F") == f'`{sys.executable} "/my nodes/nfq" info F`'


def test_trellis_formats_in_json(capsys, folder):
    formats = ["--format", "t3w8_b64", "--conv-format", "t4w8_b64"]
    assert as_json(capsys, "quantize", folder / "model", folder / "a.nfq.safetensors", *formats)["quantized"] == 2
    info = as_json(capsys, "info", folder / "a.nfq.safetensors")
    assert {layer["format"] for layer in info["layers"]} == {"t3w8_b64", "t4w8_b64"}
    assert info["settings"].items() >= {"format": "t3w8_b64", "conv_format": "t4w8_b64"}.items()
    assert as_json(capsys, "verify", folder / "a.nfq.safetensors")["ok"] is True
    # Three and four bits leave some 17 and 23 dB on Gaussian weights.
    assert 16 < as_json(capsys, "compare", folder / "model", folder / "a.nfq.safetensors")["sqnr_db"] < 24


def test_effort_and_outermost_convolutions_are_recorded(capsys, folder):
    run(capsys, "quantize", folder / "model", folder / "a.nfq.safetensors", "--effort", "best", "--quantize-first-last")
    assert as_json(capsys, "info", folder / "a.nfq.safetensors")["settings"] == {
        "preset": "balanced",
        "target_bpw": 4.1,
        "effort": "best",
        "quantize_first_last": True,
    }


def test_a_process_of_its_own_prints_json_alone(folder):
    save_file(SMALL_MODEL | {"bad.weight": torch.full((64, 64), torch.nan)}, folder / "bad")
    command = [*COMMAND, "quantize", str(folder / "bad"), str(folder / "a.nfq.safetensors"), "--levels", "16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0
    assert json.loads(done.stdout)["kept"] == 2
    assert "tensor 'bad.weight' is kept as it is: it holds NaN or Inf" in one_line(done.stderr)


@names_are_bytes
def test_a_calibration_whose_name_is_no_text(capsys, folder):
    name = os.fsdecode(os.fsencode(folder) + b"/\xff")
    inputs = {"linear.weight": LayerInputs(torch.ones(100), 99), "conv.weight": LayerInputs(torch.ones(16), 99)}
    Calibration(inputs, prompts=2).save(name)
    arguments = (folder / "model", folder / "a.nfq.safetensors", "--levels", 16, "--calibration", name)
    assert run(capsys, "quantize", *arguments)[0] == 0
    assert as_json(capsys, "info", folder / "a.nfq.safetensors")["settings"]["calibration"] == "?"


def test_a_terminal_without_unicode_is_no_obstacle(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert cli.main(["quantize", str(folder / "model"), str(folder / "ü.nfq.safetensors")]) == 0
        sys.stdout.flush()
        assert b"2 tensors quantised" in sys.stdout.buffer.getvalue()
    assert nfq_core.load(folder / "ü.nfq.safetensors").keys() == SMALL_MODEL.keys()


@names_are_bytes
def test_a_file_name_that_is_no_unicode_is_no_obstacle(capsys, folder):
    source, target = (os.fsdecode(os.fsencode(folder) + name) for name in (b"/\xff", b"/\xfe.nfq.safetensors"))
    os.link(folder / "model", source)
    assert run(capsys, "quantize", source, target, "--levels", 16)[0] == 0
    code, out, _ = run(capsys, "info", target)
    assert code == 0
    assert "2 layers" in out
    assert as_json(capsys, "info", target)["source"]["name"] == "?"


def test_warnings_are_marked_as_such(folder):
    save_file(SMALL_MODEL | {"bad.weight": torch.full((64, 64), torch.inf)}, folder / "bad")
    command = [*COMMAND, "quantize", str(folder / "bad"), str(folder / "a.nfq.safetensors"), "--levels", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0
    assert one_line(done.stderr).startswith(f"nfq: warning: {folder / 'bad'}: tensor 'bad.weight' is kept as it is")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            KeyError("x"),
            f"this is a bug in the program (test_cli.py, line N); set the environment variable {DEBUG} to 1",
        ),
        (RuntimeError("sizes of torch.Size([3])"), "this is a bug in the program"),
        (RuntimeError("CUDA out of memory. Tried to"), "out of memory; no unfinished file is left"),
        (MemoryError(), "out of memory; no unfinished file is left"),
        (FileNotFoundError(2, "No such file or directory", "a"), "a: No such file or directory"),
        (OSError("no number"), "the file: no number"),
        (OSError(), "the file: the system does not say why"),
    ],
)
def test_no_error_shows_what_only_programmers_read(capsys, folder, monkeypatch, error, told):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.delenv(DEBUG, raising=False)
    monkeypatch.setattr(cli.examine, "file_info", fail)
    code, out, message = run(capsys, "info", folder / "nfq")
    assert (code, out) == (1, "")
    assert re.sub("line [0-9]+", "line N", one_line(message)).startswith(f"nfq: {told}")
    assert not re.search(r"KeyError|torch\.|\[Errno|Traceback", message)


def test_a_fault_of_the_program_is_shown_where_that_is_wanted(capsys, folder, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setenv(DEBUG, "1")
    monkeypatch.setattr(cli.examine, "file_info", fail)
    with pytest.raises(KeyError):
        run(capsys, "info", folder / "nfq")


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def newer(data: bytes) -> bytes:
    return data.replace(b'container_version\\":1,', b'container_version\\":9,')


def lying(data: bytes) -> bytes:
    return data.replace(b'"shape":[7]', b'"shape":[9]')


BAD_CONTAINERS = {
    "missing": (None, "no such file"),
    "foreign": (lambda data: b"hello world, I am no model", "is not a safetensors file"),
    "empty": (lambda data: b"", "is not a safetensors file"),
    "truncated in the header": (lambda data: data[:200], "is cut short"),
    "truncated in the data": (lambda data: data[:-1], "is cut short"),
    "flipped in the header": (lambda data: flipped(data, 150), "its header is damaged"),
    "flipped in the last tensor": (lambda data: flipped(data, len(data) - 1), "'linear.weight' is damaged"),
    "lying": (lying, "tensor 'norm.bias' of F16 [9] does not fit its 14 bytes"),
    "newer": (newer, "container version 9, this version reads up to 1; update the plugin"),
    "a plain model": (lambda data: None, "is not an .nfq.safetensors file"),
}


@pytest.mark.parametrize(("make", "reason"), BAD_CONTAINERS.values(), ids=BAD_CONTAINERS)
@pytest.mark.parametrize("command", ["info", "verify", "compare", "dequantize"])
def test_bad_containers(capsys, folder, command, make, reason):
    data = make((folder / "nfq").read_bytes()) if make else b""
    bad = folder / "bad"
    if make:
        bad.write_bytes((folder / "model").read_bytes() if data is None else data)
    if "linear" in reason and max_entry(folder / "nfq") != "nfq.linear.weight":
        reason = "'conv.weight' is damaged"
    before = leftovers(folder)
    arguments = {"compare": [folder / "model", bad], "dequantize": [bad, folder / "out"]}.get(command, [bad])
    for flags in ([], ["--json"]):
        code, out, error = run(capsys, command, *arguments, *flags)
        if command == "info" and "is damaged" in reason and "header" not in reason:
            # The header is sound, and info reads nothing else.
            assert (code, error) == (0, "")
            continue
        assert code == 1
        assert reason in one_line(error)
        assert str(bad) in error
        if command == "verify" and flags and out:
            assert json.loads(out)["ok"] is False
        else:
            assert out == ""
    assert leftovers(folder) == before


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_verify_tells_the_first_error_and_how_many_follow(capsys, folder, damaged):
    data = bytearray((folder / "nfq").read_bytes())
    with NFQFile(folder / "nfq") as file:
        keys = file.keys()[-damaged:]
        for key in keys:
            data[len(file.raw_header) + file.entries[key if key in file.kept else f"nfq.{key}"].start] ^= 4
    (folder / "bad").write_bytes(data)
    more = "" if damaged == 1 else f" (and {damaged - 1} more tensors, --json lists them)"
    first = f"{folder / 'bad'}: tensor {keys[0]!r} is damaged (checksum mismatch); fetch the file again"

    code, out, error = run(capsys, "verify", folder / "bad")
    assert (code, out, error) == (1, "", f"nfq: {first}{more}\n")

    code, out, error = run(capsys, "verify", folder / "bad", "--json")
    assert (code, error) == (1, f"nfq: {first}{more}\n")
    result = json.loads(out)
    assert (result["ok"], result["tensors"], len(result["errors"])) == (False, 3, damaged)
    for key, line in zip(keys, result["errors"], strict=True):
        assert f"tensor {key!r} is damaged" in line


@pytest.mark.skipif(WINDOWS, reason="a closed pipe is another error there")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["info", "nfq", "--json"], ["info", "nfq"], ["compare", "model", "nfq"]])
def test_a_closed_pipe_is_quiet(folder, arguments, unbuffered):
    """As in `nfq info F --json | head -1`, when the reader is gone before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=folder,
            env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def max_entry(path) -> str:
    with NFQFile(path) as file:
        return max(file.entries, key=lambda name: file.entries[name].end)


BAD_SOURCES = {
    "missing": (None, "no such file"),
    "foreign": (b"hello world, I am no model", "is not a safetensors file"),
    "a pickle": (b"PK\x03\x04" + bytes(50), "is not a safetensors file"),
    "truncated": ("truncated", "is cut short"),
    "lying": ("lying", "tensor 'norm.bias' of F16 [9] does not fit its 14 bytes"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_SOURCES.values(), ids=BAD_SOURCES)
@pytest.mark.parametrize("command", ["quantize", "import-article", "compare"])
def test_bad_sources(capsys, folder, command, data, reason):
    model, bad = (folder / "model").read_bytes(), folder / "bad"
    data = {"truncated": model[:-5], "lying": lying(model)}.get(data, data)
    if data is not None:
        bad.write_bytes(data)
    before = leftovers(folder)
    code, out, error = run(capsys, command, bad, folder / ("nfq" if command == "compare" else "out"))
    assert (code, out) == (1, "")
    assert reason in one_line(error)
    assert str(bad) in error
    assert leftovers(folder) == before


@pytest.mark.parametrize("command", ["quantize", "info", "verify", "dequantize", "import-article"])
def test_a_directory_for_a_file(capsys, folder, command):
    targets = [folder / "out"] if command in ("quantize", "dequantize", "import-article") else []
    code, out, error = run(capsys, command, folder, *targets)
    assert (code, out) == (1, "")
    assert "is a directory" in one_line(error)
    assert leftovers(folder) == set()


def test_a_quantised_file_is_not_quantised_again(capsys, folder):
    code, _, error = run(capsys, "quantize", folder / "nfq", folder / "out")
    assert code == 1
    assert "is quantised already" in one_line(error)


def test_an_ordinary_file_is_no_article_file(capsys, folder):
    code, _, error = run(capsys, "import-article", folder / "model", folder / "out")
    assert code == 1
    assert "was not written by the article's code" in one_line(error)


WRITING = {
    "quantize": ("model", "out.nfq.safetensors"),
    "dequantize": ("nfq", "out.safetensors"),
    "import-article": ("article", "out.nfq.safetensors"),
}
each_writer = pytest.mark.parametrize(
    ("command", "source", "target"), [(name, *files) for name, files in WRITING.items()], ids=WRITING
)


@each_writer
def test_an_existing_target_stays_without_force(capsys, folder, command, source, target):
    (folder / target).write_bytes(b"old")
    code, _, error = run(capsys, command, folder / source, folder / target)
    assert code == 1
    assert f"{target} exists already; --force overwrites it" in one_line(error)
    assert (folder / target).read_bytes() == b"old"
    levels = ("--levels", 16) if command == "quantize" else ()
    code, _, error = run(capsys, command, folder / source, folder / target, "--force", *levels)
    assert (code, error) == (0, "")
    assert load_file(folder / target)
    assert leftovers(folder) == {target}


@each_writer
def test_the_source_as_target_stays_even_with_force(capsys, folder, command, source, target):
    before = (folder / source).read_bytes()
    code, _, error = run(capsys, command, folder / source, folder / source, "--force")
    assert code == 1
    one_line(error)
    assert (folder / source).read_bytes() == before


@each_writer
@pytest.mark.parametrize("place", ["absent", "absent/deep", "model"])
@pytest.mark.parametrize("within", [True, False])
def test_targets_that_cannot_be(capsys, folder, command, source, target, place, within):
    given = folder / place / target if within else f"{folder / place}/"
    code, out, error = run(capsys, command, folder / source, given, "--force")
    assert (code, out) == (1, "")
    assert one_line(error).startswith(f"nfq: {folder / place}")
    assert ("is a file, not a folder" if place == "model" else "no such folder; create it first") in error
    assert leftovers(folder) == set()


@pytest.mark.skipif(WINDOWS, reason="folders have no such mode there")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write to any folder")
@each_writer
def test_a_folder_without_permission(capsys, folder, command, source, target):
    (folder / "locked").mkdir(mode=0o500)
    code, _, error = run(capsys, command, folder / source, folder / "locked" / target)
    assert code == 1
    assert "could not be written: Permission denied; nothing was changed" in one_line(error)


@pytest.mark.parametrize("device", ["nosuchdevice", "gpu", "cpuu", "meta", "cuda:99", "", "CPU "])
def test_a_device_that_is_not_there(capsys, folder, device):
    code, _, error = run(capsys, "quantize", folder / "model", folder / "out", "--device", device)
    assert code == 1
    assert f"device '{device}' cannot be used here" in one_line(error)
    assert "this machine has cpu" in error
    assert leftovers(folder) == set()


@each_writer
def test_a_disk_that_fills_up(capsys, folder, command, source, target):
    """A limit on file size stands for the full disk: writing fails in the middle either way."""
    resource = pytest.importorskip("resource", reason="this system has no such limit")
    (folder / target).write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so that the write itself fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        code, out, error = run(capsys, command, folder / source, folder / target, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out) == (1, "")
    assert f"{target} could not be written: File too large; nothing was changed" in one_line(error)
    assert (folder / target).read_bytes() == b"old"
    assert leftovers(folder) == {target}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough weights for some seconds of work."""
    path = tmp_path_factory.mktemp("large") / "model"
    weight = random_half(1024, 1024)
    save_file({f"{number}.weight": weight + number / 64 for number in range(24)}, path)
    return path


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.skipif(WINDOWS, reason="no signal reaches one process alone there but what ends it at once")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_in_the_middle(large, tmp_path, number):
    (tmp_path / "out.nfq.safetensors").write_bytes(b"old")
    # A test run in the background may ignore Ctrl-C, which its children would do then, too.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "quantize", str(large), str(tmp_path / "out.nfq.safetensors"), "--force"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    signal.signal(signal.SIGINT, ours)
    try:
        # The temporary file has its first tensor.
        wait_for(lambda: any(path.stat().st_size > 300_000 for path in tmp_path.glob(".out.*.tmp")), process)
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert out == ""
    assert one_line(error) == "nfq: interrupted; no unfinished file is left\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.nfq.safetensors"]
    assert (tmp_path / "out.nfq.safetensors").read_bytes() == b"old"


def test_two_processes_with_one_target_leave_a_sound_file(folder):
    command = [*COMMAND, "quantize", str(folder / "model"), str(folder / "out.nfq.safetensors")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=60) for process in processes]
    codes = sorted(process.returncode for process in processes)
    # The second one to finish is refused, unless both looked just before the first one was renamed.
    assert codes in ([0, 1], [0, 0]), results
    for process, (_, error) in zip(processes, results, strict=True):
        assert ("exists already" in error) == bool(process.returncode)
    assert (folder / "out.nfq.safetensors").read_bytes() == (folder / "nfq").read_bytes()
    assert leftovers(folder) == {"out.nfq.safetensors"}


class Terminal(io.StringIO):
    """A terminal, where bars are drawn."""

    def isatty(self) -> bool:
        return True


def test_the_bar_counts_passes_where_there_may_be_several(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for passes in (1, 5):
        with progress_bar("quantising", argparse.Namespace(json=False), passes) as progress:
            for done in (1, 2, 1, 2):
                progress(done, 2, "a.weight")
        shown = terminal.getvalue()
        assert ("quantising, pass 2 of at most 5:" in shown) == (passes == 5)
    assert " so far, " in shown and " left" in shown


@pytest.mark.parametrize("tensors", [{"empty": torch.empty(0)}, {}])
def test_a_bar_over_nothing(folder, monkeypatch, tensors):
    """A file of empty tensors only goes there and back."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    save_file(tensors, folder / "nothing")
    paths = {
        name: str(folder / f"{name}{end}")
        for name, end in (("nothing", ""), ("b", ".nfq.safetensors"), ("c", ".safetensors"))
    }
    for command in ("quantize nothing b", "verify b", "compare nothing b", "dequantize b c"):
        name, *arguments = command.split()
        assert cli.main([name, *(paths[argument] for argument in arguments)]) == 0
    assert "quantising" in terminal.getvalue() and " left" in terminal.getvalue()
    assert load_file(paths["c"]).keys() == tensors.keys()
