"""The prompts that a model is sampled with for its calibration: as varied as what people draw with SDXL models.

Photographs, drawings and paintings, tags as anime models take them, lettering, dark and bright pictures; with long
negative prompts, short ones and none. Neighbours differ, so that the first few are varied too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import NFQError

STEPS = 8
"""Denoising steps of each prompt."""

SIDE = 768
"""Width and height of the pictures that are sampled, in pixels."""


class Prompt(NamedTuple):
    """A prompt and its negative prompt."""

    positive: str
    negative: str = ""


_PHOTO = "blurry, overexposed, watermark, jpeg artifacts, deformed hands"
_TAGS = "lowres, bad anatomy, bad hands, extra digits, worst quality, low quality, signature, text, username"

PROMPTS: tuple[Prompt, ...] = (
    Prompt("portrait photograph of a woman with freckles at a window, soft daylight, 85mm, shallow focus", _PHOTO),
    Prompt("masterpiece, best quality, 1girl, silver hair, red eyes, school uniform, cherry blossoms, smile", _TAGS),
    Prompt("a narrow street in the rain at night, neon signs mirrored in puddles, people with umbrellas", "people"),
    Prompt("watercolour of a harbour with small sailing boats, loose brush strokes, white paper"),
    Prompt('a wooden shop sign that says "BREAD & CAKE" in carved letters', "misspelled, blurry"),
    Prompt("snowy mountain range under a clear blue sky, wide angle, very bright, hikers far away", _PHOTO),
    Prompt("1boy, black hair, hooded cloak, holding lantern, dark forest, fog, dramatic lighting, absurdres", _TAGS),
    Prompt("oil painting of a bowl with pears, a knife and a linen cloth, dark background, old master"),
    Prompt("close-up photograph of a jumping spider on a leaf, macro, dew drops", "cartoon, drawing"),
    Prompt("isometric illustration of a small library with plants and cats, pastel colours, clean lines"),
    Prompt("an astronaut sits in a diner and drinks coffee, film grain, 1970s photograph", _PHOTO),
    Prompt(
        "2girls, kimono, summer festival, fireworks, night sky, from behind, holding hands, detailed background", _TAGS
    ),
    Prompt("pencil sketch of an old man's hands that repair a clock"),
    Prompt("aerial photograph of rice terraces at sunrise, mist, saturated green"),
    Prompt("pixel art of a castle on a cliff, 16 colours", "photo, realistic, 3d"),
    Prompt("a tabby cat asleep on a stack of books, warm lamp light", ""),
    Prompt("comic book panel, a detective under a street lamp, heavy black ink, halftone dots", "colour"),
    Prompt("product photograph of a glass perfume bottle on white, studio lighting, soft shadow", _PHOTO),
    Prompt("no humans, scenery, ruins, overgrown, waterfall, sunlight, birds, wide shot, highres", _TAGS),
    Prompt("black and white photograph of a jazz trio on a small stage, smoke, high contrast", "colour, bright"),
    Prompt("a bowl of ramen with egg and spring onions seen from above, steam, wooden table", "low quality"),
    Prompt("3d render of a friendly robot gardener, soft plastic, global illumination", "flat, sketch"),
    Prompt("art nouveau poster of a woman with a crown of ivy, gold outlines, flat colours"),
    Prompt("almost black picture of a candle on a table, deep shadows, faint reflections", "bright, daylight"),
    Prompt(
        "1girl, solo, upper body, looking at viewer, short hair, blue eyes, simple background, white background", _TAGS
    ),
    Prompt("a crowded beach in midsummer, hundreds of coloured parasols, harsh sun, telephoto", _PHOTO),
    Prompt("fantasy concept art, a dragon rests on a ruined cathedral, storm, matte painting", "modern, cars"),
    Prompt('a chalkboard with the words "see you tomorrow" and a small drawing of the sun', "watermark"),
    Prompt("interior of a modern kitchen, marble, large windows, architectural photograph", "people, clutter"),
    Prompt("chibi, multiple boys, fighting stance, action lines, sparks, vivid colors, thick outlines", _TAGS),
    Prompt("nebula and stars, deep space, violet and teal, long exposure", ""),
    Prompt("an elderly couple dances in a garden, candid photograph, late afternoon light", "cgi, illustration"),
)


def prompts_to_sample(
    prompts: int | Sequence[Prompt] | None = None, steps: int = STEPS, side: int = SIDE
) -> Sequence[Prompt]:
    """Check how a model is to be sampled, before anything is loaded.

    Args:
        prompts: the first so many of the bundled prompts, or other prompts; by default all bundled ones.
        steps: denoising steps of each.
        side: width and height in pixels.

    Returns:
        The prompts.

    Raises:
        NFQError: one of these cannot be sampled.
    """
    if steps < 1:
        raise NFQError(f"steps must be at least 1, got {steps}")
    if side < 8 or side % 8:
        raise NFQError(f"side must be a multiple of 8 pixels, got {side}")
    if prompts is None:
        return PROMPTS
    if not isinstance(prompts, int):
        return prompts
    if not 1 <= prompts <= len(PROMPTS):
        raise NFQError(f"prompts must be from 1 to {len(PROMPTS)}, the number of bundled ones, got {prompts}")
    return PROMPTS[:prompts]
