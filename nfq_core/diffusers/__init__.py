"""Quantised UNets in diffusers: `NFQConfig` quantises at load, `load_unet` reads an `.nfq.safetensors` file.

Importing this package tells diffusers of the quantisation method "nfq", which `from_pretrained` needs for the folders
that a packed model's `save_pretrained` writes.
"""

try:
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
except ImportError as error:
    raise ImportError(
        'nfq_core.diffusers needs diffusers 0.31 or newer: pip install "comfyui-nfq[diffusers]"'
    ) from error

from .config import METHOD, NFQConfig
from .loading import load_unet

__all__ = ["NFQConfig", "load_unet"]


def _register() -> None:
    """Tell diffusers of the method; where another copy of this package has done so, that one stays."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD.value, NFQConfig)
    # Each configuration makes the quantiser of its own copy.
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD.value, lambda config, **options: config.quantizer(**options))


_register()
