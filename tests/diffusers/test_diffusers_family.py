"""SDXL's family in diffusers, its structure made narrow: load in both key layouts, one step of sampling, save.

That the names and shapes of full-size models are recognised and renamed is shown in `test_unet`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers_models import packed_unet, reads_folders, write_config
from samples import random_weight

from nfq_core import save
from nfq_core.diffusers import load_unet
from nfq_core.layers import packed_layers
from nfq_core.models.unet_keys import (
    KOALA_1B,
    KOALA_700M,
    SDXL_BASE,
    SDXL_INPAINTING,
    SDXL_INSTRUCT_PIX2PIX,
    SDXL_REFINER,
    SEGMIND_VEGA,
    SSD_1B,
    UNetArchitecture,
)

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONTEXT = 64
POOLED = 32
TIME_ID = 8


def dpm(**settings: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**BETAS, **settings)


@dataclass(frozen=True)
class Member:
    """How a member of the family is sampled.

    Args:
        architecture: at full size.
        scheduler: makes what its repository comes with.
        guidance: scale of CFG; 1: none.
        steps: how many it is meant to be sampled in.
        time_ids: numbers that tell it of sizes and crops; the refiner's are fewer by one.
    """

    architecture: UNetArchitecture
    scheduler: Callable[[], Any] = dpm
    guidance: float = 5.0
    steps: int = 4
    time_ids: int = 6

    @property
    def narrow(self) -> UNetArchitecture:
        """The architecture with small widths; great depths are less, and still as different as they were."""
        widths = {320: 32, 384: 32, 640: 32, 768: 32, 1280: 64, 1536: 64}
        depths = {4: 2, 5: 3, 6: 3, 10: 3}

        def less(levels: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(depths.get(depth, depth) for depth in level) for level in levels)

        architecture = self.architecture
        return replace(
            architecture,
            channels=tuple(widths[width] for width in architecture.channels),
            down_depths=less(architecture.down_depths),
            middle_depth=depths.get(architecture.middle_depth, architecture.middle_depth),
            up_depths=less(architecture.up_depths),
            context_width=CONTEXT,
            added_width=POOLED + self.time_ids * TIME_ID,
        )


FAMILY = {
    "SDXL": Member(SDXL_BASE),
    "v-prediction": Member(
        SDXL_BASE, lambda: dpm(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ),
    "Turbo": Member(SDXL_BASE, lambda: EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"), 1.0, 1),
    "Lightning": Member(SDXL_BASE, lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"), 1.0),
    "LCM": Member(replace(SDXL_BASE, guidance_width=256), lambda: LCMScheduler(**BETAS), 1.0),
    "inpainting": Member(SDXL_INPAINTING),
    "instruct-pix2pix": Member(SDXL_INSTRUCT_PIX2PIX),
    "refiner": Member(SDXL_REFINER, time_ids=5),
    "SSD-1B": Member(SSD_1B),
    "SSD-1B LCM": Member(replace(SSD_1B, guidance_width=256), lambda: LCMScheduler(**BETAS), 1.0),
    "Vega": Member(SEGMIND_VEGA),
    "KOALA-700M": Member(KOALA_700M),
    "KOALA-1B": Member(KOALA_1B),
}


@torch.no_grad()
def step(unet: torch.nn.Module, member: Member) -> torch.Tensor:
    """Latents after the first step of sampling; torch multiplies in another order if weights require gradients."""
    unet.requires_grad_(False)
    scheduler, guided = member.scheduler(), member.guidance > 1
    scheduler.set_timesteps(member.steps)
    timestep, batch = scheduler.timesteps[0], 1 + guided
    latents = random_weight(1, 4, 8, 8) * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(latents, timestep).repeat(batch, 1, 1, 1)
    beside = unet.config.in_channels - 4
    if beside:
        seen = torch.cat([seen, random_weight(batch, beside, 8, 8, seed=1)], dim=1)
    width = unet.config.time_cond_proj_dim
    noise = unet(
        seen,
        timestep,
        random_weight(batch, 5, CONTEXT, seed=2),
        timestep_cond=random_weight(batch, width, seed=3) if width else None,
        added_cond_kwargs={
            "text_embeds": random_weight(batch, POOLED, seed=4),
            "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0][: member.time_ids]] * batch),
        },
    ).sample
    if guided:
        without, with_prompt = noise.chunk(2)
        noise = without + member.guidance * (with_prompt - without)
    options = {} if isinstance(scheduler, EulerDiscreteScheduler) else {"generator": torch.Generator().manual_seed(0)}
    return scheduler.step(noise, timestep, latents, **options).prev_sample


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[UNetArchitecture], dict[str, torch.nn.Module]]:
    """UNets of an architecture: from a file with each layout's keys, resident, and saved and read again."""

    @lru_cache
    def make(architecture: UNetArchitecture) -> dict[str, torch.nn.Module]:
        root = tmp_path_factory.mktemp("family")
        folder = write_config(root / "config", architecture)
        found = {}
        for layout in ("prefixed", "diffusers"):
            save(packed_unet(architecture, layout), root / layout)
            found[layout] = load_unet(root / layout, folder, dtype=torch.float32)
        found["resident"] = load_unet(root / "prefixed", folder, dtype=torch.float32, memory="resident")
        if not reads_folders.args[0]:
            found["prefixed"].save_pretrained(root / "saved")
            found["saved"] = type(found["resident"]).from_pretrained(root / "saved")
        return found

    return make


@pytest.mark.parametrize("member", FAMILY.values(), ids=FAMILY)
def test_load_sample_and_save(member: Member, unets) -> None:
    found = {kind: (unet, step(unet, member)) for kind, unet in unets(member.narrow).items()}
    _, latents = found.pop("resident")
    assert torch.isfinite(latents).all() and latents.std() > 0.1
    for unet, others in found.values():
        assert len(packed_layers(unet)) > 100 and torch.equal(others, latents)


def test_latent_consistency_as_a_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRAs are loaded by PEFT")
    member = replace(FAMILY["Vega"], scheduler=lambda: LCMScheduler(**BETAS), guidance=1.0)
    save(packed_unet(member.narrow, "ldm"), tmp_path / "vega.nfq.safetensors")
    folder = write_config(tmp_path / "config", member.narrow)
    latents = []
    for memory in ("packed", "resident"):
        unet = load_unet(tmp_path / "vega.nfq.safetensors", folder, dtype=torch.float32, memory=memory)
        plain = step(unet, member)
        torch.manual_seed(0)
        # The layers that the published LoRA changes.
        layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
        layers += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
        latents.append(step(unet, member))
        assert not torch.equal(latents[-1], plain)
    assert torch.equal(*latents)
