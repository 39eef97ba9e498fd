"""Convert files written by the article's code to containers, bit-equal to what the article's loader returns."""

from __future__ import annotations

import os
from time import perf_counter

import torch

from ..errors import CorruptFileError, UnsupportedFileError, command
from ..files.article import (
    ArticleTensor,
    article_codebook,
    article_dequantize,
    is_article_file,
    quantized_shapes,
    read_article_tensor,
)
from ..files.container import IMPORTED, Source, source_name
from ..files.safetensors_io import Entry, SafetensorsFile, tensor_bytes
from ..files.writer import ContainerWriter, Plan
from ..models.unet import detect
from ..packed.codec import encode
from ..packed.formats import LEVELS, article_format
from ..packed.layout import BLOCK
from ..packed.packing import pack_codes
from ..packed.tensor import NFTensor
from ..parallel import Progress, no_progress, ordered_map
from ..planning.facts import facts_about
from .convert import conversion_result
from .metadata import split_metadata
from .sources import refuse_container, refuse_same
from .targets import refuse_name


def import_article(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Convert an article file to `.nfq.safetensors`.

    Some tensors are kept as the fp16 weights that the article's loader returns: those whose number of levels has no
    format id, and, with a warning, those with codes damaged by the article's rounding bug.

    Args:
        source: the article's file.
        target: the file to write.
        overwrite: whether an existing target may be replaced.
        progress: see `parallel.Progress`.

    Returns:
        The same keys as `convert.quantize_file`.

    Raises:
        NFQError: the source is not a valid article file, or the target cannot be written. No partial file is left.
    """
    started = perf_counter()
    with SafetensorsFile(source) as file:
        refuse_container(file)
        refuse_same([file], target)
        refuse_name(target)
        if not is_article_file(file.entries):
            raise UnsupportedFileError(
                f"{file.path} was not written by the article's code; {command('quantize')} converts it"
            )
        try:
            quantized = dict(quantized_shapes(file.entries, file.tensor))
            plans = {key: _plan(file.entries[key], shape_and_levels) for key, shape_and_levels in quantized.items()}
            info = detect({key: plan.shape for key, plan in plans.items()})
            metadata, extra, warnings = split_metadata(file.metadata)
            recorded = Source(source_name(source), file.file_bytes, "", metadata)
            facts = facts_about(info, plans, {IMPORTED: "article"}, recorded)

            def work(key: str) -> tuple[str, list[bytes] | torch.Tensor, str]:
                if quantized[key] is None:
                    return key, file.tensor(key), ""
                return key, *_convert(read_article_tensor(file.tensor, key), plans[key])

            total, done = sum(plan.nbytes for plan in plans.values()), 0
            with ContainerWriter(target, plans, facts, extra=extra, overwrite=overwrite) as writer:
                for key, result, reason in ordered_map(work, plans, size=lambda key: plans[key].nbytes):
                    warnings += [f"tensor {key!r} {reason}; it is kept as fp16"] if reason else []
                    if isinstance(result, list):
                        writer.write_quantized(key, result)
                    else:
                        writer.write_kept(key, [tensor_bytes(result)])
                    done += plans[key].nbytes
                    progress(done, total, key)
                file.refuse_changed()
                file_bytes = writer.finish()
        except (CorruptFileError, UnsupportedFileError) as error:
            prefix = "" if str(error).startswith(str(file.path)) else f"{file.path}: "
            raise type(error)(f"{prefix}{error}") from None
    return conversion_result(source, facts, plans, writer, file_bytes, warnings, started)


def pack_article(tensor: ArticleTensor) -> NFTensor:
    """Pack an article tensor in the container's article format; it dequantises to the same bits.

    Raises:
        ValueError: no format has this number of levels.
    """
    fmt = article_format(tensor.levels)
    sections = fmt.sections(tensor.weights)
    blocks = -(-tensor.weights // BLOCK)
    codes = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device="cpu")
    codes[: tensor.weights] = tensor.assignable_codes()
    coarse, fine = pack_codes(codes.view(-1, BLOCK), fmt)
    data = torch.zeros(sections.end, dtype=torch.uint8, device="cpu")
    data[: 2 * fmt.levels].view(torch.float16).copy_(article_codebook(fmt.levels))
    data[sections.coarse : sections.fine] = coarse
    data[sections.fine : sections.scales] = fine
    maxima, scales = fmt.split_scales(data, tensor.weights)
    maxima.copy_(tensor.c2)
    scales.copy_(tensor.c1[:blocks])
    return NFTensor(data, fmt, tensor.shape, torch.float16)


def _plan(entry: Entry, shape_and_levels: tuple[tuple[int, ...], int] | None) -> Plan:
    """The plan for a tensor; its shape and number of levels are None if it is not quantised."""
    if shape_and_levels is None:
        return Plan(entry.dtype, entry.shape)
    shape, levels = shape_and_levels
    return Plan("F16", shape, article_format(levels) if levels in LEVELS else None)


def _convert(tensor: ArticleTensor, plan: Plan) -> tuple[list[bytes] | torch.Tensor, str]:
    """The encoded frames of a tensor, or its weights if it is kept, and why it is damaged (empty if it is not)."""
    if not torch.isfinite(tensor.c2).all():
        return article_dequantize(tensor), "holds NaN or Inf"
    spoilt = tensor.corrupt_weights()
    if spoilt:
        return article_dequantize(tensor), f"has {spoilt:,} weights spoilt by the article's rounding bug"
    if plan.format is None:
        return article_dequantize(tensor), ""
    packed = pack_article(tensor)
    return encode(packed.data, packed.sections), ""
