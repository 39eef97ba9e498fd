"""Codes to planes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import GEOMETRY, pack_plane

from nfq_core.packed.formats import LEVELS, format_by_id, nf_format
from nfq_core.packed.packing import pack_codes, unpack_codes


def columns(*rows: list[int]) -> torch.Tensor:
    """Blocks whose first weights have these codes, the others code 0."""
    codes = torch.zeros(len(rows), 64, dtype=torch.uint8)
    for block, row in enumerate(rows):
        codes[block, : len(row)] = torch.tensor(row, dtype=torch.uint8)
    return codes


@pytest.mark.parametrize(
    ("levels", "codes", "coarse", "fine"),
    [
        # 16 levels: nibbles, the first block in the lower one; a missing third block counts as 0.
        (16, [[15, 1, 2], [3, 0, 10], [7]], [[15 + 3 * 16, 1, 2 + 10 * 16], [7]], []),
        # 32 levels: code = 2 * nibble + bit; 8 bits per fine byte.
        (32, [[31, 4], [17, 9], [1]], [[15 + 8 * 16, 2 + 4 * 16], [0]], [[1 + 2 + 4, 0 + 2]]),
        # 24 levels: code = 4 * (0 … 5) + (0 … 3); three digits of base 6, four pairs of bits.
        (
            24,
            [[23, 4], [9, 0], [2, 13], [20], [23]],
            [[5 + 2 * 6 + 0, 1 + 0 + 3 * 36], [5 + 5 * 6]],
            [[3 + 1 * 4 + 2 * 16 + 0, 0 + 0 + 1 * 16], [3]],
        ),
        # 12 levels: code = 2 * (0 … 5) + bit.
        (12, [[11, 2], [6], [1]], [[5 + 3 * 6 + 0, 1]], [[1 + 0 + 4, 0]]),
        # 7 levels: code = 2 * (0 … 3) + bit; four digits of base 4.
        (7, [[6], [5], [1], [4], [3]], [[3 + 2 * 4 + 0 + 2 * 64], [1]], [[0 + 2 + 4 + 0 + 16]]),
    ],
)
def test_bytes_by_hand(levels, codes, coarse, fine):
    found_coarse, found_fine = pack_codes(columns(*codes), nf_format(levels))
    assert torch.equal(found_coarse.view(-1, 64), columns(*coarse))
    assert torch.equal(found_fine.view(-1, 64), columns(*fine))


@pytest.mark.parametrize("levels", [*LEVELS, 256])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 23, 24, 25, 49])
def test_planes_equal_the_reference_and_come_back(levels, blocks):
    fmt = format_by_id(f"nf{levels}_b64")
    radix, per_byte, fine_bits = GEOMETRY[levels]
    codes = np.random.default_rng(blocks).integers(0, levels, (blocks, 64), dtype=np.uint8)
    coarse, fine = pack_codes(torch.from_numpy(codes), fmt)
    assert (coarse.numpy() == pack_plane(codes >> fine_bits, radix, per_byte)).all()
    if fine_bits:
        assert (fine.numpy() == pack_plane(codes % 2**fine_bits, 2**fine_bits, 8 // fine_bits)).all()
    else:
        assert fine.numel() == 0
    sections = fmt.sections(blocks * 64)
    assert len(coarse) == sections.fine - sections.coarse
    assert len(fine) == sections.scales - sections.fine
    assert torch.equal(unpack_codes(coarse, fine, blocks, fmt), torch.from_numpy(codes))


@pytest.mark.parametrize("levels", LEVELS)
def test_packing_leaves_its_input_alone(levels):
    codes = torch.randint(0, levels, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = codes.clone()
    coarse, fine = pack_codes(codes, nf_format(levels))
    planes = coarse.clone(), fine.clone()
    unpack_codes(coarse, fine, 5, nf_format(levels))
    assert torch.equal(codes, before)
    assert torch.equal(coarse, planes[0])
    assert torch.equal(fine, planes[1])
