"""LoRA patches of a packed layer: counted operations and copies, slices of fused weights; with a stand-in for the host.

`tests/host/test_patches.py` compares with the real host.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from operations import Recorder
from stub_lora import KEY, Adapter, calculate_weight, patch

ROWS, COLUMNS, RANK = 12, 8, 2


def factors(rows: int, columns: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator))


def fused(count: int) -> list[tuple]:
    """LoRAs of the whole weight, of three slices of its rows (a fused q, k and v) and of a slice of its columns."""
    third = ROWS // 3
    found = []
    for seed in range(0, 5 * count, 5):
        found += [patch(factors(ROWS, COLUMNS, seed), 0.7)]
        found += [patch(factors(third, COLUMNS, seed + n), 0.5, offset=(0, n * third, third)) for n in range(3)]
        found += [patch(factors(ROWS, 3, seed + 4), -1.5, offset=(1, 5, 3))]
    return found


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("resident", [True, False])
def test_slices_and_whole_weights_give_the_host_s_result(lora, count: int, resident: bool) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(99))
    wanted = calculate_weight(fused(count), weight.clone(), KEY)
    layer = lora.WeightPatch(KEY, fused(count), (ROWS, COLUMNS), lora.Misfits(), resident=resident)
    for _ in range(2):
        assert torch.allclose(layer(weight.clone()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("resident", [True, False])
def test_a_step_takes_one_product_for_any_number_of_loras(lora, count: int, resident: bool) -> None:
    layer = lora.WeightPatch(KEY, fused(count), (ROWS, COLUMNS), lora.Misfits(), resident=resident)
    device = torch.device("meta")
    layer.prepare(device, torch.float16)
    weight = torch.empty(ROWS, COLUMNS, dtype=torch.float16, device=device)
    with Recorder() as recorded:
        layer(weight)
    # Of an offloaded layer, two copies to the device.
    wanted = {"aten.addmm_.default": 1} | ({} if resident else {"aten._to_copy.default": 2})
    assert Counter(recorded.operations) == wanted


def test_factors_of_an_offloaded_layer_stay_in_ram_in_the_dtype_of_the_step(lora) -> None:
    layer = lora.WeightPatch(KEY, fused(2), (ROWS, COLUMNS), lora.Misfits())
    layer.prepare(torch.device("meta"), torch.float16)
    (kept,) = layer._combined(torch.device("meta"), torch.float16)
    assert {one.device.type for one in (kept.up, kept.down)} == {"cpu"}
    assert {one.dtype for one in (kept.up, kept.down)} == {torch.float16}
    assert layer.factor_bytes(torch.float16) == kept.up.nbytes + kept.down.nbytes


def test_a_released_layer_keeps_no_factors_on_the_device(lora) -> None:
    layer = lora.WeightPatch(KEY, fused(1), (ROWS, COLUMNS), lora.Misfits(), resident=True)
    meta = torch.device("meta")
    layer.prepare(meta, torch.float16)
    assert layer._ready[0].up.is_meta
    layer.release()
    layer.prepare(meta, torch.float16)
    assert not layer._ready[0].up.is_meta


@pytest.mark.parametrize("offset", [(0, 10, 4), (0, -1, 4), (2, 0, 4), (1, 6, 4)])
def test_a_slice_outside_the_weight_is_left_to_the_host(lora, offset: tuple[int, int, int]) -> None:
    adapter = factors(4, COLUMNS, 0) if offset[0] != 1 else factors(ROWS, 4, 0)
    assert not lora._is_plain(patch(adapter, offset=offset), (ROWS, COLUMNS))
