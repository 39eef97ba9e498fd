"""One file put to every reader of the core: it gives the right numbers, or one of our errors, in bounded memory.

What is right is what `independent_reader` reads. Anything else that happens is a `Fault`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import independent_reader
import numpy as np
import torch
from golden.make import paths
from independent_reader import Kept
from mutations import mutated, mutated_plain
from reference import FORMAT_IDS
from safetensors.torch import save_file
from samples import TINY, random_half

import nfq_core
from nfq_core.calibration.statistics import CALIBRATION_KEY, Calibration, LayerInputs
from nfq_core.checkpoints.article_import import import_article
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import compare_files, file_info, info_lines, verify_file
from nfq_core.checkpoints.kinds import kind_of
from nfq_core.errors import NFQError
from nfq_core.files.article import write_article_file
from nfq_core.files.safetensors_io import DTYPE_NAMES, SafetensorsFile, tensor_bytes
from nfq_core.models.unet import detect, known_ldm_names, mismatch_message
from nfq_core.models.unet_keys import tensor_shapes
from nfq_core.packed.tensor import NFTensor

STATUS = Path("/proc/self/status")


def status(name: str) -> int:
    """Bytes that Linux tells of this process under a name."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Have the peak of this process's memory (VmHWM) begin anew; returns the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


class Fault(AssertionError):
    """A reader did something that it must not do."""


def guarded(work: Callable[[], object]) -> tuple[object, NFQError | None]:
    """What `work` returns, or our error, which is one line; anything else is a Fault."""
    try:
        return work(), None
    except NFQError as error:
        if not str(error) or not str(error).isprintable() or len(str(error)) > 2100:
            raise Fault(f"an error that is no line to read: {str(error)[:300]!r}") from error
        return None, error
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {str(error)[:300]}") from error


def same(found: NFTensor | torch.Tensor, wanted: np.ndarray | Kept) -> bool:
    """Whether the core and the second reader have read the same bits; a NaN is any NaN."""
    if isinstance(wanted, Kept):
        stored = (DTYPE_NAMES[found.dtype], tuple(found.shape), bytes(tensor_bytes(found)))
        return stored == (wanted.dtype, wanted.shape, wanted.data)
    values = found.dequantize().numpy()
    equal = (values.view(np.uint16) == wanted.view(np.uint16)) | (np.isnan(values) & np.isnan(wanted))
    return values.shape == wanted.shape and bool(equal.all())


Tensors = dict[str, np.ndarray | Kept]


def by_the_document(path: Path) -> Tensors | None:
    """The tensors that the second reader reads; None where the document calls the file unsound."""
    try:
        return independent_reader.read(path)
    except Exception:
        return None


def try_container(path: Path, wanted: Tensors | None, scratch: Path, more: int = 0) -> str:
    """Open, load and verify a file that may be a container, and do one thing `more` of four.

    Args:
        path: the file.
        wanted: its tensors, see `by_the_document`.
        scratch: a folder to write into.
        more: see `_more`.

    Returns:
        "loaded", or the name of the error's class.
    """
    found, refused = guarded(lambda: nfq_core.load(path))
    checked, unchecked = guarded(lambda: verify_file(path))
    sound = checked is not None and checked["ok"]
    if refused is None and not found.keys() and wanted is None:
        raise Fault("an unsound file without tensors is taken for sound")
    if refused is not None and "which torch lacks" in str(refused):
        return "UnsupportedFileError"
    if sound != (wanted is not None and refused is None):
        raise Fault(f"verify says {checked or unchecked}, the document {wanted is not None}, load {refused}")
    if wanted is not None and refused is not None:
        raise Fault(f"a file that the document calls sound is refused: {refused}")
    if wanted is not None and not (
        found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in found)
    ):
        raise Fault("other numbers than the document's")
    _more(path, scratch / "out.safetensors", more, sound)
    return "loaded" if refused is None else type(refused).__name__


def _more(path: Path, target: Path, which: int, sound: bool) -> None:
    """One of: info; back to plain safetensors, and compare; compare with itself, and quantise; tell its kind."""
    if which == 0:
        info, _ = guarded(lambda: file_info(path))
        if info is not None:
            json.dumps(info, allow_nan=False)
            if not all(text.isprintable() for _, text in info_lines("a", info)):
                raise Fault("a line that moves the cursor")
    elif which == 1:
        _, refused = guarded(lambda: dequantize_file(path, target, overwrite=True))
        if sound and refused is not None and "enough memory" not in str(refused):
            raise Fault(f"a sound file is not dequantised: {refused}")
        if refused is None:
            guarded(lambda: compare_files(target, path))
    elif which == 2:
        guarded(lambda: compare_files(path, path))
        guarded(lambda: quantize_file(path, target, overwrite=True))
    else:
        guarded(lambda: kind(path))


