"""How diffusers is told what to quantise, and what `config.json` says about it."""

from __future__ import annotations

import os
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..calibration.statistics import Calibration
from ..checkpoints.extras import SETTING
from ..planning.allocation import PRESETS
from ..planning.settings import BitsPerWeight, Formats, Settings
from .foreign import refuse_other_method
from .patches import watch_configs
from .quantizer import NFQQuantizer


class Method(str, Enum):
    """The name by which diffusers finds the quantiser."""

    NFQ = "nfq"


METHOD = Method.NFQ


class NFQConfig(QuantizationConfigMixin):
    """How `from_pretrained(…, quantization_config=NFQConfig(…))` quantises a model while it is loaded.

    Args:
        levels: levels of Linear weights: 32, 24, 16, 12 or 7.
        conv_levels: levels of convolutions.
        effort: "fast" or "best".
        quantize_first_last: whether a UNet's first and last convolution are quantised too.
        format: the format of Linear weights instead of `levels`, one of `formats.WRITABLE_IDS`.
        conv_format: likewise instead of `conv_levels`.
        preset: a size instead of formats: one of `allocation.PRESETS`.
        target_bpw: packed bits per weight, at most, instead of formats.
        calibration: statistics of the layers' inputs, or the file that holds them; see `nfq_core.collect`.
        quant_method: "nfq", as `config.json` says it.

    Raises:
        ValueError: a value is none of those allowed.
    """

    def __init__(
        self,
        levels: int = 16,
        *,
        conv_levels: int = 32,
        effort: str = "fast",
        quantize_first_last: bool = False,
        format: str | None = None,
        conv_format: str | None = None,
        preset: str | None = None,
        target_bpw: float | None = None,
        calibration: Calibration | str | os.PathLike | None = None,
        quant_method: str = METHOD.value,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD.value!r}, got {quant_method!r}")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if preset is not None and target_bpw is not None:
            raise ValueError("preset and target_bpw exclude each other")
        bits = PRESETS[preset] if preset is not None else target_bpw
        self.quant_method = METHOD
        formats = Formats.of(levels, conv_levels, format, conv_format)
        self.settings = Settings(formats if bits is None else BitsPerWeight(bits), effort, quantize_first_last)
        self.calibration = calibration
        self._refusal = ""
        watch_configs()

    def check_folder(self, config: Any) -> None:
        """See that a folder can be loaded with this configuration.

        Args:
            config: the `quantization_config` of the folder's `config.json`.

        Raises:
            NFQError: another program quantised its weights.
        """
        refuse_other_method(config, METHOD.value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See diffusers.

        What a file or a `config.json` records may be nothing that a model can be quantised by, such as an import; that
        is refused when it is to be done.
        """
        try:
            # A model that diffusers builds has no extras.
            config = cls(**{name: value for name, value in config_dict.items() if name != SETTING})
        except (TypeError, ValueError) as error:
            config = cls()
            config._refusal = str(error).removeprefix("NFQConfig.__init__() ")
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The settings, a calibration by its name."""
        settings = self.settings.as_dict()
        if isinstance(self.calibration, Calibration):
            settings["calibration"] = self.calibration.source.name
        elif self.calibration is not None:
            settings["calibration"] = os.path.basename(self.calibration)
        return {"quant_method": METHOD.value, **settings}

    to_diff_dict = to_dict

    def for_quantizing(self) -> tuple[Settings, Calibration | None]:
        """The settings and the calibration, read from its file, by which a model is going to be quantised.

        Raises:
            ValueError: one of them is unknown or not allowed.
            NFQError: the calibration cannot be read.
        """
        if self._refusal:
            raise ValueError(f"nothing can be quantised by this quantization_config: {self._refusal}")
        if self.calibration is None or isinstance(self.calibration, Calibration):
            return self.settings, self.calibration
        return self.settings, Calibration.load(self.calibration)

    def quantizer(self, **options: Any) -> NFQQuantizer:
        """The quantiser for a model; `options` as diffusers gives them."""
        return NFQQuantizer(self, **options)
