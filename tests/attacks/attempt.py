"""Put every attack of a folder to every reader, in a process that cannot take much: `python attempt.py FOLDER`.

Prints JSON: for each file and reader what came of it ("loaded", an error's class and text, or "FAULT: …"), and the most
bytes that the process's memory grew by, where Linux tells.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from samples import random_half
from trial import Fault, guarded, kind, reset_peak, status

import nfq_core
from nfq_core import NFQFile
from nfq_core.calibration.statistics import Calibration
from nfq_core.checkpoints.article_import import import_article
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import compare_files, file_info, verify_file
from nfq_core.checkpoints.whole_checkpoint import checkpoint_names
from nfq_core.cli import commands as cli
from nfq_core.files.safetensors_io import SafetensorsFile
from nfq_core.models.unet import detect

SECONDS = 30
"""What takes longer is taken for something that hangs."""

SPACE_BYTES = 3 << 30
"""Of address space, beside what the process has at first."""


def verify(path: Path) -> None:
    """`verify_file`, with an error where it finds one."""
    result = verify_file(path)
    if not result["ok"]:
        raise nfq_core.CorruptFileError(result["errors"][0])


def calibrate(path: Path) -> None:
    """Quantise a weight with what a calibration says."""
    inputs, _ = Calibration.load(path).for_weights(None, {"a.weight": (16, 64)})
    for statistics in inputs.values():
        nfq_core.quantize(random_half(16, 64), **statistics.arguments()).validate()


def names(path: Path) -> None:
    """What a checkpoint calls a file's tensors; which UNet is in it, if it is a plain one."""
    with contextlib.suppress(nfq_core.UnsupportedFileError), SafetensorsFile(path) as file:
        detect({key: entry.shape for key, entry in file.entries.items()})
    with NFQFile(path) as file:
        checkpoint_names(file)


def command(path: Path) -> None:
    """`nfq info` and `nfq verify`, whose lines must not move a terminal's cursor."""
    for arguments in (["info", path], ["verify", path]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(argument) for argument in arguments])
        if not (out.getvalue() + err.getvalue()).replace("\n", "").isprintable():
            raise Fault(f"{arguments[0]} prints {(out.getvalue() + err.getvalue())[:300]!r}")
        if code and (err.getvalue().count("\n") != 1 or out.getvalue()):
            raise Fault(f"{arguments[0]} fails with {err.getvalue()!r}")


def readers(target: Path) -> dict[str, Callable[[Path], object]]:
    """Everything that reads a file, by name; what writes one, writes `target`."""
    return {
        "load": nfq_core.load,
        "info": lambda path: json.dumps(file_info(path), allow_nan=False),
        "verify": verify,
        "compare": lambda path: compare_files(path, path),
        "dequantize": lambda path: dequantize_file(path, target, overwrite=True),
        "quantize": lambda path: quantize_file(path, target, overwrite=True),
        "import": lambda path: import_article(path, target, overwrite=True),
        "calibrate": calibrate,
        "names": names,
        "kind": kind,
        "command": command,
    }


def _hangs(*_: object) -> None:
    # No OSError, which could be taken for one of reading.
    raise RuntimeError(f"more than {SECONDS} seconds")


def main(folder: Path) -> dict[str, dict[str, tuple[str, int]]]:
    """What came of every file of a folder with every reader, and the bytes that it took."""
    torch.set_num_threads(1)
    # Of the warnings about tensors that are kept.
    logging.getLogger("nfq").setLevel(logging.CRITICAL)
    # numba is loaded, and its loops are compiled, at the first use.
    nfq_core.quantize(random_half(16, 64), hessian=torch.eye(64))
    signal.signal(signal.SIGALRM, _hangs)
    space = status("VmSize") + SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.getrlimit(resource.RLIMIT_AS)[1]))
    target = folder / "target"
    results: dict[str, dict[str, tuple[str, int]]] = {}
    for path in sorted(set(folder.iterdir())):
        results[path.name] = {}
        for name, read in readers(target).items():
            target.unlink(missing_ok=True)
            before = reset_peak()
            signal.alarm(SECONDS)
            try:
                _, refused = guarded(lambda read=read, path=path: read(path))
                told = "loaded" if refused is None else f"{type(refused).__name__}: {refused}"
            except Fault as fault:
                told = f"FAULT: {fault}"
            finally:
                signal.alarm(0)
            results[path.name][name] = told, status("VmHWM") - before
    target.unlink(missing_ok=True)
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