def kind(path: Path) -> None:
    """What `nfq batch` calls a file."""
    with SafetensorsFile(path) as file:
        kind_of(file)


def try_calibration(path: Path, used: bool) -> str:
    """Read a file that may be a calibration; where it is `used`, quantise weights with what it says."""
    found, refused = guarded(lambda: Calibration.load(path))
    if found is not None and used:
        shapes = {"linear.weight": (16, 64), "conv.weight": (4, 16, 3, 3)}
        inputs, _ = guarded(lambda: found.for_weights(None, shapes))
        for key, statistics in (inputs or ({}, []))[0].items():
            weight = random_half(*shapes[key])
            packed, _ = guarded(
                lambda weight=weight, given=statistics: nfq_core.quantize(weight, 7, **given.arguments())
            )
            if not torch.isfinite(packed.dequantize()).all():
                raise Fault("a calibration has made of a finite weight one that is not")
    return "loaded" if refused is None else type(refused).__name__


def try_source(path: Path, target: Path, convert: Callable[[Path, Path], object]) -> str:
    """Convert a file that may be the article's or plain safetensors; what comes of it is sound."""
    target.unlink(missing_ok=True)
    _, refused = guarded(lambda: convert(path, target))
    if refused is not None:
        if target.exists():
            raise Fault("a refused conversion has left a file")
        return type(refused).__name__
    if not verify_file(target)["ok"]:
        raise Fault("a conversion has made an unsound file")
    return "loaded"


def try_names(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Look for a UNet among names and shapes."""
    info, _ = guarded(lambda: detect(shapes))
    if info is not None:
        guarded(lambda: mismatch_message(info, shapes))
        names, _ = guarded(lambda: known_ldm_names(info, shapes))
        if len(set(names.values())) != len(names):
            raise Fault("two tensors get the same name")
    return "loaded" if info is not None else "foreign"


def mutated_names(rng: Random) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a small UNet, some of them lost, renamed or changed."""
    shapes = dict(tensor_shapes(TINY, rng.choice(("ldm", "prefixed", "diffusers"))))
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(shapes))
        shape = shapes.pop(key)
        if rng.random() < 0.6:
            other = (
                rng.choice(list(shapes)),
                key + ".0",
                "",
                ".",
                key.replace("0", "9"),
                "model.diffusion_model." + key,
            )
            changed = (shape, shape[:-1], (*shape, 1), (0,) * len(shape), (1 << 62,) * len(shape), ())
            shapes[rng.choice((key, *other))] = rng.choice(changed)
    return shapes


@dataclass(frozen=True)
class Attempt:
    """A mutated file: its kind and size, and what tries it, which returns "loaded" or the name of an error's class."""

    kind: str
    file_bytes: int
    run: Callable[[], str]


class Trials:
    """Sound files of every kind, and what is done with mutated ones; `folder` holds what is written meanwhile."""

    KINDS = (*["container"] * 14, *["calibration"] * 2, *["article"] * 2, "source", "names")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "mutated"
        # One of them is long.
        self._containers = [paths(id)[0].read_bytes() for id in FORMAT_IDS if id != "article7_b64"]
        linear = LayerInputs(random_half(64).abs().float() + 0.1, 100, random_half(64, 4, seed=1) / 8)
        whole = LayerInputs(torch.ones(16), 100, torch.eye(144).half())
        Calibration({"linear.weight": linear, "conv.weight": whole}).save(self._path, overwrite=True)
        self._calibration = self._path.read_bytes()
        write_article_file(self._path, {"a.weight": random_half(16, 64), "a.bias": random_half(7)}, 7, 16)
        self._article = self._path.read_bytes()
        source = {
            "a.weight": random_half(16, 64),
            "b.weight": random_half(4, 4, 4, 4),
            "a.bias": random_half(7).float(),
        }
        save_file(source, self._path, metadata={"title": "a"})
        self._source = self._path.read_bytes()

    def draw(self, rng: Random) -> Attempt:
        """Mutate one file; trying it raises a Fault where what comes of it is wrong."""
        kind = rng.choice(self.KINDS)
        if kind == "names":
            return Attempt(kind, 0, partial(try_names, mutated_names(rng)))
        if kind == "container":
            size = self._path.write_bytes(mutated(rng, rng.choice(self._containers)))
            wanted = by_the_document(self._path)
            return Attempt(kind, size, partial(try_container, self._path, wanted, self._folder, rng.randrange(4)))
        if kind == "calibration":
            size = self._path.write_bytes(mutated_plain(rng, self._calibration, CALIBRATION_KEY))
            return Attempt(kind, size, partial(try_calibration, self._path, rng.random() < 0.3))
        size = self._path.write_bytes(mutated_plain(rng, self._article if kind == "article" else self._source))
        convert = import_article if kind == "article" else quantize_file
        return Attempt(kind, size, partial(try_source, self._path, self._folder / "converted", convert))
