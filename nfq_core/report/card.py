"""A model card for quantised files, in Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..checkpoints.examine import container_info, expected_in_words, of_main_component, settings_in_words
from ..checkpoints.whole_checkpoint import missing_companions
from ..decibels import ratio_in_words
from ..errors import CorruptFileError, NFQError, command
from ..files.container import NFQFile
from ..files.untrusted import parse_json
from ..models.unet import UNKNOWN
from ..parallel import Progress, no_progress
from ..planning.settings import DEFAULT_PRESET, PRESETS
from ..sizes import size_in_words
from .markdown import as_code, as_text, markdown_table
from .measure import label, measure, short_names
from .write import JSON_NAME, LATENT_PSNR, MARKDOWN_NAME, MEANINGS, PLOT_TITLES, markdown

PLACEHOLDERS = {"base_model": "FILL-IN/BASE-MODEL", "license": "FILL-IN-LICENSE-OF-THE-BASE-MODEL"}
"""Placeholders for facts that only the author of the card knows."""

OPTIONS = {"base_model": "--base-model", "license": "--license"}

RECOMMENDED_BITS = PRESETS[DEFAULT_PRESET]
"""The recommended file is the one nearest to these packed bits per weight."""

MEASUREMENTS = ("sqnr_db", "pictures", "latents", "drift")
"""Keys of a file in a report that its header does not have."""


def card_facts(
    files: Sequence[str | os.PathLike],
    *,
    original: str | os.PathLike | None = None,
    report_folder: str | os.PathLike | None = None,
    recommended: str | os.PathLike | None = None,
    base_model: str = "",
    license: str = "",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Gather the facts for a card.

    Args:
        files: `.nfq.safetensors` files.
        original: the file that they were made from, to measure their errors.
        report_folder: folder of an `nfq report` about them, instead of `original`.
        recommended: one of `files`; by default the one nearest to RECOMMENDED_BITS.
        base_model: name of the base model on the Hugging Face Hub.
        license: its licence.
        progress: see `parallel.Progress`; called while errors are measured.

    Returns:
        `base_model` and `license`, `placeholders` (which of the two were not given), `recommended` (a name),
        `report_folder` (its name, or None), `plots` (names of the plots in it) and `files`: each as
        `examine.of_main_component` without `layers`, with `name`, `sha256`, `header_sha256`, `whole_checkpoint`, and
        `sqnr_db`, `pictures`, `latents` and `drift` if they were measured.

    Raises:
        NFQError: a file is missing, damaged or given twice, not made from the original, or not in the report.
    """
    names = short_names(files)
    facts = [_file_facts(path, name) for path, name in zip(files, names, strict=True)]
    report = None
    if original is not None:
        report = measure(original, files, progress=progress)
    elif report_folder is not None:
        report = _read_report(Path(report_folder))
    if report is not None:
        measured = {file["header_sha256"]: file for file in report["files"]}
        for path, one in zip(files, facts, strict=True):
            if one["header_sha256"] not in measured:
                raise NFQError(f"{path} is not in {report_folder}; run {command('report')} with it, or leave it out")
            measurements = measured[one["header_sha256"]]
            one.update({key: measurements[key] for key in MEASUREMENTS if key in measurements})
    given = {"base_model": base_model, "license": license}
    in_folder = report_folder is not None
    return {
        **{name: value or PLACEHOLDERS[name] for name, value in given.items()},
        "placeholders": [name for name, value in given.items() if not value],
        "recommended": _recommended(files, facts, recommended),
        "report_folder": Path(os.path.abspath(report_folder)).name if in_folder else None,
        "plots": [name for name in PLOT_TITLES if in_folder and (Path(report_folder) / f"{name}.png").is_file()],
        "files": facts,
    }


