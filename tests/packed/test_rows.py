"""Rows decoded or split off have the bits of the same rows of the whole matrix, and cost what they hold."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import pytest
import torch
from samples import bits, random_buffer, random_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from nfq_core import NFQError, NFTensor, quantize
from nfq_core.checkpoints.article_import import pack_article
from nfq_core.files.article import ArticleTensor
from nfq_core.packed import op
from nfq_core.packed import tensor as tensor_module
from nfq_core.packed.formats import WRITABLE_IDS, format_by_id
from nfq_core.packed.packing import pack_codes, unpack_codes
from nfq_core.packed.rows import dequantize_rows, split_rows

ROWS = 61
"""Not a multiple of any format's blocks per group, so that the last groups are partial."""

CHOSEN = [[0], [ROWS - 1], [5, 5, 0, ROWS - 1, 17], []]


@lru_cache
def matrix(columns: int, format_id: str, rows: int = ROWS) -> NFTensor:
    return quantize(random_weight(rows, columns, seed=columns), format=format_id)


@pytest.mark.parametrize("columns", [64, 192, 100])
@pytest.mark.parametrize("format_id", WRITABLE_IDS)
def test_the_bits_of_the_whole_matrix(format_id: str, columns: int) -> None:
    packed = matrix(columns, format_id)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        whole = packed.dequantize(dtype)
        for chosen in [*CHOSEN, list(range(ROWS))]:
            rows = torch.tensor(chosen, dtype=torch.int32)
            found = dequantize_rows(packed, rows, dtype)
            assert found.dtype == dtype and torch.equal(found, whole[rows.long()])


def test_levels_of_its_own_and_common_levels() -> None:
    """Ternary weights get levels that fit them, which the buffer stores; ordinary ones of this number do not."""
    ordinary = random_weight(ROWS, 192)
    for weight, has_levels in ((ordinary, False), (ordinary.sign() * (ordinary.abs() > 0.5) * 0.3, True)):
        packed = quantize(weight, format="nf256_b64")
        assert bool(packed.sections.coarse) is has_levels
        chosen = torch.tensor([0, ROWS - 1, 3])
        assert torch.equal(dequantize_rows(packed, chosen), packed.dequantize()[chosen])


def test_an_article_matrix_is_decoded_whole() -> None:
    """Its scales come in superblocks of 256 blocks."""
    blocks = 300
    codes = torch.arange(blocks * 64, dtype=torch.uint8) % 16
    scales = torch.arange(512).to(torch.uint8)
    article = ArticleTensor((blocks, 64), 16, scales, torch.tensor([1.0, 0.5]), codes)
    packed = pack_article(article)
    rows = torch.tensor([299, 0])
    assert torch.equal(dequantize_rows(packed, rows), packed.dequantize()[rows])


@pytest.mark.parametrize("format_id", ["nf32_b64", "nf256_b64"])
@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("bad", [[ROWS], [-1], [0, 1, ROWS], [2**40]])
def test_an_index_out_of_bounds_is_an_error_as_in_torch(format_id: str, columns: int, bad: list[int]) -> None:
    packed, rows = matrix(columns, format_id), torch.tensor(bad)
    with pytest.raises(IndexError, match="out of range"):
        torch.nn.functional.embedding(rows, packed.dequantize())
    with pytest.raises(IndexError, match="out of range"):
        dequantize_rows(packed, rows)


@pytest.mark.parametrize("format_id", ["nf256_b64", "nf32_b64", "nf24_b64", "nf12_b64"])
@pytest.mark.parametrize("columns", [768, 1280])
def test_only_the_groups_around_the_rows_are_decoded(
    format_id: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], tensor_module.dequantize_into

    def counting(out: torch.Tensor, *others: object) -> None:
        decoded.append(out.numel())
        decode(out, *others)

    packed, chosen = matrix(columns, format_id), torch.tensor([0, 7, ROWS - 1, 7])
    monkeypatch.setattr(tensor_module, "dequantize_into", counting)
    dequantize_rows(packed, chosen)
    group, per_row = format_by_id(format_id).blocks_per_group, columns // 64
    # A row begins at a multiple of gcd blocks in its group: it touches fewer than `group` blocks before and after it.
    most = per_row + 2 * (group - gcd(group, per_row))
    assert len(decoded) == 1 and len(chosen) * columns <= decoded[0] <= len(chosen) * most * 64


