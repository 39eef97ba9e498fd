"""transformers' quantiser interface: packs a text encoder that `from_pretrained` has loaded, or reads a packed one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer

from ..checkpoints.state_dict import load_tensors
from ..errors import CannotQuantizeError, NFQError, UnsupportedFileError
from ..files.container import FACTS_KEY, PREFIX, Facts, NFQFile
from ..files.original import Original
from ..files.safetensors_io import Entry
from ..fitting.quantizer import quantize
from ..layers.packing import PACKED_KINDS, pack_layers, packed_layers
from ..planning.facts import facts_about
from ..planning.policy import plan_tensors, recorded_text_encoders
from .foreign import refuse_foreign
from .text_model import CLASSES, dtype_of, make_packed_text_encoder, make_stock_text_encoder, shapes_of
from .text_names import find_text_encoder, tied_names

log = logging.getLogger("nfq")


class NFQTextQuantizer(HfQuantizer):
    """Packs a text encoder's Linear and Embedding weights.

    If `config.json` says that the model is quantised, its weights file is an `.nfq.safetensors` file.

    Args:
        quantization_config: an `NFQConfig`.
        kwargs: options from transformers.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.facts = Facts()
        """Facts about the model, as a container's header records them."""
        self._shown: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse arguments that cannot work, before anything is loaded."""
        device_map = kwargs.get("device_map")
        if device_map == "auto" or (isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1):
            raise NFQError("a packed text encoder is loaded to one device; give its name as device_map")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if type(model).__name__ not in CLASSES:
            raise NFQError(
                f"NFQConfig packs {', '.join(CLASSES)} of transformers, not {type(model).__name__}; leave "
                "quantization_config out for this model"
            )
        if not self.pre_quantized:
            self._check_source(checkpoint_files or ())
        elif checkpoint_files is None:
            raise UnsupportedFileError(
                "this version of transformers cannot read a quantised folder; update transformers, or read it with "
                "load_text_encoder(FILE, FOLDER)"
            )
        elif len(checkpoint_files) != 1:
            raise NFQError("its weights are in several files; a quantised model has one")
        else:
            self._read(model, checkpoint_files[0])
        return model

    def _check_source(self, checkpoint_files: Sequence[str]) -> None:
        """Raise NFQError if the weights are quantised already, or a calibration is given."""
        for path in checkpoint_files:
            if not str(path).endswith(".safetensors"):
                continue
            with Original(path) as file:
                if FACTS_KEY in file.metadata:
                    raise NFQError(
                        f"{path} is quantised already, and its config.json does not say so; "
                        "load_text_encoder(FILE, FOLDER) reads it"
                    )
                refuse_foreign(file.entries, str(path))
        if self.quantization_config.for_quantizing()[1] is not None:
            raise NFQError("a calibration is of a diffusion model; leave it out for a text encoder")

    def _read(self, model: nn.Module, path: str) -> None:
        """Give a model on torch's meta device the packed weights of a file; transformers then loads the others."""
        with NFQFile(path) as file:
            renamed = find_text_encoder(file, shapes_of(model), "config.json")[1]
            packed = [each for each in renamed if each.key in file.quantized]
            loaded = load_tensors(file, [each.key for each in packed])
            self.facts = file.facts
        tensors = {name: one for each in packed for name, one in each.tensors(loaded[each.key]).items()}
        pack_layers(model, tensors)
        for layer in packed_layers(model).values():
            # transformers initialises tensors without this mark at random.
            layer.weight._is_hf_initialized = True
        # It neither finds packed weights under their names in the file, nor knows the file's names of them.
        hide = partial(_without, frozenset(tensors))
        self._shown = model.register_state_dict_post_hook(hide)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"(^|\.){PREFIX.rstrip('.')}\."}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._shown is None:
            self._pack(model)
            return make_packed_text_encoder(model, self)
        self._shown.remove()
        self._shown = None
        device = next(one.device for one in model.parameters() if one.is_floating_point())
        for name, layer in packed_layers(model).items():
            layer.to(device).compute_dtype = dtype_of(model, name, model.dtype)
        return make_packed_text_encoder(model, self)

    def _pack(self, model: nn.Module) -> None:
        """Quantise a loaded model's layers one by one; each dense weight is freed before the next is quantised."""
        settings, _ = self.quantization_config.for_quantizing()
        entries = {name: Entry("F16", shape, 0, 0) for name, shape in shapes_of(model).items()}
        info, plans = plan_tensors(entries, settings)
        recorded = settings.as_dict() | recorded_text_encoders(settings, entries)
        self.facts = facts_about(info, entries, recorded)
        layers = {
            f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, tuple(PACKED_KINDS))
        }
        tied = tied_names(layers)
        for name in [name for name in layers if plans[name].format and name not in tied]:
            weight = layers.pop(name).weight.detach()
            try:
                packed = quantize(
                    weight,
                    format=plans[name].format.id,
                    effort=settings.effort,
                    device=weight.device if weight.device.type == "cuda" else "cpu",
                )
            except CannotQuantizeError as error:
                log.warning("tensor %r is kept as it is: %s", name, error)
                continue
            same = [other for other, source in tied.items() if source == name]
            pack_layers(model, {each: packed.to(weight.device) for each in (name, *same)})

    def _dequantize(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return make_stock_text_encoder(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed models can be saved, by `PackedTextEncoder.save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """LoRAs on packed weights can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A packed model compiles to one graph."""
        return True


def _without(hidden: frozenset[str], model: nn.Module, state: dict[str, Any], *others: Any) -> None:
    """Remove tensors from a state dict."""
    for name in hidden:
        state.pop(name, None)
