"""The core of ComfyUI-NFQ: the NF block format, its file container and the `nfq` command. It never imports a host."""

from .container import NFQFile
from .errors import CannotQuantizeError, CorruptFileError, NFQError, TargetExistsError, UnsupportedFileError
from .policy import Settings
from .quantizer import quantize
from .state import load, quantize_state_dict, save
from .tensor import NFTensor
from .version import __version__

__all__ = [
    "CannotQuantizeError",
    "CorruptFileError",
    "NFQError",
    "NFQFile",
    "NFTensor",
    "Settings",
    "TargetExistsError",
    "UnsupportedFileError",
    "__version__",
    "load",
    "quantize",
    "quantize_state_dict",
    "save",
]
