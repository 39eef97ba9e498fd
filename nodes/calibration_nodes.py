"""The nodes that collect a calibration and save it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import calibration, host
from .schema import DEFAULT_PREFIX, filename_prefix_input, schema


class NFCollectCalibration(io.ComfyNode):
    """MODEL → MODEL that collects a calibration while it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFCollectCalibration",
            search_aliases=["calibrate", "importance matrix", "imatrix", "gptq", "hessian"],
            display_name="NFQ Collect Calibration",
            description="Records the inputs of each layer while the MODEL is sampled, to improve quantising. The "
            "data of several runs adds up.",
            inputs=[
                io.Model.Input("model", tooltip="The fp16, bf16 or fp32 model. It is not changed."),
                io.Boolean.Input(
                    "hessians",
                    default=True,
                    optional=True,
                    tooltip="Also record correlations between inputs, for error feedback. Most of the improvement "
                    "comes from this.",
                ),
                io.Boolean.Input(
                    "sensitivities",
                    default=True,
                    optional=True,
                    tooltip="Also measure how strongly noise in each layer disturbs the output, for presets. Sampling "
                    "takes five times as long.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, hessians: bool = True, sensitivities: bool = True) -> io.NodeOutput:
        """Attach a collector to the MODEL."""
        return io.NodeOutput(calibration.attach_collector(model, hessians, sensitivities))


class NFSaveCalibration(io.ComfyNode):
    """MODEL from NFCollectCalibration → `.calibration.safetensors`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFSaveCalibration",
            search_aliases=["save calibration", "save imatrix", "importance matrix file"],
            display_name="Save NFQ Calibration",
            description="Writes the data that the MODEL has collected so far. NFQ Quantize UNet and `nfq quantize` "
            "use the file.",
            inputs=[
                io.Model.Input("model", tooltip="From NFQ Collect Calibration."),
                io.Latent.Input("samples", tooltip="From the sampler, so that saving waits for sampling."),
                filename_prefix_input(host.CALIBRATION_SUFFIX, f"output/{host.CALIBRATIONS}"),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace an existing file of this name. A file that this MODEL wrote before is always "
                    "replaced because the new file contains its data.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, samples: Any, filename_prefix: str = DEFAULT_PREFIX, overwrite: bool = False
    ) -> io.NodeOutput:
        """Save."""
        path, summary = calibration.save_calibration(model, filename_prefix, overwrite)
        return io.NodeOutput(ui={"text": (f"saved {host.output_name_and_size(path)}, {summary}",)})
