"""The core of ComfyUI-NFQ: the NF block format, its file container and the `nfq` command. It never imports a host."""

from .calibration import Calibration
from .collector import collect
from .container import NFQFile
from .errors import (
    CannotQuantizeError,
    CorruptFileError,
    DiskFullError,
    NFQError,
    TargetExistsError,
    UnsupportedFileError,
)
from .policy import Settings
from .quantizer import quantize
from .state import load, quantize_state_dict, save
from .tensor import NFTensor
from .version import __version__

__all__ = [
    "Calibration",
    "CannotQuantizeError",
    "CorruptFileError",
    "DiskFullError",
    "NFQError",
    "NFQFile",
    "NFTensor",
    "Settings",
    "TargetExistsError",
    "UnsupportedFileError",
    "__version__",
    "collect",
    "load",
    "quantize",
    "quantize_state_dict",
    "save",
]
