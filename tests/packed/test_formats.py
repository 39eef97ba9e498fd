"""Geometry of the block formats and the table of scales."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import COMMON_IDS, FORMAT_IDS, GEOMETRY, TRELLIS_GEOMETRY, parse_trellis, scale
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nfq_core.errors import UnsupportedFileError
from nfq_core.packed.formats import FORMATS, LEVELS, TRELLIS_IDS, WRITABLE_IDS, article_format, format_by_id, nf_format
from nfq_core.packed.layout import OWN_LEVELS_FROM
from nfq_core.packed.scales import SCALE_MANTISSAS, SCALE_STRIDES, cached_tensor, scale_table

WHOLE = 64 * 256 * 24
"""Weights that fill every group and superblock."""


def test_these_formats_exist_and_no_others():
    assert list(FORMATS) == FORMAT_IDS
    assert [FORMATS[f"nf{n}_b64"] for n in LEVELS] == [nf_format(n) for n in LEVELS]
    assert [FORMATS[f"article{n}_b64"] for n in LEVELS] == [article_format(n) for n in LEVELS]
    assert [id for id in FORMATS if not id.startswith("article")] == list(WRITABLE_IDS)
    assert [id for id in FORMATS if id.startswith("t")] == list(TRELLIS_IDS)


def test_eight_bits_are_a_byte_for_each_code():
    fmt = format_by_id("nf256_b64")
    assert (fmt.levels, fmt.codes, fmt.window) == (256, 256, 0)
    assert (fmt.coarse_radix, fmt.coarse_digits, fmt.fine_bits) == GEOMETRY[256]
    assert fmt.packed_bytes(WHOLE) == 2 * 256 + WHOLE + WHOLE / 64 + 2


@pytest.mark.parametrize(("levels", "code_bits"), [(32, 5), (24, 14 / 3), (16, 4), (12, 11 / 3), (7, 3)])
def test_packed_bits_per_weight(levels, code_bits):
    head = -(-2 * levels // 32) * 32
    assert nf_format(levels).packed_bytes(WHOLE) == head + WHOLE * code_bits / 8 + WHOLE / 64 + 2
    expected = head + WHOLE * code_bits / 8 + WHOLE / 64 + 4 * WHOLE / (64 * 256)
    assert article_format(levels).packed_bytes(WHOLE) == expected


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_a_trellis_takes_the_bits_of_its_codes(format_id):
    bits, window = parse_trellis(format_id)
    fmt = format_by_id(format_id)
    assert (fmt.code_bits, fmt.codes, fmt.window, fmt.levels) == (bits, 2**bits, window, 2**window)
    assert (fmt.coarse_radix, fmt.coarse_digits, fmt.fine_bits) == TRELLIS_GEOMETRY[bits]
    assert fmt.packed_bytes(WHOLE) == 2 * 2**window + WHOLE * bits / 8 + WHOLE / 64 + 2


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_fits_the_planes(levels):
    radix, per_byte, fine_bits = GEOMETRY[levels]
    fmt = nf_format(levels)
    assert (fmt.coarse_radix, fmt.coarse_digits, fmt.fine_bits) == (radix, per_byte, fine_bits)
    assert radix << fine_bits >= levels == fmt.codes
    assert radix**per_byte <= 256


@pytest.mark.parametrize(("levels", "blocks"), [(32, 8), (24, 12), (16, 2), (12, 24), (7, 8)])
def test_both_planes_start_a_byte_after_blocks_per_group(levels, blocks):
    assert nf_format(levels).blocks_per_group == blocks


def test_sections_by_hand():
    # 130 weights are 3 blocks: 1 group of three coarse digits, 1 group of four fine digits.
    sections = nf_format(24).sections(130)
    assert sections.spans() == [(0, 64), (64, 128), (128, 192), (192, 197)]
    # The example of docs/FORMAT.md.
    assert nf_format(7).sections(2).spans() == [(0, 32), (32, 96), (96, 160), (160, 163)]
    # 257 blocks: 129 groups of two digits, no fine plane, 2 superblocks.
    sections = article_format(16).sections(257 * 64)
    assert sections.spans() == [(0, 32), (32, 32 + 8256), (8288, 8553)]


@pytest.mark.parametrize("format_id", FORMAT_IDS)
@pytest.mark.parametrize("weights", [1, 63, 64, 65, 64 * 24 + 1, 64 * 256, 64 * 256 + 1])
def test_sections_are_contiguous(format_id, weights):
    fmt = format_by_id(format_id)
    sections = fmt.sections(weights)
    spans = sections.spans()
    assert spans[0][0] == 0
    assert spans[-1][1] == sections.end
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert len(spans) == 3 + (fmt.fine_bits > 0)
    assert sections.coarse % 32 == 0
    # Superblock maxima are read in place as fp32.
    assert sections.scales % 4 == 0


@pytest.mark.parametrize("format_id", COMMON_IDS)
def test_without_levels_of_its_own_a_buffer_is_shorter_by_the_head(format_id):
    fmt = format_by_id(format_id)
    own, common = (fmt.sections(1000, own_levels) for own_levels in (True, False))
    assert own.end - common.end == own.coarse == 2 * fmt.levels
    assert common.coarse == 0
    assert fmt.sections_of(torch.empty(own.end), 1000) == own
    assert fmt.sections_of(torch.empty(common.end), 1000) == common
    sizes = (OWN_LEVELS_FROM - 1, OWN_LEVELS_FROM)
    assert [fmt.packed_bytes(size) - fmt.sections(size, False).end for size in sizes] == [0, own.coarse]


def test_formats_with_few_levels_always_have_their_own():
    for fmt in FORMATS.values():
        assert fmt.has_common_levels == (fmt.id in COMMON_IDS)
        assert fmt.expects_own_levels(1) == (fmt.id not in COMMON_IDS)


@pytest.mark.parametrize("levels", [0, 1, 8, 33, -7])
def test_other_numbers_of_levels_are_refused(levels):
    for by_levels in (nf_format, article_format):
        with pytest.raises(ValueError, match=rf"one of 32, 24, 16, 12, 7, got {levels}$"):
            by_levels(levels)


@pytest.mark.parametrize("format_id", ["nf16_b32", "", "NF16_b64", "nf8_b64"])
def test_an_unknown_format_id_is_refused(format_id):
    with pytest.raises(UnsupportedFileError, match=rf"'{format_id}' is unknown .*; update the plugin"):
        format_by_id(format_id)


def test_mantissas_are_the_sixteenth_roots_of_two():
    roots = [np.float16(2 ** (i / 16)) for i in range(16)]
    assert [int(root.view(np.uint16)) - (15 << 10) for root in roots] == list(SCALE_MANTISSAS)


@pytest.mark.parametrize("stride", SCALE_STRIDES)
def test_scale_table_is_powers_of_two_rounded_to_fp16(stride):
    lowest, highest = -14, 15 - 126 * stride // 16
    for exponent in (lowest, highest):
        table = scale_table(exponent, stride)
        assert table.dtype == torch.float16
        expected = np.array([scale(code, exponent, stride) for code in range(256)])
        assert (table.numpy().view(np.uint16) == expected.view(np.uint16)).all()
        assert np.isfinite(expected).all()
    for exponent in (lowest - 1, highest + 1):
        with pytest.raises(ValueError, match="leave the normal fp16 range"):
            scale_table(exponent, stride)


@pytest.mark.parametrize("stride", [0, 4, -1, 16])
def test_other_strides_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride must be one of .*, got {stride}"):
        scale_table(-14, stride)


def test_a_kept_tensor_is_made_once_and_fakes_are_not_kept():
    made = []

    @cached_tensor
    def build(count: int) -> torch.Tensor:
        made.append(count)
        return torch.zeros(count)

    with FakeTensorMode():
        assert isinstance(build(3), FakeTensor)
    assert type(build(3)) is torch.Tensor and build(3) is build(3)
    assert made == [3, 3]
