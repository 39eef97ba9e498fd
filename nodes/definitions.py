"""The nodes: each reads its inputs, calls what does the work, and returns."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..nfq_core import Calibration, Settings
from ..nfq_core.checkpoints.memory import MODES
from ..nfq_core.fitting.codebook import EFFORTS
from ..nfq_core.packed.formats import LEVELS
from ..nfq_core.planning.allocation import PRESETS
from ..nfq_core.planning.settings import DEFAULT_CONV_LEVELS, DEFAULT_LEVELS, DEFAULTS, BitsPerWeight, Formats
from . import bake, host, load, report, save
from .calibrating import NFCollectCalibration, NFSaveCalibration
from .measuring import NFCompare, NFInspect, NFQualityReport
from .recipe import missing_file, origin_in_graph
from .schema import NOTHING, schema

NO_PRESET = "none"
"""The choice of levels instead of a preset."""


def _file_input(name: str, folder: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=host.file_names(folder),
        tooltip=f"An {host.SUFFIX} file in models/{folder}. NFSaveCheckpoint and `nfq quantize` write them.",
    )


def _recipe_input() -> io.String.Input:
    return io.String.Input(
        "recipe",
        default="",
        optional=True,
        socketless=True,
        tooltip="What the file was made from, and how; filled in when a file is chosen. Whoever opens this workflow "
        "without the file is told what to quantise.",
    )


def _memory_input() -> io.Combo.Input:
    return io.Combo.Input(
        "memory",
        options=list(MODES),
        default="packed",
        optional=True,
        tooltip="packed: weights stay packed, and each layer dequantises its own at every step. resident: all are "
        "dequantised once, for as much memory and speed as fp16. auto: resident where twice that is free, else packed.",
    )


class NFQuantizedUNetLoader(io.ComfyNode):
    """`.nfq.safetensors` → MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFQuantizedUNetLoader",
            search_aliases=[
                "nfq loader",
                "load quantized unet",
                "unet loader nf4",
                "gguf alternative",
                "low vram sdxl",
            ],
            display_name="Load NFQ Diffusion Model",
            description="Loads a quantised UNet, which stays packed in memory unless told otherwise. LoRA, samplers "
            "and CFG work as ever.",
            inputs=[_file_input("unet_name", host.UNETS), _recipe_input(), _memory_input()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str, recipe: str = "") -> bool | str:
        """A missing file is answered with what to quantise, and how."""
        return missing_file(host.UNETS, unet_name, recipe) or True

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: Any) -> str:
        """A file that changed on disk is loaded again."""
        return host.fingerprint(host.UNETS, unet_name)

    @classmethod
    def execute(cls, unet_name: str, recipe: str = "", memory: str = "packed") -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(load.load_unet(host.file_path(host.UNETS, unet_name), memory))


