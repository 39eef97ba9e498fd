"""Scales and codes chosen for blocks, against an exhaustive search."""

from __future__ import annotations

import pytest
import torch
from samples import gaussian

from nfq_core.fitting.search import (
    ASSIGN_BINS,
    ASSIGN_RANGE,
    MAX_UNSPANNED_ENERGY,
    SEARCH_BINS,
    BlockQuantizer,
    ScaleGrid,
    largest_magnitudes,
)
from nfq_core.packed.scales import SCALE_STRIDES

CPU = torch.device("cpu")


def asymmetric_levels(count: int = 16) -> torch.Tensor:
    """Ascending levels from -0.83 to 1, denser in the middle."""
    steps = torch.linspace(-1, 1, count)
    levels = steps * (0.4 + 0.6 * steps.abs())
    return torch.where(levels < 0, levels * 0.83, levels).half().float()


def nearest_distance(blocks: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Distance of each weight from the nearest level × scale: float64 (…, 64) for scales of shape (…)."""
    points = scales.double()[..., None, None] * levels.double()
    return (blocks.double()[..., None] - points).abs().amin(dim=-1)


@pytest.mark.parametrize(
    ("smallest", "stride"),
    # The range of a stride-1 grid is 126/16 octaves, of which 15/16 and rounding up to an octave lie above the top.
    [(0.02, 1), (0.02 * 2**-4.0, 1), (0.02 * 2**-8.0, 2), (0.02 * 2**-10.0, 2)],
)
def test_the_finest_grid_that_spans_the_blocks_is_taken(smallest, stride):
    grid = ScaleGrid.for_blocks(torch.tensor([0.02, 0.0, smallest]))
    # Below 2**-14 no grid reaches; a coarser one than that which starts there would be no help.
    assert grid.stride == stride
    assert grid.magnitudes[0] <= max(smallest, 2**-14)
    assert grid.magnitudes[-1] >= 0.02
    assert torch.equal(grid.magnitudes, grid.table[1:128].float())


@pytest.mark.parametrize(
    ("blocks", "tiny", "size", "stride"),
    [
        # One in 1,000 may lie below the smallest scale, no more. Beside 100 the three grids start at 1, 2**-8, 2**-14.
        (1000, 1, 2**-16.0, 1),
        (999, 1, 2**-16.0, 3),
        (1000, 2, 2**-16.0, 3),
        (3000, 3, 2**-9.0, 1),
        (3000, 4, 2**-9.0, 2),
    ],
)
def test_a_few_blocks_without_energy_need_no_coarser_grid(blocks, tiny, size, stride):
    largest = torch.full((blocks,), 100.0)
    largest[:tiny] *= size
    assert ScaleGrid.for_blocks(largest).stride == stride


@pytest.mark.parametrize(("share", "stride"), [(0.9, 1), (1.1, 2)])
def test_unspanned_blocks_may_have_a_hundred_thousandth_of_the_energy(share, stride):
    # The finest grid for blocks up to 1.0 starts at 2**-7; ten of 10,001 blocks are few enough to lie below.
    largest = torch.full((10_001,), 2.0**-6)
    largest[0] = 1.0
    energy = largest.double().square().sum().item()
    largest[1:11] = (share * MAX_UNSPANNED_ENERGY * energy / 10) ** 0.5
    grid = ScaleGrid.for_blocks(largest)
    assert grid.stride == stride
    assert (largest[1] < grid.magnitudes[0]) == (stride == 1)


@pytest.mark.parametrize("stride", SCALE_STRIDES)
def test_a_grid_is_no_finer_than_asked(stride):
    grid = ScaleGrid.for_blocks(torch.tensor([0.02, 0.01]), stride)
    assert grid.stride == stride
    ratios = grid.magnitudes[1:].double() / grid.magnitudes[:-1].double()
    # Each of two neighbours is rounded to 11 significant bits.
    assert torch.allclose(ratios, torch.tensor(2.0 ** (stride / 16), dtype=torch.float64), rtol=2**-10, atol=0)


# The grids end at 2**15.875, 2**15.75 and 2**15.625.
@pytest.mark.parametrize("top", [2**-12.0, 1.0, 1000.0, 50000.0])
@pytest.mark.parametrize("octaves", [0, 4, 12, 22])
def test_grids_reach_the_largest_block_anywhere_in_fp16(top, octaves):
    grid = ScaleGrid.for_blocks(torch.tensor([top, top * 2.0**-octaves]))
    assert grid.magnitudes[-1] >= top
    assert grid.magnitudes[0] <= max(top * 2.0**-octaves, 2**-14)
    assert torch.isfinite(grid.magnitudes).all()


@pytest.mark.parametrize("ceiling", [1.0, 0.99, 32752.0])
def test_a_grid_has_no_scale_above_its_ceiling(ceiling):
    largest = torch.tensor([ceiling, ceiling / 100])
    grid, whole = (ScaleGrid.for_blocks(largest, 1, *limit) for limit in ((ceiling,), ()))
    assert (grid.exponent, grid.stride) == (whole.exponent, whole.stride)
    assert torch.equal(grid.table, whole.table)
    assert torch.equal(grid.magnitudes, whole.magnitudes[whole.magnitudes <= ceiling])
    assert 0 < len(grid.magnitudes) < len(whole.magnitudes)


def test_a_grid_for_zero_blocks_only():
    grid = ScaleGrid.for_blocks(torch.zeros(3))
    assert (grid.magnitudes > 0).all()


@pytest.mark.parametrize("stride", SCALE_STRIDES)
@pytest.mark.parametrize("ceiling", [float("inf"), 0.3])
def test_the_search_starts_from_the_greatest_scale_no_larger_than_a_block(stride, ceiling):
    grid = ScaleGrid.for_blocks(torch.tensor([0.5]), stride, ceiling)
    exact = grid.magnitudes
    around = torch.cat([exact, torch.nextafter(exact, torch.zeros(())), torch.nextafter(exact, torch.ones(()))])
    largest = torch.cat([around, torch.tensor([0.0, 2**-149, 2**-20, 1.0, 60000.0])])
    wanted = torch.searchsorted(exact, largest, right=True).sub(1).clamp(min=0)
    assert torch.equal(BlockQuantizer(asymmetric_levels(), grid, CPU)._base(largest).long(), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_largest_magnitudes_of_sixteen_bits_are_the_same(dtype):
    blocks = gaussian(40, 64).to(dtype)
    blocks[0], blocks[1, 5], blocks[2, 6] = 0, float("nan"), float("-inf")
    blocks[3] = -0.0
    wanted = largest_magnitudes(blocks.float())
    assert torch.equal(largest_magnitudes(blocks).nan_to_num(nan=-1.0), wanted.nan_to_num(nan=-1.0))


def test_largest_magnitudes_carry_nan_and_inf():
    blocks = gaussian(4, 64)
    blocks[1, 3], blocks[2, 63], blocks[3] = float("nan"), float("-inf"), 0.0
    largest = largest_magnitudes(blocks)
    assert largest[0] == max(abs(value) for value in blocks[0].tolist())
    assert largest[1].isnan()
    assert largest[2:].tolist() == [float("inf"), 0.0]


@pytest.mark.parametrize("stride", SCALE_STRIDES)
@pytest.mark.parametrize("levels", [16, 7])
def test_scales_are_nearly_the_best_of_all_254(stride, levels):
    blocks = gaussian(150, 64, seed=stride)
    largest = largest_magnitudes(blocks)
    grid = ScaleGrid.for_blocks(largest, stride)
    book = asymmetric_levels(levels)
    quantizer = BlockQuantizer(book, grid, CPU)
    chosen = quantizer.scales(quantizer.scale_codes(blocks, largest))
    nonzero = torch.cat([grid.table[1:128], grid.table[129:]])
    every = nearest_distance(blocks[:, None], nonzero[None].expand(len(blocks), -1), book).norm(dim=-1)
    best = every.amin(dim=1)
    found = nearest_distance(blocks, chosen, book).norm(dim=-1)

    # In units of the greatest scale no larger than the block, of which the largest magnitude is under `reach` times:
    # rating moves a weight by half a grid cell at most, and takes scales of 2**(i / 16) exactly, which two roundings
    # to fp16 (2**-11 each) move by that part of a scale of at most two units. A weight's distance from its nearest
    # level changes by no more, so a block's norm of 64 such changes by 8 of them, once for the chosen and once for the
    # best scale.
    reach = 2 ** (stride / 16) * 1.002
    moved = reach / SEARCH_BINS + 2 * 2**-10
    assert (found <= best + 2 * 8 * moved * largest).all()
    # The moves of 64 weights mostly cancel. Measured: 0.04 % at most.
    assert found.square().sum() <= best.square().sum() * 1.002


@pytest.mark.parametrize("stride", SCALE_STRIDES)
def test_scales_at_the_ends_of_a_grid_are_the_best_of_those_in_it(stride):
    # A grid that ends with its largest block, as for numbers at the end of fp16, and blocks down to below its start.
    blocks = gaussian(300, 64)
    blocks /= largest_magnitudes(blocks)[:, None]
    grid = ScaleGrid.for_blocks(torch.ones(1), stride, 1.0)
    assert grid.magnitudes[-1] <= 1 < grid.magnitudes[-1] * 2 ** (stride / 16) * 1.001
    blocks[100:200] *= grid.magnitudes[0] * 1.5
    blocks[200:] *= grid.magnitudes[0] * 0.9
    largest = largest_magnitudes(blocks)
    book = asymmetric_levels()
    quantizer = BlockQuantizer(book, grid, CPU)
    chosen = quantizer.scales(quantizer.scale_codes(blocks, largest))
    assert (chosen != 0).all()
    assert (chosen.abs() <= 1).all()
    usable = torch.cat([grid.magnitudes, -grid.magnitudes])
    every = nearest_distance(blocks[:, None], usable[None].expand(len(blocks), -1), book).norm(dim=-1)
    found = nearest_distance(blocks, chosen, book).norm(dim=-1)
    # The moves of the test above, in units of the smallest scale where a block lies below it.
    unit = largest.clamp_min(grid.magnitudes[0])
    moved = 2 ** (stride / 16) * 1.002 / SEARCH_BINS + 2 * 2**-10
    assert (found <= every.amin(dim=1) + 2 * 8 * moved * unit).all()
    for part in (slice(0, 100), slice(100, 200), slice(200, 300)):
        assert found[part].square().sum() <= every[part].amin(dim=1).square().sum() * 1.005


def test_blocks_far_below_the_smallest_scale_get_scale_code_0():
    blocks = gaussian(2, 64)
    blocks /= largest_magnitudes(blocks)[:, None]
    grid = ScaleGrid.for_blocks(torch.ones(1))
    blocks *= grid.magnitudes[0] * torch.tensor([[0.124], [0.126]])
    codes = BlockQuantizer(asymmetric_levels(), grid, CPU).scale_codes(blocks, largest_magnitudes(blocks))
    assert codes[0] == 0
    assert codes[1] % 128 == 1


def test_negative_scales_turn_an_asymmetric_codebook_around():
    levels = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0])
    block = torch.zeros(2, 64)
    block[0, :4] = torch.tensor([1.0, 0.75, -0.5, 0.25])
    block[1] = -block[0]
    grid = ScaleGrid.for_blocks(torch.ones(2))
    quantizer = BlockQuantizer(levels, grid, CPU)
    codes = quantizer.scale_codes(block, torch.ones(2)).int()
    assert quantizer.scales(codes).tolist() == [1.0, -1.0]
    assert codes[1] - codes[0] == 128
    for row in quantizer.codes(block, quantizer.scales(codes)):
        assert levels[row[:5].long()].tolist() == [1.0, 0.75, -0.5, 0.25, 0.0]


def test_both_signs_are_used_on_random_blocks():
    blocks = gaussian(200, 64)
    largest = largest_magnitudes(blocks)
    quantizer = BlockQuantizer(asymmetric_levels(), ScaleGrid.for_blocks(largest), CPU)
    negative = (quantizer.scale_codes(blocks, largest) >= 128).float().mean()
    # By symmetry half of them; 200 coin tosses stray by 7 σ = 0.25.
    assert 0.25 < negative < 0.75


def test_zero_blocks_get_scale_code_0():
    blocks = gaussian(3, 64)
    blocks[1] = 0
    largest = largest_magnitudes(blocks)
    quantizer = BlockQuantizer(asymmetric_levels(), ScaleGrid.for_blocks(largest), CPU)
    scale_codes = quantizer.scale_codes(blocks, largest)
    assert scale_codes[1] == 0
    assert (scale_codes[[0, 2]] != 0).all()
    scales = quantizer.scales(scale_codes)
    assert scales[1] == 0
    assert (quantizer.levels[quantizer.codes(blocks, scales).long()] * scales[:, None])[1].eq(0).all()


@pytest.mark.parametrize("levels", [32, 7])
def test_weights_get_the_nearest_level(levels):
    blocks = gaussian(100, 64)
    scales = gaussian(100, 64, seed=1)[:, 0] * 2
    scales = torch.where(scales.abs() < 0.01, 0.05, scales)
    book = asymmetric_levels(levels)
    quantizer = BlockQuantizer(book, ScaleGrid.for_blocks(torch.ones(1)), CPU)
    codes = quantizer.codes(blocks, scales)
    ratios = blocks.double() / scales.double()[:, None]
    assert (ratios.abs() > ASSIGN_RANGE).any(), "some weights should lie outside the codebook"
    found = (ratios - book.double()[codes.long()]).abs()
    # The level nearest to a cell's centre is at most one cell farther than the nearest; 1e-6 for fp32 arithmetic.
    cell = 2 * ASSIGN_RANGE / ASSIGN_BINS
    assert (found <= nearest_distance(ratios, torch.ones(100), book) + cell + 1e-6).all()


def test_a_price_moves_the_boundary():
    # Between levels 0 and 1 a price p on the second moves the boundary from 1/2 to 1/2 + p/2: x² = (1 - x)² + p.
    levels, prices = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.2])
    quantizer = BlockQuantizer(levels, ScaleGrid.for_blocks(torch.ones(1)), CPU, prices)
    block = torch.zeros(1, 64)
    block[0, :4] = torch.tensor([0.58, 0.62, -0.48, -0.52])
    assert quantizer.codes(block, torch.ones(1))[0, :5].tolist() == [1, 2, 1, 0, 1]
