"""The nodes that load, quantise and save text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.sd
from comfy_api.latest import io

from . import clip as clips
from . import host, load, save
from .recipe import missing_file, origin_in_graph
from .schema import DEFAULT_PREFIX, NOTHING, file_input, filename_prefix_input, overwrite_input, recipe_input, schema

BITS = ("8bit", "5bit")
"""How text encoders can be quantised."""

MAX_TEXT_ENCODERS = 4
"""The most text encoders that one CLIP has."""

DEFAULT_TYPE = "sdxl"


def _types() -> list[str]:
    """The types of the host's own loaders of text encoders."""
    return [DEFAULT_TYPE, *(kind.name.lower() for kind in comfy.sd.CLIPType)]


def _chosen(clip_name: str, others: Mapping[str, Any]) -> list[str]:
    """The chosen files; `others` are the values of the inputs for further ones."""
    further = (others.get(f"clip_name{number}") for number in range(2, MAX_TEXT_ENCODERS + 1))
    return [clip_name, *(name for name in further if name not in (None, NOTHING))]


class NFQuantizedCLIPLoader(io.ComfyNode):
    """`.nfq.safetensors` → CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        more = [
            io.Combo.Input(
                f"clip_name{number}",
                options=[NOTHING, *host.file_names(host.TEXT_ENCODERS)],
                default=NOTHING,
                optional=True,
                tooltip="The file of a further text encoder, if the type needs one.",
            )
            for number in range(2, MAX_TEXT_ENCODERS + 1)
        ]
        return schema(
            node_id="NFQuantizedCLIPLoader",
            search_aliases=["load quantized clip", "t5 loader", "dual clip loader", "text encoder", "gguf clip"],
            display_name="Load NFQ CLIP",
            description="Loads quantised text encoders and keeps them packed in memory. LoRA, clip skip and weighting "
            "work as usual.",
            inputs=[
                file_input("clip_name", host.TEXT_ENCODERS, "Save NFQ CLIP"),
                io.Combo.Input(
                    "type",
                    options=_types(),
                    default=DEFAULT_TYPE,
                    optional=True,
                    tooltip="The kind of diffusion model, as in Load CLIP and DualCLIPLoader.",
                ),
                *more,
                recipe_input(),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str, recipe: str = "") -> bool | str:
        """Explain how to recreate a missing file."""
        return missing_file(host.TEXT_ENCODERS, clip_name, recipe) or True

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, recipe: str = "", **others: Any) -> str:
        """Load the files again when one changes on disk."""
        return "|".join(host.fingerprint(host.TEXT_ENCODERS, name) for name in _chosen(clip_name, others))

    @classmethod
    def execute(cls, clip_name: str, type: str = DEFAULT_TYPE, recipe: str = "", **others: str) -> io.NodeOutput:
        """Load."""
        paths = [host.file_path(host.TEXT_ENCODERS, name) for name in _chosen(clip_name, others)]
        return io.NodeOutput(load.load_clip(paths, type))


class NFQuantizeCLIP(io.ComfyNode):
    """CLIP → packed CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFQuantizeCLIP",
            search_aliases=["quantise clip", "quantize text encoder", "shrink t5", "compress clip"],
            display_name="NFQ Quantize CLIP",
            description="Quantises a CLIP in this workflow. LoRAs and merges before this node are baked in; connect "
            "other LoRAs after it.",
            inputs=[
                io.Clip.Input("clip", tooltip="From any loader of fp16, bf16 or fp32 weights. It is not changed."),
                io.Combo.Input(
                    "bits",
                    options=list(BITS),
                    default="8bit",
                    optional=True,
                    tooltip="8bit: half the size of fp16, and close to it. 5bit: a third of fp16, and prompts are read "
                    "slightly differently. Token embeddings always have 8 bits.",
                ),
            ],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip: Any, bits: str = "8bit") -> io.NodeOutput:
        """Quantise."""
        origin = origin_in_graph(cls.hidden.prompt, cls.hidden.unique_id, "clip")
        return io.NodeOutput(clips.quantize_clip(clip, bits, origin))


class NFSaveCLIP(io.ComfyNode):
    """Packed CLIP → `.nfq.safetensors`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFSaveCLIP",
            search_aliases=["save quantized clip", "save text encoder", "export clip"],
            display_name="Save NFQ CLIP",
            description="Writes a quantised CLIP to the folder that Load NFQ CLIP lists: a file for each text encoder.",
            inputs=[
                io.Clip.Input("clip", tooltip="From NFQ Quantize CLIP or an NFQ loader, with no LoRA after it."),
                filename_prefix_input(
                    host.SUFFIX, "output/text_encoders; of several text encoders, each file gets its name added"
                ),
                overwrite_input(),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: Any, filename_prefix: str = DEFAULT_PREFIX, overwrite: bool = False) -> io.NodeOutput:
        """Save."""
        workflow = (cls.hidden.extra_pnginfo or {}).get("workflow")
        paths = save.save_clip(clip, filename_prefix, overwrite, workflow, cls.hidden.prompt)
        return io.NodeOutput(ui={"text": (f"saved {', '.join(map(host.output_name_and_size, paths))}",)})
