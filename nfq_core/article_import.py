"""Turning a file that the article's code wrote into a container, bit-equal to what the article's loader returns."""

from __future__ import annotations

import logging
import os
from math import prod
from pathlib import Path
from time import perf_counter

import torch

from .article import (
    ArticleTensor,
    article_codebook,
    article_dequantise,
    is_article_file,
    iter_article_tensors,
    quantised_shapes,
)
from .codec import encode
from .container import Facts, Source
from .convert import IN_FLIGHT_BYTES, Progress, conversion_result, no_progress, refuse_container, refuse_same
from .errors import CorruptFileError, UnsupportedFileError
from .formats import BLOCK, LEVELS, article_format
from .packing import pack_codes
from .parallel import ordered_map
from .safefile import SafetensorsFile, tensor_bytes
from .tensor import NFTensor
from .unet import detect
from .writer import ContainerWriter, Plan

log = logging.getLogger("nfq")


def import_article(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Convert an article file to `.nfq.safetensors`.

    A tensor whose codes the article's rounding bug has spoilt, or whose number of levels has no format id, is kept as
    the fp16 weights that the article's loader returns; the former with a warning naming it.

    Args:
        source: the article's file.
        target: the file to write.
        overwrite: whether an existing target may be replaced.
        progress: see `convert.Progress`.

    Returns:
        As `convert.quantize_file`.

    Raises:
        NFQError: the source is no sound article file, or the target cannot be written. Nothing is then left behind.
    """
    started = perf_counter()
    with SafetensorsFile(source) as file:
        refuse_container(file)
        refuse_same(source, target)
        if not is_article_file(file.entries):
            raise UnsupportedFileError(f"{file.path} was not written by the article's code; `nfq quantize` converts it")
        try:
            plans = _plans(file)
            info = detect({key: plan.shape for key, plan in plans.items()})
            facts = Facts(
                {"imported": "article"},
                info.layout if info else "plain",
                info.name if info else "unknown",
                Source(Path(source).name, file.file_bytes, "", file.metadata),
            )
            total, done = sum(plan.nbytes for plan in plans.values()), 0
            warnings = []
            with ContainerWriter(target, plans, facts, overwrite=overwrite) as writer:
                for key, result, warning in ordered_map(
                    lambda job: _converted(*job, plans),
                    iter_article_tensors(file.entries, file.tensor),
                    size=lambda job: plans[job[0]].nbytes,
                    max_in_flight=IN_FLIGHT_BYTES,
                ):
                    warnings += [warning] if warning else []
                    if isinstance(result, list):
                        writer.write_quantized(key, result)
                    else:
                        writer.write_kept(key, [tensor_bytes(result)])
                    done += plans[key].nbytes
                    progress(done, total, key)
                file_bytes = writer.finish()
        except (CorruptFileError, UnsupportedFileError) as error:
            prefix = "" if str(error).startswith(str(file.path)) else f"{file.path}: "
            raise type(error)(f"{prefix}{error}") from None
    for warning in warnings:
        log.warning("%s: %s", source, warning)
    return conversion_result(facts, plans, writer, file_bytes, warnings, started)


def article_to_nf(tensor: ArticleTensor) -> NFTensor:
    """The same weights in the container's article format, bit for bit.

    Raises:
        ValueError: there is no format of this number of levels.
    """
    fmt = article_format(tensor.levels)
    sections = fmt.sections(tensor.weights)
    blocks = -(-tensor.weights // BLOCK)
    codes = torch.zeros(blocks * BLOCK, dtype=torch.uint8)
    codes[: tensor.weights] = tensor.assignable_codes()
    coarse, fine = pack_codes(codes.view(-1, BLOCK), fmt)
    data = torch.zeros(sections.end, dtype=torch.uint8)
    data[: 2 * fmt.levels].view(torch.float16).copy_(article_codebook(fmt.levels))
    data[sections.coarse : sections.fine] = coarse
    data[sections.fine : sections.superblock_scales] = fine
    data[sections.superblock_scales : sections.block_scales].view(torch.float32).copy_(tensor.c2)
    data[sections.block_scales :] = tensor.c1[:blocks]
    return NFTensor(data, fmt, tensor.shape, torch.float16)


def _plans(file: SafetensorsFile) -> dict[str, Plan]:
    plans = {}
    for key, quantised in quantised_shapes(file.entries, file.tensor):
        if quantised is None:
            entry = file.entries[key]
            plans[key] = Plan(entry.dtype, entry.shape)
        else:
            shape, levels = quantised
            plans[key] = Plan("F16", shape, article_format(levels) if levels in LEVELS else None)
    return plans


def _converted(
    key: str, tensor: torch.Tensor | ArticleTensor, plans: dict[str, Plan]
) -> tuple[str, list[bytes] | torch.Tensor, str]:
    """A tensor's frames, or the tensor itself where it is kept, and a warning where there is something to warn of."""
    if not isinstance(tensor, ArticleTensor):
        return key, tensor, ""
    spoilt = tensor.corrupt_weights()
    if spoilt or plans[key].format is None:
        warning = f"tensor {key!r} has {spoilt:,} weights spoilt by the article's rounding bug; it is kept as fp16"
        return key, article_dequantise(tensor), warning if spoilt else ""
    packed = article_to_nf(tensor)
    return key, encode(packed.data, packed.format.sections(prod(tensor.shape))), ""
