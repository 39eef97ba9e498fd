"""The models of `benchmarks.article`: the bundled demo model, or SDXL in a folder of diffusers' layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from nfq_core import NFQError, NFTensor
from nfq_core.demo.model import GUIDANCE as DEMO_GUIDANCE
from nfq_core.demo.model import STEPS as DEMO_STEPS
from nfq_core.demo.model import TinyPipeline, build_pipeline, import_diffusers, load_weights, sample, split_weights
from nfq_core.demo.shapes import CAPTIONS
from nfq_core.layers import assign_state

# The article's seed, for each of its prompts, and the prompts to the letter.
SEED = 42
PROMPTS = (
    'An ice sculpture is made with the text "Happy Holidays". Christmas decorations in the bacground. Dslr photo.',
    "An origami of a monkey dressed as a monk riding a bike on a mountain.",
    'A storefront with "Text to Image" written on it.',
    "Greek statue of a man tripping over a cat.",
    "A portrait photo of a kangaroo wearing an orange hoodie and blue sunglasses standing on the grass in front of the "
    "Sydney Opera House holding a sign on the chest that says Welcome Friends!",
    "A map of the United States made out of sushi. It is on a table next to a glass of red wine.",
    "an armchair in the shape of an avocado",
    "A teddybear on a skateboard in Times Square.",
)
STEPS, GUIDANCE = 25, 5.0  # For SDXL; the guidance is the default of diffusers' pipeline, as in the article
# Where a folder's UNet may be; the first is the article's.
WEIGHT_FILES = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors")
DEMO_NOTE = "The demo model cannot read the article's prompts: captions that it can read stand in for them."


@dataclass(frozen=True)
class Model:
    """A pipeline whose UNet can be exchanged."""

    name: str
    captions: tuple[str, ...]  # The texts to draw, one for each of PROMPTS
    note: str  # A remark for the reader; may be empty
    steps: int
    guidance: float
    unet: nn.Module  # The original, in the device's dtype for computing
    weights: Callable[[], dict[str, torch.Tensor]]  # Reads the UNet's state dict
    # Draws all captions with a UNet, each from SEED on the CPU: uint8 of shape (captions, height, width, 3).
    draw: Callable[[nn.Module], np.ndarray]

    @property
    def device(self) -> torch.device:
        """The UNet's device."""
        return next(self.unet.parameters()).device

    def with_weights(self, state: Mapping[str, NFTensor | torch.Tensor]) -> nn.Module:
        """A UNet of the same configuration with a file's tensors; packed weights get packed layers."""
        with torch.device("meta"):
            unet = type(self.unet).from_config(self.unet.config)
        dtype = next(self.unet.parameters()).dtype
        dense = {name: value.to(dtype) for name, value in state.items() if not isinstance(value, NFTensor)}
        assign_state(unet, {**state, **dense})
        return unet.to(self.device).eval().requires_grad_(False)


def demo_model(steps: int | None = None) -> Model:
    """The bundled model, in fp32 on the CPU; all captions in one batch."""
    pipeline, steps = build_pipeline(load_weights()).requires_grad_(False), steps or DEMO_STEPS

    def draw(unet: nn.Module) -> np.ndarray:
        seeds = [SEED] * len(CAPTIONS)
        return sample(TinyPipeline(unet, pipeline.text), CAPTIONS, seed=seeds, steps=steps, guidance=DEMO_GUIDANCE)

    def weights() -> dict[str, torch.Tensor]:
        return split_weights(load_weights())[0]

    name = "the bundled demo model"
    return Model(name, CAPTIONS, DEMO_NOTE, steps, DEMO_GUIDANCE, pipeline.unet, weights, draw)


def folder_model(folder: str | Path, *, steps: int | None = None) -> Model:
    """SDXL, or a relative of it, in a folder of diffusers' layout; one prompt at a time, as in the article.

    It computes in fp16 on CUDA if there is such a device, else in fp32 on the CPU. NFQError if the folder has
    no UNet in one safetensors file, or if diffusers cannot load the pipeline.
    """
    diffusers, folder = import_diffusers(), Path(folder)
    path = next((folder / "unet" / name for name in WEIGHT_FILES if (folder / "unet" / name).is_file()), None)
    if path is None:
        raise NFQError(f"{folder} holds no unet/{' or unet/'.join(WEIGHT_FILES)}; name a folder of diffusers' layout")
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    variant = "fp16" if ".fp16." in path.name else None
    try:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise NFQError(f"diffusers makes no SDXL pipeline of {folder}: {str(error).splitlines()[0]}") from error
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    # Some versions load a part in the dtype of its file.
    pipeline.to(device, dtype).set_progress_bar_config(disable=True)
    steps = steps or STEPS

    def draw(unet: nn.Module) -> np.ndarray:
        pipeline.unet = unet
        settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "np"}
        seeds = (torch.Generator("cpu").manual_seed(SEED) for _ in PROMPTS)
        pictures = [pipeline(p, generator=seed, **settings).images[0] for p, seed in zip(PROMPTS, seeds, strict=True)]
        return (np.stack(pictures) * 255).round().astype(np.uint8)

    return Model(folder.resolve().name, PROMPTS, "", steps, GUIDANCE, pipeline.unet, lambda: load_file(path), draw)