def _file_facts(path: str | os.PathLike, name: str) -> dict[str, Any]:
    with NFQFile(path) as file:
        facts = of_main_component(container_info(file))
        del facts["layers"]
        return {
            "name": name,
            "sha256": file.sha256(),
            "header_sha256": file.header_sha256,
            "whole_checkpoint": not missing_companions(file),
            **facts,
        }


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / JSON_NAME
    try:
        report = parse_json(path.read_text("utf-8"))
        # Everything that a card uses is tried here, where the error can name the file.
        markdown(report, ())
        {file["header_sha256"] for file in report["files"]}
    except OSError as error:
        raise NFQError(
            f"{path} cannot be read ({error.strerror}); {command(f'report --out {folder}')} writes it"
        ) from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        raise CorruptFileError(
            f"{path} is damaged; {command(f'report --out {folder} --force')} writes it again"
        ) from None
    return report


def _recommended(
    files: Sequence[str | os.PathLike], facts: Sequence[Mapping[str, Any]], chosen: str | os.PathLike | None
) -> str:
    if chosen is not None:
        paths = [os.path.abspath(path) for path in files]
        if os.path.abspath(chosen) not in paths:
            raise NFQError(f"{chosen} cannot be recommended: it is not one of the card's files")
        return facts[paths.index(os.path.abspath(chosen))]["name"]
    nearest = min(facts, key=lambda one: (abs(one["packed_bits_per_weight"] - RECOMMENDED_BITS), one["file_bytes"]))
    return nearest["name"]


