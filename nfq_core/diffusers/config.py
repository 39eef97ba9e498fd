"""The quantisation settings for diffusers, and how `config.json` stores them."""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..calibration.statistics import Calibration
from ..checkpoints.extras import SETTING
from ..planning.settings import TEXT_ENCODERS_SETTING, Settings, without_repetition
from .foreign import refuse_other_method
from .patches import wrap_config_merging
from .quantizer import NFQQuantizer

if TYPE_CHECKING:
    from .text_quantizer import NFQTextQuantizer


class Method(str, Enum):
    """The name under which diffusers finds the quantiser."""

    NFQ = "nfq"


METHOD = Method.NFQ


class NFQConfig(QuantizationConfigMixin):
    """Settings for `from_pretrained(…, quantization_config=NFQConfig(…))`, which quantises a model at load.

    `from_pretrained` is that of a diffusers model, or of a text encoder in transformers.

    Args:
        levels: levels of Linear weights, instead of a preset: 32, 24, 16, 12 or 7.
        conv_levels: levels of convolutions.
        effort: see `Settings`.
        quantize_first_last: whether a UNet's first and last convolution are quantised too.
        format: the format of Linear weights instead of `levels`, one of `formats.WRITABLE_IDS`.
        conv_format: the format of convolutions instead of `conv_levels`.
        preset: a size, one of `settings.PRESETS`; by default "balanced".
        target_bpw: most packed bits per weight, instead of a preset.
        text_encoders: how a text encoder is packed, see `Settings`.
        calibration: statistics of the layers' inputs, or their file; see `nfq_core.collect`.
        quant_method: "nfq", as in `config.json`.

    Raises:
        ValueError: a value is not allowed.
    """

    def __init__(
        self,
        levels: int | None = None,
        *,
        conv_levels: int | None = None,
        effort: str = "fast",
        quantize_first_last: bool = False,
        format: str | None = None,
        conv_format: str | None = None,
        preset: str | None = None,
        target_bpw: float | None = None,
        text_encoders: str | None = None,
        calibration: Calibration | str | os.PathLike | None = None,
        quant_method: str = METHOD.value,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD.value!r}, got {quant_method!r}")
        self.quant_method = METHOD
        self.settings = Settings.of(
            preset=preset,
            target_bpw=target_bpw,
            levels=levels,
            conv_levels=conv_levels,
            format=format,
            conv_format=conv_format,
            effort=effort,
            quantize_first_last=quantize_first_last,
            text_encoders=text_encoders,
        )
        self.calibration = calibration
        self._invalid = ""
        """Why the settings of a `config.json` cannot quantise a model; empty if they can."""
        wrap_config_merging()

    def check_folder(self, config: Any) -> None:
        """Check that a folder can be loaded with this configuration.

        Args:
            config: the `quantization_config` of the folder's `config.json`.

        Raises:
            NFQError: another program quantised its weights.
        """
        refuse_other_method(config, METHOD.value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See diffusers.

        Settings of a file or `config.json` may not be able to quantise a model, such as those of an imported article
        file. This is only an error once a model is quantised with them, see `for_quantizing`.
        """
        try:
            # A model that diffusers builds has no extras.
            given = without_repetition(config_dict)
            config = cls(**{name: value for name, value in given.items() if name != SETTING})
        except (TypeError, ValueError) as error:
            config = cls()
            config._invalid = str(error).removeprefix("NFQConfig.__init__() ")
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON-ready dict; a calibration is given by its name."""
        settings = self.settings.as_dict()
        if self.settings.text_encoders is not None:
            settings[TEXT_ENCODERS_SETTING] = self.settings.text_encoders
        if isinstance(self.calibration, Calibration):
            settings["calibration"] = self.calibration.source.name
        elif self.calibration is not None:
            settings["calibration"] = os.path.basename(self.calibration)
        return {"quant_method": METHOD.value, **settings}

    to_diff_dict = to_dict

    def for_quantizing(self) -> tuple[Settings, Calibration | None]:
        """The settings and the loaded calibration, to quantise a model.

        Raises:
            ValueError: a setting is unknown or not allowed.
            NFQError: the calibration cannot be read.
        """
        if self._invalid:
            raise ValueError(f"this quantization_config cannot quantise a model: {self._invalid}")
        if self.calibration is None or isinstance(self.calibration, Calibration):
            return self.settings, self.calibration
        return self.settings, Calibration.load(self.calibration)

    def quantizer(self, **options: Any) -> NFQQuantizer:
        """Create the quantiser for a model; `options` come from diffusers."""
        return NFQQuantizer(self, **options)

    def text_quantizer(self, **options: Any) -> NFQTextQuantizer:
        """Create the quantiser for a text encoder; `options` come from transformers."""
        from .text_quantizer import NFQTextQuantizer

        return NFQTextQuantizer(self, **options)
