"""The nodes that make a calibration: each reads its inputs, calls what does the work, and returns."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import collecting, host
from .schema import schema


class NFCollectCalibration(io.ComfyNode):
    """MODEL → MODEL that collects while it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFCollectCalibration",
            search_aliases=["calibrate", "importance matrix", "imatrix", "gptq", "hessian"],
            display_name="NFQ Collect Calibration",
            description="Collects what each layer is fed while the MODEL is sampled, for better quantising. What "
            "several runs see adds up.",
            inputs=[
                io.Model.Input("model", tooltip="The fp16, bf16 or fp32 model. It stays as it is."),
                io.Boolean.Input(
                    "hessians",
                    default=True,
                    optional=True,
                    tooltip="Also collect how inputs are correlated, for error feedback: the larger part of the gain.",
                ),
                io.Boolean.Input(
                    "sensitivities",
                    default=True,
                    optional=True,
                    tooltip="Also measure how much noise in each layer disturbs the output, for presets. Sampling "
                    "takes five times as long.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, hessians: bool = True, sensitivities: bool = True) -> io.NodeOutput:
        """Make the MODEL; it collects when it is sampled."""
        return io.NodeOutput(collecting.collecting(model, hessians, sensitivities))


class NFSaveCalibration(io.ComfyNode):
    """What a MODEL collected → `.calibration.safetensors`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFSaveCalibration",
            search_aliases=["save calibration", "save imatrix", "importance matrix file"],
            display_name="Save NFQ Calibration",
            description="Writes what the MODEL collected so far. NFQ Quantize UNet and `nfq quantize` use the file.",
            inputs=[
                io.Model.Input("model", tooltip="From NFQ Collect Calibration."),
                io.Latent.Input("samples", tooltip="From the sampler, so that it is saved after sampling."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI-NFQ",
                    optional=True,
                    tooltip="Name of the file, .calibration.safetensors is added. It goes into the output folder, "
                    "below nfq_calibrations.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Whether another's file of this name may be replaced. What the same MODEL collected before "
                    "always is, for the new file has it too.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, samples: Any, filename_prefix: str = "ComfyUI-NFQ", overwrite: bool = False
    ) -> io.NodeOutput:
        """Save."""
        path, told = collecting.save_calibration(model, filename_prefix, overwrite)
        return io.NodeOutput(ui={"text": (f"saved {host.output_name(path)}, {told}",)})
