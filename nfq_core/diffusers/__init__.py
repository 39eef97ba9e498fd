"""Quantised UNets in diffusers: `NFQConfig` quantises at load, `load_unet` reads an `.nfq.safetensors` file.

Importing this package tells diffusers of the quantisation method "nfq", which `from_pretrained` needs for the folders
that a packed model's `save_pretrained` writes.
"""

from __future__ import annotations

from ..errors import missing_package

_OLDEST = (0, 33)
"""Before, the interface for quantisers served one of them alone."""


def _needed(found: str = "") -> ImportError:
    oldest = ".".join(map(str, _OLDEST))
    needed = f"nfq_core.diffusers needs diffusers {oldest} or newer{found}"
    return missing_package(needed, f'"diffusers>={oldest}"', "accelerate")


try:
    import diffusers
except ImportError as error:
    raise _needed() from error
if tuple(map(int, diffusers.__version__.split(".")[:2])) < _OLDEST:
    raise _needed(f", this is {diffusers.__version__}")

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING  # noqa: E402

from .config import METHOD, NFQConfig  # noqa: E402
from .loading import load_unet  # noqa: E402

__all__ = ["NFQConfig", "load_unet"]


def _register() -> None:
    """Tell diffusers of the method; where another copy of this package has done so, that one stays."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD.value, NFQConfig)
    # Each configuration makes the quantiser of its own copy.
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD.value, lambda config, **options: config.quantizer(**options))


_register()
