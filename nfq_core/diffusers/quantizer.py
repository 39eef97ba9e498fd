"""diffusers' quantiser interface: packs weights while `from_pretrained` loads them, or reads packed ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_accelerate_available
from torch import nn

from ..calibration.statistics import measured_sensitivities
from ..checkpoints.state_dict import load_tensors
from ..errors import CannotQuantizeError, NFQError, UnsupportedFileError, missing_package
from ..files.container import PREFIX, Facts, NFQFile
from ..files.safetensors_io import Entry
from ..fitting.quantizer import quantize
from ..layers.packing import PACKED_KINDS, pack_layers
from ..packed.tensor import QUANTIZABLE_DTYPES, NFTensor
from ..planning.facts import facts_about
from ..planning.policy import estimate_warnings, plan_tensors
from .foreign import EIGHT_BIT_FLOATS, refuse_foreign, refuse_integers
from .model import check_fits, make_packed, make_stock, names_in_model

log = logging.getLogger("nfq")


class NFQQuantizer(DiffusersQuantizer):
    """Packs a model's Linear and Conv2d weights.

    If `config.json` says that the model is quantised, its weights file is an `.nfq.safetensors` file.

    Args:
        quantization_config: an `NFQConfig`.
        kwargs: options from diffusers.
    """

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.facts = Facts()
        """Facts about the model, as a container's header records them."""
        self._file: NFQFile | None = None
        self._names: dict[str, str] = {}
        self._loaded_keys: list[str] = []
        self._checked: Mapping[str, torch.Tensor] | None = None
        self._packed: dict[str, NFTensor] = {}
        self._formats: dict[str, str] = {}
        self._statistics: dict[str, dict[str, Any]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse arguments that cannot work, before anything is loaded."""
        if not is_accelerate_available():
            raise missing_package("quantising at load needs accelerate (load_unet does not)", "accelerate")
        dtype, device_map = kwargs.get("torch_dtype"), kwargs.get("device_map")
        if dtype is not None and dtype not in QUANTIZABLE_DTYPES:
            raise NFQError(f"torch_dtype must be fp16, bf16, fp32 or fp64, got {dtype}")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise NFQError("packed weights cannot be offloaded to disk; choose a device_map without 'disk'")

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """The dtype that a device map counts for a weight: larger than any format."""
        return torch.int8

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """The model's names of the tensors in the weights file."""
        if not self.pre_quantized:
            if any(key.startswith(PREFIX) for key in loaded_keys):
                raise NFQError(
                    f"{checkpoint_files[0]} is quantised already, and its config.json does not say so; "
                    "load_unet(FILE, FOLDER) reads it"
                )
            refuse_foreign(loaded_keys, os.fspath(checkpoint_files[0]))
            return loaded_keys
        if len(checkpoint_files) > 1:
            folder = os.path.dirname(checkpoint_files[0])
            raise NFQError(f"{folder}: its weights are in several files; a quantised model has one")
        self._file = NFQFile(checkpoint_files[0])
        self.facts = self._file.facts
        # Filled by `_process_model_before_weight_loading`, which gets the model and so knows the names.
        self._loaded_keys = []
        return self._loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the weights file by the model's names; packed weights are given as their buffers."""
        if self._file is None:
            self._check_source(state_dict)
            return state_dict
        with self._file as file:
            tensors = load_tensors(file, self._names)
        loaded = {self._names[key]: tensor for key, tensor in tensors.items()}
        self._file, self._names = None, {}
        self._packed = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, NFTensor)}
        return loaded | {name: tensor.data for name, tensor in self._packed.items()}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: Mapping, **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` handles a tensor."""
        if param_name in self._packed or param_name in self._formats:
            return True
        # diffusers would keep these in 8 bits.
        return param_value.dtype in EIGHT_BIT_FLOATS

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device | str | int | None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace a stock layer by a packed one."""
        device = torch.device("cpu" if target_device is None else target_device)
        packed = self._packed.pop(param_name, None)
        parent, _, name = param_name.removesuffix(".weight").rpartition(".")
        module = model.get_submodule(parent)
        if state_dict is not None and packed is None:
            self._check_source(state_dict)
        if packed is None and param_name not in self._formats:
            from accelerate.utils import set_module_tensor_to_device

            dtype = kwargs.get("dtype") or torch.float32
            set_module_tensor_to_device(model, param_name, device, value=param_value.to(dtype), dtype=dtype)
            return
        if packed is None:
            # `param_value` is already cast to the compute dtype; quantise the file's own values.
            weight = param_value if state_dict is None else state_dict[param_name]
            if weight.dtype in EIGHT_BIT_FLOATS:
                weight = weight.half()
            try:
                packed = quantize(
                    weight,
                    format=self._formats[param_name],
                    effort=self.facts.settings["effort"],
                    device=device if device.type == "cuda" else "cpu",
                    **self._statistics.get(param_name, {}),
                )
            except CannotQuantizeError as error:
                log.warning("tensor %r is kept as it is: %s", param_name, error)
                kept = nn.Parameter(param_value.to(device), requires_grad=False)
                module.get_submodule(name).weight = kept
                return
        pack_layers(module, {f"{name}.weight": packed.to(device)})

    def _check_source(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Raise NFQError if weights are quantised already. Older versions of diffusers only call `create_…`."""
        if state_dict is not self._checked:
            refuse_foreign(state_dict, "the source")
            refuse_integers(state_dict, "the source")
            self._checked = state_dict

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._file is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            try:
                self._names = names_in_model(self._file, shapes)
                check_fits(self._file, self._names, shapes, "config.json")
            except BaseException:
                self._file.close()
                raise
            self._loaded_keys += self._names.values()
            return model
        # diffusers converts a single file, and takes it for quantised unless something says that it is not.
        if self.pre_quantized and "state_dict" not in kwargs:
            raise UnsupportedFileError(
                "this version of diffusers cannot read a quantised folder, 0.39 or newer can; load_unet(FILE, FOLDER) "
                "reads it with this one"
            )
        settings, calibration = self.quantization_config.for_quantizing()
        entries = {name: Entry("F16", tuple(tensor.shape), 0, 0) for name, tensor in model.state_dict().items()}
        measured = measured_sensitivities(entries, settings, calibration)
        info, plans = plan_tensors(entries, settings, measured)
        estimated = estimate_warnings(info, plans, measured)
        layers = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, tuple(PACKED_KINDS))}
        plans = {name: plan for name, plan in plans.items() if plan.format and name in layers}
        inputs, warnings = calibration.for_plans(info, plans) if calibration else ({}, [])
        for warning in estimated + warnings:
            log.warning("%s", warning)
        self._formats = {name: plan.format.id for name, plan in plans.items()}
        self._statistics = {name: statistics.arguments() for name, statistics in inputs.items()}
        used = calibration.as_dict() if inputs or measured else {}
        self.facts = facts_about(info, entries, settings.as_dict() | used)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        missing = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
        if missing is not None:
            raise NFQError(f"the weights lack tensor {missing!r}, which config.json requires")
        self._statistics, self._checked = {}, None
        return make_packed(model, self)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return make_stock(model)

    @property
    def is_serializable(self) -> bool:
        """Packed models can be saved, by `PackedModel.save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """LoRAs on packed weights can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A packed model compiles to one graph."""
        return True
