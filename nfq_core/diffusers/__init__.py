"""Quantised models in diffusers: `NFQConfig` quantises at load; `load_unet`, `load_model`, `load_text_encoder` and
`load_pipeline` read an `.nfq.safetensors` file; `calibrate` samples a pipeline for its calibration.

Importing this package registers the quantisation method "nfq" with diffusers, and with transformers if it is installed.
`from_pretrained` needs it for folders that a packed model's `save_pretrained` wrote.
"""

from __future__ import annotations

from ..errors import missing_package

_OLDEST = (0, 33)
"""Older versions have no interface for other quantisers."""


def _version_error(installed: str = "") -> ImportError:
    oldest = ".".join(map(str, _OLDEST))
    needed = f"nfq_core.diffusers needs diffusers {oldest} or newer{installed}"
    return missing_package(needed, f'"diffusers>={oldest}"', "accelerate")


try:
    import diffusers
except ImportError as error:
    raise _version_error() from error
if tuple(map(int, diffusers.__version__.split(".")[:2])) < _OLDEST:
    raise _version_error(f", this is {diffusers.__version__}")

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING  # noqa: E402

from .calibrating import calibrate  # noqa: E402
from .config import METHOD, NFQConfig  # noqa: E402
from .loading import load_model, load_unet  # noqa: E402
from .pipeline import load_pipeline, load_text_encoder  # noqa: E402

__all__ = ["NFQConfig", "calibrate", "load_model", "load_pipeline", "load_text_encoder", "load_unet"]


def _register() -> None:
    """Register the method with diffusers and transformers, unless another copy of this package has done so."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD.value, NFQConfig)
    # A configuration creates the quantiser of its own copy of the package.
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD.value, lambda config, **options: config.quantizer(**options))
    try:
        from transformers.quantizers import auto
    except ImportError:
        return
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD.value, NFQConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD.value, lambda config, **options: config.text_quantizer(**options))


_register()