def card(facts: Mapping[str, Any]) -> str:
    """The card for the result of `card_facts`, as Markdown for a repository's README.md."""
    files = facts["files"]
    models = sorted({one["architecture"] if one["architecture"] != UNKNOWN else "" for one in files if _is_unet(one)})
    known = ", ".join(filter(None, models))
    title = label(files[0]["name"]) if "base_model" in facts["placeholders"] else facts["base_model"].rpartition("/")[2]
    fields = {
        "base_model": facts["base_model"],
        "base_model_relation": "quantized",
        "license": facts["license"],
        "library_name": "comfyui-nfq",
        **({"pipeline_tag": "text-to-image"} if models else {}),
        "tags": ["nfq", "quantized", *(["comfyui", "stable-diffusion-xl"] if models else [])],
    }
    comments = {name: f"fill in, or give {OPTIONS[name]}" for name in facts["placeholders"]}
    parts = [
        front_matter(fields, comments),
        f"# {as_text(title)}, quantised",
        f"Weights of {as_text(facts['base_model'])}{f' ({known})' if known else ''} in the NF block format of "
        "ComfyUI-NFQ. Each file is self-contained: the original is not needed. Only weights are quantised, so "
        "samplers, CFG and LoRA work as before. The licence is the base model's.",
        "## Files",
        _files_table(facts),
        MEANINGS,
        *_quality(facts),
        "## How to use",
        *_how_to_use(facts),
        "## How it was made",
        "\n".join(_settings(one) for one in files),
        "## Checksums (SHA-256)",
        "```\n" + "\n".join(f"{one['sha256']}  {' '.join(one['name'].split())}" for one in files) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _is_unet(one: Mapping[str, Any]) -> bool:
    return one["layout"] != "plain"


def _files_table(facts: Mapping[str, Any]) -> str:
    columns = [
        ("SQNR, dB", "sqnr_db", ratio_in_words),
        ("PSNR, dB", "pictures", lambda figures: ratio_in_words(figures["psnr_db"])),
        ("SSIM", "pictures", lambda figures: f"{figures['ssim']:.4f}"),
        (LATENT_PSNR, "latents", lambda figures: ratio_in_words(figures["mean_psnr_db"], 1)),
        ("latent cosine", "drift", lambda figures: f"{figures['cosine']['mean']:.3f}"),
    ]
    known = [column for column in columns if any(column[1] in one for one in facts["files"])]
    rows = []
    for one in facts["files"]:
        kind = "checkpoint" if one["whole_checkpoint"] else "UNet" if _is_unet(one) else "weights"
        row = [as_code(one["name"]), kind, size_in_words(one["file_bytes"])]
        row += [f"{one['bits_per_weight']:.2f}", f"{one['packed_bits_per_weight']:.2f}"]
        row += [words(one[key]) if key in one else "–" for _, key, words in known]
        rows.append([*row, "**recommended**" if one["name"] == facts["recommended"] else ""])
    header = ["file", "holds", "size", "bits per weight", "packed bits", *(title for title, *_ in known), ""]
    return markdown_table(header, rows)


def _quality(facts: Mapping[str, Any]) -> list[str]:
    if facts["report_folder"] is None:
        return []
    folder = quote(facts["report_folder"])
    images = [f"![{PLOT_TITLES[name]}]({folder}/{name}.png)" for name in facts["plots"]]
    return ["## Quality", *images, f"Layer by layer: [{MARKDOWN_NAME}]({folder}/{MARKDOWN_NAME})."]


def _how_to_use(facts: Mapping[str, Any]) -> list[str]:
    files = facts["files"]
    chosen = facts["recommended"].rpartition("/")[2]
    steps = []
    if any(_is_unet(one) and not one["whole_checkpoint"] for one in files):
        steps.append(
            "**ComfyUI**, with the nodes of ComfyUI-NFQ: put a UNet into `models/diffusion_models`. In your workflow, "
            "replace *Load Diffusion Model* by *Load NFQ Diffusion Model*; CLIP and VAE loaders stay."
        )
    if any(one["whole_checkpoint"] for one in files):
        steps.append(
            "**ComfyUI**, with the nodes of ComfyUI-NFQ: put a checkpoint into `models/checkpoints`. In your workflow, "
            "replace *Load Checkpoint* by *Load NFQ Checkpoint*."
        )
    if any(map(_is_unet, files)):
        # JSON strings are valid Python strings.
        file, base = (json.dumps(words, ensure_ascii=False) for words in (chosen, facts["base_model"]))
        known = all(one["architecture"] != UNKNOWN for one in filter(_is_unet, files))
        folder, about_folder = (
            ("", "")
            if known
            else (', "unet"', "; `unet` is a folder with the `config.json` of the base model's UNet, and no weights")
        )
        steps += [
            f"**diffusers**, with `nfq_core` of ComfyUI-NFQ{about_folder}:",
            f"""```python
from diffusers import StableDiffusionXLPipeline
from nfq_core.diffusers import load_unet

unet = load_unet({file}{folder})
pipeline = StableDiffusionXLPipeline.from_pretrained({base}, unet=unet).to(unet.dtype)
```""",
            "**Automatic1111's web UI, Forge and Forge Neo**, with the same repository as an extension: put a "
            "checkpoint into `models/Stable-diffusion` and choose it in the list. A UNet alone works in the last two: "
            "choose its text encoders and VAE under *VAE / Text Encoder*.",
        ]
    else:
        steps.append("**Python**: `nfq_core.load` of ComfyUI-NFQ reads a file as a state dict of packed weights.")
    steps.append("**Other programs**: `nfq dequantize FILE DST` writes plain safetensors under the original's names.")
    return steps


def _settings(one: Mapping[str, Any]) -> str:
    settings = settings_in_words(one["settings"]) or "settings not recorded"
    source = one["source"]
    origin = as_code(source["name"]) if source["name"] else "an unrecorded model"
    origin += f" (SHA-256 `{source['sha256'][:16]}…`)" if source["sha256"] else ""
    expected = expected_in_words(one["expected"])
    told = f"; {expected}" if expected else ""
    return f"- {as_code(one['name'])} from {origin}, by {as_text(one['writer'])}: {as_text(settings)}{told}"


def front_matter(fields: Mapping[str, str | Sequence[str]], comments: Mapping[str, str]) -> str:
    """YAML front matter of texts and lists of texts, between two lines of dashes.

    Args:
        fields: values by name; names are plain words.
        comments: comments at the end of a field's line, by the field's name.
    """
    lines = ["---"]
    for name, value in fields.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        if isinstance(value, str):
            lines.append(f"{name}: {quoted(value)}{comment}")
        else:
            lines += [f"{name}:{comment}", *(f"  - {quoted(item)}" for item in value)]
    return "\n".join([*lines, "---"])


def quoted(text: str) -> str:
    """The text as a double-quoted YAML scalar: JSON, which YAML contains.

    Unprintable letters are escaped (YAML 1.2, section 5.7), and line separators too, which old readers fold.
    """
    letters = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08X}" for letter in letters)
