"""The nodes that make a calibration: all at once, or collected from the user's own sampling and saved."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..nfq_core.calibration.prompts import PROMPTS, SIDE, STEPS
from . import calibration, host
from .schema import DEFAULT_PREFIX, advanced, filename_prefix_input, schema

CFG = 5.0
"""As SDXL's pipelines use it."""


class NFCalibrate(io.ComfyNode):
    """MODEL and CLIP → name of a calibration, for NFQuantizeUNet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="NFCalibrate",
            search_aliases=["calibrate", "importance matrix", "imatrix", "gptq", "hessian"],
            display_name="NFQ Calibrate",
            description="Samples the MODEL with bundled prompts and records the inputs of its layers. Connect the "
            "output to calibration of NFQ Quantize Model. The result is kept: a second run takes no time.",
            inputs=[
                io.Model.Input("model", tooltip="The fp16, bf16 or fp32 model that will be quantised, with its LoRAs."),
                io.Clip.Input("clip", tooltip="Encodes the prompts."),
                io.Int.Input(
                    "steps",
                    default=STEPS,
                    min=1,
                    max=50,
                    optional=True,
                    tooltip="Steps of each prompt. Turbo and Lightning: their own number, such as 4.",
                ),
                io.Float.Input(
                    "cfg",
                    default=CFG,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    optional=True,
                    tooltip="CFG scale. Turbo and Lightning: 1.",
                ),
                advanced(
                    io.Int,
                    "prompts",
                    default=len(PROMPTS),
                    min=1,
                    max=len(PROMPTS),
                    tooltip="How many of the bundled prompts to sample.",
                ),
                advanced(
                    io.Int,
                    "side",
                    default=SIDE,
                    min=256,
                    max=1536,
                    step=64,
                    tooltip="Width and height of the pictures that are sampled. They are not decoded or kept.",
                ),
                advanced(
                    io.Boolean,
                    "sensitivities",
                    default=False,
                    tooltip="Also measure how strongly noise in each layer disturbs the output, in five times the "
                    "time. Off, SDXL's published ones are used; other architectures are always measured.",
                ),
                filename_prefix_input(host.CALIBRATION_SUFFIX, f"output/{host.CALIBRATIONS}"),
            ],
            outputs=[io.Combo.Output(display_name="calibration")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        steps: int = STEPS,
        cfg: float = CFG,
        prompts: int = len(PROMPTS),
        side: int = SIDE,
        sensitivities: bool = False,
        filename_prefix: str = DEFAULT_PREFIX,
    ) -> io.NodeOutput:
        """Calibrate."""
        name, kept = calibration.calibrate_model(
            model,
            clip,
            filename_prefix,
            prompts=prompts,
            steps=steps,
            cfg=cfg,
            side=side,
            sensitivities=sensitivities,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(name, ui={"text": (f"found {name} again" if kept else f"saved {name}",)})


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
                    tooltip="Also record correlations between inputs, for error feedback: other weights of a row "
                    "compensate for a weight's rounding error.",
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
            description="Writes the data that the MODEL has collected so far. NFQ Quantize Model and `nfq quantize` "
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
