"""Quantised UNets in diffusers: `NFQConfig` quantises at load, `load_unet` reads an `.nfq.safetensors` file.

Importing this package tells diffusers of the quantisation method "nfq", which `from_pretrained` needs for the folders
that a packed model's `save_pretrained` writes.
"""

from __future__ import annotations

from typing import Any

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

from diffusers.quantizers.auto import (  # noqa: E402
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    DiffusersAutoQuantizer,
)

from .config import METHOD, NFQConfig  # noqa: E402
from .foreign import refuse_other_method  # noqa: E402
from .loading import load_unet  # noqa: E402

__all__ = ["NFQConfig", "load_unet"]


def _register() -> None:
    """Tell diffusers of the method; where another copy of this package has done so, that one stays."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD.value, NFQConfig)
    # Each configuration makes the quantiser of its own copy.
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD.value, lambda config, **options: config.quantizer(**options))
    # diffusers ignores the configuration it is given where the folder has another, with no more than a warning.
    merge = DiffusersAutoQuantizer.merge_quantization_configs.__func__

    def merge_quantization_configs(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, NFQConfig):
            refuse_other_method(quantization_config, METHOD.value)
        return merge(cls, quantization_config, quantization_config_from_args)

    DiffusersAutoQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)


_register()
