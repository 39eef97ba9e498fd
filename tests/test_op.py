"""The decode as an operation of torch: sound, one graph under torch.compile, and one for each copy of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import random_weight

from nfq_core import op, quantize
from nfq_core.formats import LEVELS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_operation_is_sound(levels: int, dtype: torch.dtype) -> None:
    tensor = quantize(random_weight(10, 3, 7), levels)
    arguments = (tensor.data, tensor.format.id, list(tensor.shape), dtype)
    torch.library.opcheck(op.dequantize, arguments)
    assert torch.equal(op.dequantize(*arguments), tensor.dequantize(dtype))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"shape": [640]}, "is a 1-D uint8 buffer of"),
        ({"format_id": "nf7_b64"}, "is a 1-D uint8 buffer of"),
        ({"format_id": "nf5_b64"}, "format id 'nf5_b64' is unknown"),
        ({"dtype": torch.int32}, "dequantised to fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"dtype": torch.float8_e4m3fn}, "dequantised to fp16, bf16, fp32 or fp64, got torch.float8_e4m3fn"),
    ],
)
def test_the_operation_looks_at_what_it_is_given(change: dict, error: str) -> None:
    tensor = quantize(random_weight(10, 100))
    given = {"data": tensor.data, "format_id": tensor.format.id, "shape": [1000], "dtype": torch.float16} | change
    with pytest.raises(Exception, match=error):
        op.dequantize(*given.values())


def test_a_compiled_layer_is_one_graph() -> None:
    tensor = quantize(random_weight(32, 64))
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def layer(x: torch.Tensor) -> torch.Tensor:
        weight = op.dequantize(tensor.data, tensor.format.id, tensor.shape, torch.float32)
        return torch.nn.functional.linear(x, weight).relu()

    x = random_weight(5, 64, seed=1)
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


def test_two_copies_of_the_package_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "__init__.py").touch()
    (tmp_path / "plugin" / "nfq_core").symlink_to(ROOT / "nfq_core")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import nfq_core.op as first, plugin.nfq_core.op as second\n"
        "print(first.NAMESPACE != second.NAMESPACE)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-500:]
