"""The nodes that inspect a model, compare pictures and measure files."""

from __future__ import annotations

import json
import secrets
from typing import Any

from comfy_api.latest import io, ui

from ..nfq_core import NFQError, NFQFile
from . import compare, host, quality, report
from .schema import NOTHING, schema

MAX_IMAGES = 8
"""The most images that NFCompare takes."""

MAX_FILES = 4
"""The most files that NFQualityReport takes."""


class NFInspect(io.ComfyNode):
    """Size, settings and layers of a MODEL or a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFInspect",
            search_aliases=["nfq info", "bits per weight", "model size", "quantisation error"],
            display_name="NFQ Inspect",
            description="Shows the bits per weight, the size, and each layer's format and error, of a MODEL or a file.",
            inputs=[
                io.Model.Input("model", optional=True, tooltip="A quantised MODEL."),
                io.Model.Input(
                    "original",
                    optional=True,
                    tooltip="The MODEL before it was quantised. Errors are measured against it.",
                ),
                io.Combo.Input(
                    "file_name",
                    options=[NOTHING, *host.names_with_folder(host.file_names)],
                    default=NOTHING,
                    optional=True,
                    tooltip="The file to inspect if no MODEL is connected. Only its header is read.",
                ),
            ],
            outputs=[io.String.Output("report", display_name="report"), io.String.Output("json", display_name="json")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str = NOTHING, **_: Any) -> str:
        """Read the file again when it changes on disk."""
        return host.fingerprint(*host.split_folder(file_name))

    @classmethod
    def execute(cls, model: Any = None, original: Any = None, file_name: str = NOTHING) -> io.NodeOutput:
        """Describe."""
        if model is not None:
            facts = report.model_facts(model, original)
        elif file_name != NOTHING:
            folder, name = host.split_folder(file_name)
            with NFQFile(host.file_path(folder, name)) as file:
                facts = report.file_facts(file, name)
        else:
            raise NFQError("connect a MODEL to NFQ Inspect, or choose a file")
        text = report.as_text(facts)
        return io.NodeOutput(text, json.dumps(facts), ui={"text": (text,), "nfq": (facts,)})


class NFCompare(io.ComfyNode):
    """Images or latents side by side, with PSNR and SSIM against the first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        kinds = [io.Image, io.Latent]
        others = [
            io.MultiType.Input(
                f"image_{number}",
                types=kinds,
                optional=number > 2,
                tooltip="An image or a latent of the same size, sampled with the same seed.",
            )
            for number in range(2, MAX_IMAGES + 1)
        ]
        return schema(
            node_id="NFCompare",
            search_aliases=["psnr", "ssim", "compare images", "side by side", "image difference", "xy plot"],
            display_name="NFQ Compare",
            description="Shows images or latents side by side, with PSNR and SSIM of each against the first.",
            inputs=[
                io.MultiType.Input(
                    "image_1",
                    types=kinds,
                    tooltip="The reference, such as the fp16 model's picture: an image or a latent.",
                ),
                *others,
                io.Vae.Input("vae", optional=True, tooltip="Decodes latents so that pictures are compared."),
                io.String.Input(
                    "labels",
                    default="fp16\n16 levels",
                    multiline=True,
                    optional=True,
                    tooltip="One label per line, in the order of the inputs.",
                ),
                io.Int.Input(
                    "side",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    optional=True,
                    tooltip="Longer side of each picture on the sheet, in pixels.",
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet"), io.String.Output("report", display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_1: Any, vae: Any = None, labels: str = "", side: int = 512, **others: Any) -> io.NodeOutput:
        """Compare."""
        numbered = (f"image_{number}" for number in range(2, MAX_IMAGES + 1))
        inputs = {"image_1": image_1} | {name: others[name] for name in numbered if others.get(name) is not None}
        compared = compare.compare(inputs, labels, vae)
        # A new name for each run, as for ComfyUI's previews: an open page must not get a new picture under an old name.
        prefix = f"nfq-compare-{secrets.token_hex(4)}"
        shown = [
            {
                "label": one.label,
                "psnr_db": one.psnr_db,
                "ssim": one.ssim,
                "pictures": ui.ImageSaveHelper.save_images(one.pictures, prefix, io.FolderType.temp, None, 1),
            }
            for one in compared
        ]
        text = compare.as_text(compared)
        return io.NodeOutput(compare.sheet(compared, side), text, ui={"text": (text,), "nfq_compare": shown})


class NFQualityReport(io.ComfyNode):
    """An original and files quantised from it → plots and tables of their errors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        files = host.names_with_folder(host.file_names)
        more = [
            io.Combo.Input(
                f"file_name_{number}",
                options=[NOTHING, *files],
                default=NOTHING,
                optional=True,
                tooltip="Another file made from the same original, for example at another size.",
            )
            for number in range(2, MAX_FILES + 1)
        ]
        return schema(
            node_id="NFQualityReport",
            search_aliases=["quality report", "quantisation error", "model card", "nfq report", "sqnr"],
            display_name="NFQ Quality Report",
            description="Measures the error of quantised files against the original, by layer, kind of layer and size.",
            inputs=[
                io.Combo.Input(
                    "original_name",
                    options=host.names_with_folder(host.original_names),
                    tooltip="The fp16, bf16 or fp32 file that was quantised. It is only read.",
                ),
                io.Combo.Input("file_name", options=files, tooltip=f"An {host.SUFFIX} file made from the original."),
                *more,
            ],
            outputs=[io.Image.Output("plots", display_name="plots"), io.String.Output("report", display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **names: Any) -> str:
        """Measure again when a file changes on disk."""
        return "|".join(host.fingerprint(*host.split_folder(name)) for name in names.values() if name != NOTHING)

    @classmethod
    def execute(cls, original_name: str, file_name: str, **more: str) -> io.NodeOutput:
        """Measure and draw."""
        numbered = (more.get(f"file_name_{number}", NOTHING) for number in range(2, MAX_FILES + 1))
        files = [host.file_path(*host.split_folder(name)) for name in (file_name, *numbered) if name != NOTHING]
        original = host.original_path(*host.split_folder(original_name))
        plots, text = quality.quality_report(original, files, host.NodeProgress())
        prefix = f"nfq-report-{secrets.token_hex(4)}"
        shown = ui.ImageSaveHelper.save_images(plots, prefix, io.FolderType.temp, None, 1)
        return io.NodeOutput(plots, text, ui={"images": shown, "text": (text,)})
