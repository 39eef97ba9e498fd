"""The demo model: SDXL's UNet architecture at toy size, working on 32x32 RGB pixels, and its word-level text encoder.

One safetensors file holds both: the UNet under plain diffusers names, the text encoder under names with the prefix
`text.`. diffusers is imported only when a pipeline is built.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from ..errors import NFQError, missing_package
from .shapes import IMAGE_SIZE, MAX_WORDS, VOCABULARY, tokenise

TEXT_PREFIX = "text."
TEXT_WIDTH = 128
TIME_ID_WIDTH = 32

UNET_CONFIG: dict[str, Any] = {
    "sample_size": IMAGE_SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 4),
    "cross_attention_dim": TEXT_WIDTH,
    # diffusers takes the number of heads here, as in SDXL's own config: heads are 32 wide.
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * TIME_ID_WIDTH,
}

# Zero terminal SNR lets the model choose the overall colour; v-prediction stays defined there.
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}

STEPS = 20
GUIDANCE = 3.0
"""Steps and CFG scale for the demo, its calibration and reports."""


class WordEncoder(nn.Module):
    """Word and position embeddings, summed and normalised; replaces SDXL's two CLIP encoders.

    Args:
        words: number of words in the vocabulary.
        width: numbers per token.
    """

    def __init__(self, words: int = len(VOCABULARY), width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(MAX_WORDS, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed word ids [n, MAX_WORDS] as tokens [n, MAX_WORDS, width] and their mean [n, width]."""
        tokens = self.norm(self.words(ids) + self.positions.weight)
        return tokens, tokens.mean(dim=1)


class TinyPipeline(nn.Module):
    """The text encoder and the UNet; calling it predicts v, float [n, 3, size, size], for noisy pictures."""

    def __init__(self, unet: nn.Module, text: WordEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.text = text
        self.size = unet.config.sample_size
        """Height and width of pictures in pixels."""

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict v for pictures [n, 3, size, size] at timesteps [n] (0..999) under captions as ids [n, MAX_WORDS]."""
        tokens, pooled = self.text(ids)
        # SDXL's original height and width, crop top and left, target height and width.
        size_and_crop = (self.size, self.size, 0, 0, self.size, self.size)
        time_ids = torch.tensor(size_and_crop, dtype=pooled.dtype, device=pooled.device).expand(len(ids), -1)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(noisy, timesteps, tokens, added_cond_kwargs=conditions).sample


def import_diffusers() -> ModuleType:
    """Import diffusers, or raise an ImportError that says how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise missing_package("the demo model needs diffusers", "diffusers") from error
    return diffusers


def bundled_weights_path() -> Path:
    """Path of the fp16 weights in the package.

    Raises:
        NFQError: the package comes from the ComfyUI registry, which does not distribute them.
    """
    path = Path(__file__).parent / "weights" / "demo.safetensors"
    if not path.exists():
        raise NFQError(f"{path} is missing: the ComfyUI registry does not distribute it; use a clone of the repository")
    return path


def load_weights(path: str | Path | None = None) -> dict[str, torch.Tensor]:
    """Load the UNet's and the text encoder's weights from one file; None means the bundled file."""
    return load_file(bundled_weights_path() if path is None else path)


def split_weights(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split the file's weights into the UNet's state dict and the text encoder's, the latter without its prefix."""
    unet = {name: tensor for name, tensor in weights.items() if not name.startswith(TEXT_PREFIX)}
    text = {name.removeprefix(TEXT_PREFIX): weights[name] for name in weights.keys() - unet.keys()}
    return unet, text


def merge_weights(pipeline: TinyPipeline) -> dict[str, torch.Tensor]:
    """A pipeline's weights under the file's names; the inverse of `split_weights`."""
    text = {TEXT_PREFIX + name: tensor for name, tensor in pipeline.text.state_dict().items()}
    return {**pipeline.unet.state_dict(), **text}


def build_pipeline(
    weights: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] = UNET_CONFIG,
    words: int = len(VOCABULARY),
) -> TinyPipeline:
    """Build an fp32 pipeline on the CPU: the demo model's, or another of its kind.

    Args:
        weights: its weights, of any float dtype; None: random ones.
        config: arguments of diffusers' `UNet2DConditionModel`.
        words: number of words in the vocabulary.

    Raises:
        ImportError: diffusers is missing.
        RuntimeError: names or shapes of the weights do not match.
    """
    encoder = WordEncoder(words, config["cross_attention_dim"])
    pipeline = TinyPipeline(import_diffusers().UNet2DConditionModel(**config), encoder)
    if weights is not None:
        unet, text = split_weights(weights)
        pipeline.unet.load_state_dict(unet)
        pipeline.text.load_state_dict(text)
    return pipeline.eval()


def sample(
    pipeline: TinyPipeline,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> np.ndarray:
    """`sample_ids` for captions in words; ValueError on an unknown word."""
    return sample_ids(pipeline, torch.from_numpy(tokenise(captions)), seed=seed, steps=steps, guidance=guidance)


@torch.no_grad()
def sample_ids(
    pipeline: TinyPipeline,
    ids: torch.Tensor,
    *,
    seed: int | Sequence[int] = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> np.ndarray:
    """Draw captions with DPM++ 2M and classifier-free guidance, as uint8 pictures [n, size, size, 3].

    Picture i starts from the noise of seed + i, or of seed[i], so it does not depend on the size of the batch.
    Guidance 1 is the plain conditional model.

    Args:
        pipeline: the model.
        ids: the captions' words, int64 [n, MAX_WORDS].
        seed: see above.
        steps: number of steps.
        guidance: the CFG scale.
    """
    scheduler = import_diffusers().DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, **SCHEDULER_CONFIG
    )
    scheduler.set_timesteps(steps)
    seeds = range(seed, seed + len(ids)) if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(own) for own in seeds]
    shape = (3, pipeline.size, pipeline.size)
    pictures = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    # The caption of unguided sampling is all padding, which is word 0.
    both = torch.cat([ids, torch.zeros_like(ids)])
    for timestep in scheduler.timesteps:
        prediction = pipeline(torch.cat([pictures, pictures]), timestep.expand(len(both)), both)
        conditional, unconditional = prediction.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        pictures = scheduler.step(guided, timestep, pictures).prev_sample
    values = ((pictures + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    return (values * 255).round().to(torch.uint8).numpy()
