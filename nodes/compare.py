"""Comparing pictures with a reference: PSNR and SSIM of each, and one labelled sheet of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import torch

from ..nfq_core import NFQError
from ..nfq_core.decibels import EQUAL
from ..nfq_core.report.metrics import psnr_db, ssim
from ..nfq_core.report.sheet import comparison_sheet


@dataclass(frozen=True)
class ComparedInput:
    """One compared input."""

    label: str
    pictures: torch.Tensor
    """Shape (count, height, width, 3), 0 … 1."""
    psnr_db: float | None
    """Against the reference; None for the reference itself and for equal pictures."""
    ssim: float | None
    """Against the reference; None for the reference."""

    @property
    def scores(self) -> str:
        """PSNR and SSIM as text; empty for the reference."""
        if self.ssim is None:
            return ""
        return f"{EQUAL if self.psnr_db is None else f'PSNR {self.psnr_db:.2f} dB'}, SSIM {self.ssim:.4f}"


def compare(inputs: Mapping[str, Any], labels: str, vae: Any = None) -> list[ComparedInput]:
    """Measure images or latents against the first of them.

    Args:
        inputs: IMAGEs or LATENTs by the name of their input, the reference first.
        labels: one per line, in the same order; an input without a label gets its own name.
        vae: decodes latents, which are then compared as pictures. Without it latents are compared directly, with the
            range of the reference as peak of PSNR and SSIM, and shown like the host's own previews.

    Raises:
        NFQError: images are mixed with latents, sizes differ, a value is not finite, or a latent cannot be shown.
    """
    latents = [isinstance(value, Mapping) for value in inputs.values()]
    if any(latents) != all(latents):
        raise NFQError("images and latents cannot be compared with each other: decode the latents first")
    signals = {name: _signal(value, vae) for name, value in inputs.items()}
    first, *_ = signals
    reference = signals[first]
    for name, signal in signals.items():
        if not signal.isfinite().all():
            raise NFQError(
                f"{name} contains NaN or infinity; sample again, and start ComfyUI with --fp32-vae if the VAE causes it"
            )
        if signal.shape != reference.shape:
            raise NFQError(
                f"{name} has shape {tuple(signal.shape)}, {first} has {tuple(reference.shape)}; sample both at the "
                "same size and batch size"
            )
    as_pictures = vae is not None or not latents[0]
    # A constant reference has no range.
    peak = 1.0 if as_pictures else float(reference.max() - reference.min()) or 1.0
    given = [line.strip() for line in labels.splitlines()]
    names = [label or name for label, name in zip([*given, *[""] * len(signals)], signals, strict=False)]
    result = []
    for label, (name, signal) in zip(names, signals.items(), strict=True):
        psnr = similarity = None
        if name != first:
            psnr, similarity = psnr_db(reference, signal, peak), ssim(reference, signal, peak)
        pictures = signal if as_pictures else _preview(signal)
        result.append(ComparedInput(label, pictures.movedim(1, -1).clamp(0, 1), psnr, similarity))
    return result


def _signal(value: Any, vae: Any) -> torch.Tensor:
    """An image, or a latent, as (count, channels, height, width) in fp32 on the CPU."""
    if isinstance(value, Mapping):
        samples = value["samples"]
        if samples.ndim != 4:
            raise NFQError(
                f"a latent of shape {tuple(samples.shape)} does not belong to pictures; connect images instead"
            )
        if vae is None:
            return samples.float().cpu()
        value = vae.decode(samples)
        value = value.reshape(-1, *value.shape[-3:])
    return value[..., :3].movedim(-1, 1).float().cpu()


def _preview(latent: torch.Tensor) -> torch.Tensor:
    """SDXL's latents as rough pictures, by the linear map that the host uses for previews."""
    kind = comfy.latent_formats.SDXL()
    factors = torch.tensor(kind.latent_rgb_factors)
    if latent.shape[1] != len(factors):
        raise NFQError(f"latents of {latent.shape[1]} channels cannot be shown without their VAE; connect it to vae")
    mapped = torch.einsum("nchw,cr->nrhw", latent, factors)
    # The map expects latents scaled as for the UNet, and returns -1 … 1.
    return (mapped * kind.scale_factor + torch.tensor(kind.latent_rgb_factors_bias).view(1, 3, 1, 1) + 1) / 2


def sheet(compared: Sequence[ComparedInput], side: int) -> torch.Tensor:
    """All pictures on one sheet, shape (1, height, width, 3), 0 … 1; `side` is each picture's longer side in pixels."""
    columns = [(f"{one.label}|{one.scores}", (one.pictures * 255).round().to(torch.uint8).numpy()) for one in compared]
    drawn = comparison_sheet((), columns, side=side)
    pixels = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, drawn.height, drawn.width, 3).float() / 255


def as_text(compared: Sequence[ComparedInput]) -> str:
    """Label and scores, one line per input."""
    return "\n".join(f"{one.label}: {one.scores or 'reference'}" for one in compared)
