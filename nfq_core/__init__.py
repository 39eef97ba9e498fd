"""The core of ComfyUI-NFQ: the NF block format, its file container and the `nfq` command, independent of any host."""

from .calibration.collector import collect
from .calibration.statistics import Calibration
from .checkpoints.convert import dequantize_file, quantize_file
from .checkpoints.state_dict import load, quantize_state_dict, save
from .errors import (
    CannotQuantizeError,
    CorruptFileError,
    DiskFullError,
    NFQError,
    TargetExistsError,
    UnsupportedFileError,
)
from .files.container import NFQFile
from .fitting.quantizer import quantize
from .packed.tensor import NFTensor
from .planning.settings import BitsPerWeight, FileSize, Formats, Settings
from .version import __version__

__all__ = [
    "BitsPerWeight",
    "Calibration",
    "CannotQuantizeError",
    "CorruptFileError",
    "DiskFullError",
    "FileSize",
    "Formats",
    "NFQError",
    "NFQFile",
    "NFTensor",
    "Settings",
    "TargetExistsError",
    "UnsupportedFileError",
    "__version__",
    "collect",
    "dequantize_file",
    "load",
    "quantize",
    "quantize_file",
    "quantize_state_dict",
    "save",
]
