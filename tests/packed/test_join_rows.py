"""Parts of a packed weight join to the same buffer again; other weights do not join."""

from __future__ import annotations

import pytest
import torch
from samples import random_buffer, random_weight

from nfq_core import NFTensor, quantize
from nfq_core.packed.formats import WRITABLE_IDS, format_by_id
from nfq_core.packed.rows import join_rows, split_rows


@pytest.mark.parametrize("format_id", WRITABLE_IDS)
@pytest.mark.parametrize("shape", [(3, 64), (15, 192), (21, 4, 4, 4)])
def test_parts_join_to_the_same_bytes(format_id: str, shape: tuple[int, ...]) -> None:
    packed = quantize(random_weight(*shape), format=format_id)
    joined = join_rows(split_rows(packed, 3))
    assert joined is not None and joined.shape == packed.shape and joined.dtype == packed.dtype
    assert torch.equal(joined.data, packed.data)


def test_parts_of_different_sizes() -> None:
    packed = quantize(random_weight(12, 64), format="nf24_b64")
    first, *rest = split_rows(packed, 3)
    assert torch.equal(join_rows([first, join_rows(rest)]).data, packed.data)


def test_weights_with_other_levels_scales_or_formats_do_not_join() -> None:
    first, second = (quantize(random_weight(6, 64) * factor, format="nf16_b64") for factor in (1, 100))
    assert join_rows([first, second]) is None
    assert join_rows([first, quantize(random_weight(6, 64), format="nf32_b64")]) is None
    assert join_rows([first, quantize(random_weight(6, 128), format="nf16_b64")]) is None


def test_an_article_weight_does_not_join() -> None:
    packed = NFTensor(random_buffer("article16_b64", 192), format_by_id("article16_b64"), (3, 64), torch.float16)
    assert join_rows([packed, packed]) is None