def test_many_rows_decode_the_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt costs no more than the whole table."""
    decoded, decode = [], tensor_module.dequantize_into

    def counting(out: torch.Tensor, *others: object) -> None:
        decoded.append(out.numel())
        decode(out, *others)

    packed = matrix(768, "nf32_b64")
    monkeypatch.setattr(tensor_module, "dequantize_into", counting)
    assert dequantize_rows(packed, torch.zeros(10 * ROWS, dtype=torch.int64)).shape == (10 * ROWS, 768)
    assert decoded == [ROWS * 768]


@pytest.mark.parametrize("own_levels", [True, False])
@pytest.mark.parametrize("format_id", WRITABLE_IDS)
@pytest.mark.parametrize("shape", [(3, 64), (15, 192), (21, 4, 4, 4), (192, 100)])
def test_a_weight_split_by_rows(format_id: str, shape: tuple[int, ...], own_levels: bool) -> None:
    """Parts begin anywhere in a group of blocks; only the codes and scales of random buffers are all different."""
    fmt = format_by_id(format_id)
    if not own_levels and not fmt.has_common_levels:
        pytest.skip("this format has no common levels")
    weights = torch.Size(shape).numel()
    packed = NFTensor(random_buffer(format_id, weights, own_levels=own_levels), fmt, shape, torch.bfloat16)
    for parts in (1, 3):
        split = split_rows(packed, parts)
        for part, wanted in zip(split, packed.dequantize().chunk(parts), strict=True):
            part.validate()
            assert (part.format, part.dtype) == (fmt, torch.bfloat16) and part.shape == wanted.shape
            assert bool(part.sections.coarse) is own_levels
            assert torch.equal(bits(part.dequantize()), bits(wanted))


def test_a_part_has_a_whole_buffer_of_its_own() -> None:
    """Digits of blocks past the end are 0 as in any packed buffer; the scales' parameters are the whole weight's."""
    packed = matrix(192, "nf24_b64", 15)
    part = split_rows(packed, 3)[0]
    planes = part.data[part.sections.coarse : part.sections.fine], part.data[part.sections.fine : part.sections.scales]
    codes = unpack_codes(*planes, 15, part.format)
    assert all(torch.equal(*pair) for pair in zip(pack_codes(codes, part.format), planes, strict=True))
    assert part.data.data_ptr() != packed.data.data_ptr() and part.data[-2:].equal(packed.data[-2:])


@pytest.mark.parametrize(("rows", "columns", "parts"), [(ROWS, 64, 3), (3, 100, 3), (6, 96, 2)])
def test_parts_that_are_not_whole_rows_and_blocks_are_refused(rows: int, columns: int, parts: int) -> None:
    with pytest.raises(NFQError, match=rf"shape \({rows}, {columns}\) cannot be split into {parts} parts"):
        split_rows(matrix(columns, "nf32_b64", rows), parts)


def test_an_article_matrix_is_not_split() -> None:
    packed = NFTensor(random_buffer("article16_b64", 192), format_by_id("article16_b64"), (3, 64), torch.float16)
    with pytest.raises(NFQError, match="dequantise it first"):
        split_rows(packed, 3)


@pytest.mark.parametrize("format_id", ["nf32_b64", "nf256_b64", "t5w9_b64"])
def test_the_operation_is_sound(format_id: str) -> None:
    packed, rows = matrix(192, format_id), torch.tensor([3, ROWS - 1])
    arguments = (packed.data, packed.format.id, list(packed.shape), rows, torch.float32)
    torch.library.opcheck(op.dequantize_rows, arguments)
    assert torch.equal(op.dequantize_rows(*arguments), packed.dequantize(torch.float32)[rows])


def test_the_operation_has_a_shape_before_it_runs() -> None:
    packed = matrix(192, "nf256_b64")
    with FakeTensorMode() as mode:
        data, rows = mode.from_tensor(packed.data), mode.from_tensor(torch.tensor([1, 2, 3]))
        found = op.dequantize_rows(data, packed.format.id, list(packed.shape), rows, torch.bfloat16)
    assert (found.shape, found.dtype) == ((3, 192), torch.bfloat16)
