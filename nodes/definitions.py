"""The nodes that load, quantise and save, and the list of all nodes.

Each node reads its inputs, calls the function that does the work, and returns.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..nfq_core import Calibration, Settings
from ..nfq_core.checkpoints.memory import MODES
from ..nfq_core.fitting.codebook import EFFORTS
from ..nfq_core.packed.formats import LEVELS
from ..nfq_core.planning.settings import (
    BY_LEVELS,
    DEFAULT_CONV_LEVELS,
    DEFAULT_LEVELS,
    DEFAULT_PRESET,
    DEFAULTS,
    PRESETS,
)
from . import bake, host, load, naming, report, save
from .calibration_nodes import NFCalibrate, NFCollectCalibration, NFSaveCalibration
from .clip_nodes import BITS, NFQuantizeCLIP, NFQuantizedCLIPLoader, NFSaveCLIP
from .measurement_nodes import NFCompare, NFInspect, NFQualityReport
from .recipe import missing_file, origin_in_graph
from .schema import (
    NOTHING,
    advanced,
    file_input,
    filename_prefix_input,
    overwrite_input,
    recipe_input,
    schema,
)


def _presets_in_words() -> str:
    return ", ".join(f"{name} {bits}" for name, bits in PRESETS.items())


def _memory_input() -> io.Combo.Input:
    return io.Combo.Input(
        "memory",
        options=list(MODES),
        default="packed",
        optional=True,
        tooltip="packed: weights stay packed, and each layer is dequantised whenever it runs. resident: all weights "
        "are dequantised once at load, with the memory use and speed of fp16. auto: resident if twice that memory is "
        "free, else packed.",
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
            description="Loads a quantised diffusion model and, by default, keeps it packed in memory. LoRA, samplers "
            "and CFG work as usual.",
            inputs=[file_input("unet_name", host.UNETS), recipe_input(), _memory_input()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str, recipe: str = "") -> bool | str:
        """Explain how to recreate a missing file."""
        return missing_file(host.UNETS, unet_name, recipe) or True

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: Any) -> str:
        """Load the file again when it changes on disk."""
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
            description="Loads a whole checkpoint with a quantised diffusion model and, usually, CLIP, and by default "
            "keeps both packed in memory.",
            inputs=[file_input("ckpt_name", host.CHECKPOINTS), recipe_input(), _memory_input()],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name: str, recipe: str = "") -> bool | str:
        """Explain how to recreate a missing file."""
        return missing_file(host.CHECKPOINTS, ckpt_name, recipe) or True

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, **_: Any) -> str:
        """Load the file again when it changes on disk."""
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
            display_name="NFQ Quantize Model",
            description="Quantises a MODEL in this workflow. LoRAs and merges before this node are baked in; connect "
            "other LoRAs after it.",
            inputs=[
                io.Model.Input("model", tooltip="From any loader of fp16, bf16 or fp32 weights. It is not changed."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, BY_LEVELS],
                    default=DEFAULT_PRESET,
                    optional=True,
                    tooltip=f"The size: {_presets_in_words()} bits per weight. Each layer gets the format that its "
                    f"sensitivity asks for. With {BY_LEVELS}, every layer gets the number of levels chosen below.",
                ),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default=DEFAULTS.effort,
                    optional=True,
                    tooltip="fast chooses among scalar codebooks. best chooses among trellis codes, which are closer "
                    "to the original at the same size, but take several times as long; less if numba is installed.",
                ),
                advanced(
                    io.Combo,
                    "levels",
                    options=levels,
                    default=DEFAULT_LEVELS,
                    tooltip=f"Counts only with preset {BY_LEVELS}. Levels for Linear layers: 32, 24, 16, 12 and 7 take "
                    "about 5.1, 4.8, 4.1, 3.8 and 3.1 bits per weight.",
                ),
                advanced(
                    io.Combo,
                    "conv_levels",
                    options=levels,
                    default=DEFAULT_CONV_LEVELS,
                    tooltip=f"Counts only with preset {BY_LEVELS}. Levels for convolutions, which are few and "
                    "sensitive.",
                ),
                advanced(
                    io.Combo,
                    "device",
                    options=list(bake.DEVICES),
                    default=bake.DEVICES[0],
                    tooltip="Where to quantise. auto: on the GPU if there is one that can and its memory suffices, "
                    "else on the CPU.",
                ),
                advanced(
                    io.Boolean,
                    "quantize_first_last",
                    default=False,
                    tooltip="Also quantise the first and last convolution. Saves almost no space and tints pictures.",
                ),
                advanced(
                    io.Combo,
                    "calibration",
                    options=[NOTHING, *host.calibration_names()],
                    default=NOTHING,
                    tooltip="The output of NFQ Calibrate, or a file of this architecture. Brings pictures closer to "
                    "the original at the same size.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration: str = NOTHING, **_: Any) -> str:
        """Quantise again when the calibration changes on disk."""
        return "" if calibration == NOTHING else host.fingerprint(host.CALIBRATIONS, calibration)

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str = DEFAULT_PRESET,
        effort: str = DEFAULTS.effort,
        levels: int = DEFAULT_LEVELS,
        conv_levels: int = DEFAULT_CONV_LEVELS,
        device: str = bake.DEVICES[0],
        quantize_first_last: bool = DEFAULTS.quantize_first_last,
        calibration: str = NOTHING,
    ) -> io.NodeOutput:
        """Quantise."""
        settings = Settings.from_form(preset, int(levels), int(conv_levels), effort, quantize_first_last)
        origin = origin_in_graph(cls.hidden.prompt, cls.hidden.unique_id)
        statistics = None if calibration == NOTHING else Calibration.load(host.calibration_path(calibration))
        packed = bake.quantize_model(model, settings, device, origin, cls.hidden.unique_id, statistics)
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
            description="Writes a quantised MODEL, alone or with CLIP and VAE, to a folder that the NFQ loaders list.",
            inputs=[
                io.Model.Input(
                    "model", lazy=True, tooltip="From NFQ Quantize Model or an NFQ loader, with no LoRA after it."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    lazy=True,
                    tooltip="Connect clip and vae to save a whole checkpoint. LoRAs on a dense CLIP are baked in.",
                ),
                io.Vae.Input(
                    "vae", optional=True, lazy=True, tooltip="Connect clip and vae to save a whole checkpoint."
                ),
                filename_prefix_input(
                    host.SUFFIX,
                    "output/diffusion_models, or output/checkpoints if clip and vae are connected",
                    if_empty="the file is named after the model and the preset",
                ),
                overwrite_input(),
                io.Combo.Input(
                    "text_encoders",
                    options=[save.AUTO, *BITS, "keep"],
                    default=save.AUTO,
                    optional=True,
                    tooltip="How clip is stored. auto: 5 bits with presets small and tiny, else 8 bits. keep: "
                    "unchanged. A quantised CLIP is stored as it is.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def check_lazy_status(cls, filename_prefix: str = "", overwrite: bool = False, **inputs: Any) -> list[str]:
        """Refuse what can be known before the MODEL is quantised; returns the inputs still to be evaluated."""
        save.refuse_half("clip" in inputs, "vae" in inputs)
        name = filename_prefix.strip() or naming.planned_name(cls.hidden.prompt, cls.hidden.unique_id)
        if name:
            save.model_path(name, "clip" not in inputs, overwrite)
        return [socket for socket in ("model", "clip", "vae") if socket in inputs and inputs[socket] is None]

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any = None,
        vae: Any = None,
        filename_prefix: str = "",
        overwrite: bool = False,
        text_encoders: str = save.AUTO,
    ) -> io.NodeOutput:
        """Save."""
        workflow = (cls.hidden.extra_pnginfo or {}).get("workflow")
        path = save.save_model(model, clip, vae, filename_prefix, overwrite, text_encoders, workflow, cls.hidden.prompt)
        return io.NodeOutput(ui={"text": (f"saved {host.output_name_and_size(path)}",)})


NODES = [
    NFQuantizedUNetLoader,
    NFQuantizeUNet,
    NFSaveCheckpoint,
    NFQuantizedCheckpointLoader,
    NFQuantizeCLIP,
    NFSaveCLIP,
    NFQuantizedCLIPLoader,
    NFInspect,
    NFCompare,
    NFQualityReport,
    NFCalibrate,
    NFCollectCalibration,
    NFSaveCalibration,
]