class NFQuantizedCheckpointLoader(io.ComfyNode):
    """`.nfq.safetensors` → MODEL, CLIP, VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFQuantizedCheckpointLoader",
            search_aliases=["nfq checkpoint", "load quantized checkpoint", "low vram checkpoint"],
            display_name="Load NFQ Checkpoint",
            description="Loads a whole checkpoint whose UNet is quantised; CLIP and VAE are as they were.",
            inputs=[_file_input("ckpt_name", host.CHECKPOINTS), _recipe_input(), _memory_input()],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name: str, recipe: str = "") -> bool | str:
        """A missing file is answered with what to quantise, and how."""
        return missing_file(host.CHECKPOINTS, ckpt_name, recipe) or True

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, **_: Any) -> str:
        """A file that changed on disk is loaded again."""
        return host.fingerprint(host.CHECKPOINTS, ckpt_name)

    @classmethod
    def execute(cls, ckpt_name: str, recipe: str = "", memory: str = "packed") -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(*load.load_checkpoint(host.file_path(host.CHECKPOINTS, ckpt_name), memory))


class NFQuantizeUNet(io.ComfyNode):
    """MODEL → packed MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        levels = sorted(LEVELS, reverse=True)
        return schema(
            node_id="NFQuantizeUNet",
            search_aliases=["quantise", "quantize model", "compress unet", "normalfloat", "nf4", "shrink sdxl"],
            display_name="NFQ Quantize UNet",
            description="Quantises a MODEL now. LoRAs and merges before this node are baked in; put others behind it.",
            inputs=[
                io.Model.Input("model", tooltip="From any loader of fp16, bf16 or fp32 weights. It stays as it is."),
                io.Combo.Input(
                    "levels",
                    options=levels,
                    default=DEFAULT_LEVELS,
                    optional=True,
                    tooltip="Levels of the linear layers: 32, 24, 16, 12 and 7 take about 5.1, 4.8, 4.1, 3.8 and 3.1 "
                    "bits per weight. More is closer to the original.",
                ),
                io.Combo.Input(
                    "conv_levels",
                    options=levels,
                    default=DEFAULT_CONV_LEVELS,
                    optional=True,
                    tooltip="Levels of the convolutions, which are few and sensitive.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", "cpu", "gpu"],
                    default="auto",
                    optional=True,
                    tooltip="Where to quantise. auto is the CPU, which takes about a minute for SDXL.",
                ),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default=DEFAULTS.effort,
                    optional=True,
                    tooltip="best takes five to ten times as long and gains a little on heavy-tailed layers.",
                ),
                io.Boolean.Input(
                    "quantize_first_last",
                    default=False,
                    optional=True,
                    tooltip="Quantise the first and the last convolution too. It saves nothing and tints pictures.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[NO_PRESET, *PRESETS],
                    default=NO_PRESET,
                    optional=True,
                    tooltip="A size instead of levels, from best to tiny: each layer gets a format of 2 to 5 or 8 "
                    "bits by how sensitive it is. Closer to the original at the same size, but takes far longer.",
                ),
                io.Combo.Input(
                    "calibration",
                    options=[NOTHING, *host.calibration_names()],
                    default=NOTHING,
                    optional=True,
                    tooltip="What NFSaveCalibration or `nfq` collected from this architecture: brings the output "
                    "nearer at the same size, and takes several times as long.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration: str = NOTHING, **_: Any) -> str:
        """A calibration that changed on disk is used anew."""
        return "" if calibration == NOTHING else host.fingerprint(host.CALIBRATIONS, calibration)

    @classmethod
    def execute(
        cls,
        model: Any,
        levels: int = DEFAULT_LEVELS,
        conv_levels: int = DEFAULT_CONV_LEVELS,
        device: str = "auto",
        effort: str = DEFAULTS.effort,
        quantize_first_last: bool = DEFAULTS.quantize_first_last,
        preset: str = NO_PRESET,
        calibration: str = NOTHING,
    ) -> io.NodeOutput:
        """Quantise."""
        choice = BitsPerWeight(PRESETS[preset]) if preset in PRESETS else Formats.of(int(levels), int(conv_levels))
        settings = Settings(choice, effort, quantize_first_last)
        where = comfy.model_management.get_torch_device() if device == "gpu" else None
        origin = origin_in_graph(cls.hidden.prompt, cls.hidden.unique_id)
        fed = None if calibration == NOTHING else Calibration.load(host.calibration_path(calibration))
        packed = bake.quantize_model(model, settings, where, origin, cls.hidden.unique_id, fed)
        return io.NodeOutput(packed, ui={"nfq": (report.model_facts(packed),)})


class NFSaveCheckpoint(io.ComfyNode):
    """Packed MODEL (and CLIP, VAE) → `.nfq.safetensors`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFSaveCheckpoint",
            search_aliases=["save nfq", "save quantized model", "export nfq"],
            display_name="Save NFQ Checkpoint",
            description="Writes a quantised MODEL, alone or with CLIP and VAE, where the NFQ loaders list it.",
            inputs=[
                io.Model.Input("model", tooltip="From NFQuantizeUNet or an NFQ loader, without a LoRA behind it."),
                io.Clip.Input("clip", optional=True, tooltip="For a whole checkpoint, together with vae."),
                io.Vae.Input("vae", optional=True, tooltip="For a whole checkpoint, together with clip."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI-NFQ",
                    optional=True,
                    tooltip="Name of the file, .nfq.safetensors is added. It goes into the output folder, below "
                    "diffusion_models, or checkpoints when clip and vae are connected.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, optional=True, tooltip="Whether a file of this name may be replaced."
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any = None,
        vae: Any = None,
        filename_prefix: str = "ComfyUI-NFQ",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        """Save."""
        workflow = (cls.hidden.extra_pnginfo or {}).get("workflow")
        path = save.save_model(model, clip, vae, filename_prefix, overwrite, workflow, cls.hidden.prompt)
        return io.NodeOutput(ui={"text": (f"saved {host.output_name(path)}",)})


NODES = [
    NFQuantizedUNetLoader,
    NFQuantizeUNet,
    NFSaveCheckpoint,
    NFQuantizedCheckpointLoader,
    NFInspect,
    NFCompare,
    NFQualityReport,
    NFCollectCalibration,
    NFSaveCalibration,
]
