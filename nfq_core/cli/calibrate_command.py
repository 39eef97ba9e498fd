"""`nfq calibrate`, and `nfq quantize --calibrate`: sample a model with the bundled prompts."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from ..calibration.fingerprint import fingerprint
from ..calibration.prompts import PROMPTS, SIDE, STEPS, prompts_to_sample
from ..calibration.statistics import CALIBRATION_SUFFIX, Calibration
from ..checkpoints.memory import is_out_of_memory
from ..checkpoints.sources import refuse_unconvertible
from ..checkpoints.targets import PLAIN_SUFFIX, model_name, target_path
from ..errors import CorruptFileError, NFQError, UnsupportedFileError, command
from ..files.atomic import is_same_file, refuse_unwritable
from ..files.original import Original
from .outcomes import calibration_text
from .terminal import AddCommand, progress_bar, show

SAMPLING = ("prompts", "steps", "side", "guidance", "sensitivities", "v_prediction", "config")
"""How a model is sampled, by option."""


def add_calibrate_command(add: AddCommand) -> None:
    """Add `nfq calibrate`."""
    sub = add("calibrate", _calibrate, "sample an SDXL model and record the inputs of its layers")
    sub.add_argument(
        "source", metavar="SRC", help="a .safetensors checkpoint with text encoders, or a diffusers folder"
    )
    sub.add_argument(
        "target",
        metavar="DST",
        nargs="?",
        help=f"the {CALIBRATION_SUFFIX} file to write, or a folder (default: by SRC)",
    )
    _add_sampling_options(sub)
    sub.add_argument("--device", metavar="D", help="device to sample on (default: cuda if there is one, else cpu)")
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")


def add_calibrate_option(parser: argparse.ArgumentParser) -> None:
    """Add `--calibrate` and how to sample to `nfq quantize`."""
    group = parser.add_argument_group("calibrating first")
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="first sample SRC with bundled prompts to calibrate it, on cuda if there is one or on the device of "
        "--device; the calibration is kept next to DST and reused",
    )
    _add_sampling_options(group)


def _add_sampling_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help=f"how many of the {len(PROMPTS)} bundled prompts to calibrate with (default: all)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"denoising steps for each prompt of a calibration (default: {STEPS}; fewer for Turbo and Lightning)",
    )
    parser.add_argument(
        "--side", type=int, metavar="N", help=f"width and height of the sampled pictures in pixels (default: {SIDE})"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="CFG scale while sampling (default: 5, the pipeline's; give 1 for Turbo and Lightning)",
    )
    parser.add_argument(
        "--sensitivities",
        action="store_true",
        help="also measure how much each layer's error disturbs the output, which takes five times as long; always "
        "done for models without SDXL's layers",
    )
    parser.add_argument(
        "--v-prediction",
        action="store_true",
        help="sample the model as one that predicts v, where its file has no marker that says so",
    )
    parser.add_argument(
        "--config",
        metavar="DIR",
        help="diffusers folder with settings and tokenisers for a checkpoint; its weights are not read (default: "
        "diffusers fetches SDXL's)",
    )


def _calibrate(options: argparse.Namespace) -> int:
    started = perf_counter()
    name = f"{model_name(options.source)[0]}{CALIBRATION_SUFFIX}"
    target = target_path(options.target, options.source, name, PLAIN_SUFFIX)
    if target.exists() and is_same_file(target, options.source):
        raise NFQError(f"{target} is the source itself; name another target")
    refuse_unwritable(target, options.force)
    calibration = _sampled(options)
    result = {
        "target": str(target),
        "weights": len(calibration.inputs),
        "prompts": calibration.prompts,
        "steps": calibration.steps,
        "sensitivities": len(calibration.sensitivities),
        "file_bytes": calibration.save(target, overwrite=options.force),
        "seconds": round(perf_counter() - started, 1),
    }
    use = command(f"quantize {options.source} --calibration {target}")
    return show(options, result, f"{calibration_text(result, 'prompts')}\nnext: {use}")


def calibrate_first(options: argparse.Namespace) -> Calibration:
    """The calibration of the model that `nfq quantize` is to convert: from an earlier run, or sampled and kept.

    Raises:
        NFQError: a calibration file is given too, the target exists, a dry run would have to sample, or see
            `nfq_core.diffusers.calibrate`.
    """
    if options.calibration:
        raise NFQError("--calibrate makes a calibration, and --calibration reads one; give one of them")
    how = {name: getattr(options, name) for name in SAMPLING}
    prompts = prompts_to_sample(options.prompts, **_given(options, "steps", "side"))
    with Original(options.source) as model:
        refuse_unconvertible(model, options.target)
        made_by = fingerprint(model.entries, model.tensor, how, prompts)
    if not options.dry_run:
        refuse_unwritable(options.target, options.force)
    folder = Path(options.target).parent
    kept = folder / f"{model_name(options.source)[0]}-{made_by}{CALIBRATION_SUFFIX}"
    with suppress(CorruptFileError, UnsupportedFileError):
        if kept.exists():
            return Calibration.load(kept)
    if options.dry_run:
        raise NFQError(f"--dry-run samples nothing, and there is no {kept.name} yet; leave one of the options out")
    _sampled(options).save(kept, overwrite=True)
    return Calibration.load(kept)


def refuse_unused(options: argparse.Namespace) -> None:
    """Raise NFQError for options that say how to sample, without `--calibrate`."""
    given = [name for name in SAMPLING if getattr(options, name)]
    if given and not options.calibrate:
        raise NFQError(f"--{given[0].replace('_', '-')} says how to sample; add --calibrate, or leave it out")


def _sampled(options: argparse.Namespace) -> Calibration:
    from ..diffusers.calibrating import calibrate
    from ..diffusers.dense_pipeline import load_dense_pipeline, quiet

    how = _given(options, "prompts", "steps", "side")
    prompts_to_sample(**how)
    try:
        pipeline = load_dense_pipeline(
            options.source, options.device, options.config, v_prediction=options.v_prediction
        )
        with quiet(), progress_bar("sampling", options) as progress:
            return calibrate(
                pipeline,
                **how,
                guidance=options.guidance,
                sensitivities=options.sensitivities or None,
                progress=progress,
            )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    raise NFQError("out of memory while sampling; choose a smaller --side, or --device cpu")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given, as keyword arguments."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
