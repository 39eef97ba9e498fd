"""The decode as an operation of torch: sound, one graph under torch.compile, and one for each copy of the package."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from samples import random_weight
from systems import link
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from nfq_core import NFTensor, quantize
from nfq_core.packed import op
from nfq_core.packed.formats import LEVELS

ROOT = Path(__file__).resolve().parents[2]


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


def one_use(tensor: NFTensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return op.dequantize_for_one_use(tensor.data, tensor.format.id, tensor.shape, dtype)


def test_results_for_one_use_share_a_threads_memory() -> None:
    small, large = quantize(random_weight(16, 64)), quantize(random_weight(64, 96))
    with torch.inference_mode():
        assert torch.equal(one_use(small), small.dequantize())
    with torch.no_grad():
        first = one_use(large, torch.float32)
        assert torch.equal(first, large.dequantize(torch.float32))
        again = one_use(small, torch.bfloat16)
        assert torch.equal(again, small.dequantize(torch.bfloat16))
        assert again.data_ptr() == first.data_ptr()
        # A patch is added in place, outside of inference mode too.
        again += 1
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(one_use), large).result()
        assert other.data_ptr() != again.data_ptr()
        assert torch.equal(again, small.dequantize(torch.bfloat16) + 1)


def test_results_for_one_use_are_new_where_autograd_may_keep_them() -> None:
    tensor = quantize(random_weight(16, 64))
    first, second = one_use(tensor), one_use(tensor)
    assert first.data_ptr() != second.data_ptr()
    x = random_weight(3, 64, seed=1).float().requires_grad_()
    products = [torch.nn.functional.linear(x, one_use(tensor, torch.float32)).sum() for _ in range(2)]
    sum(products).backward()
    torch.testing.assert_close(x.grad, 2 * tensor.dequantize(torch.float32).sum(0).expand_as(x))


def test_results_for_one_use_are_new_where_a_graph_is_made() -> None:
    tensor = quantize(random_weight(16, 64))
    x = random_weight(3, 64, seed=1).float()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, one_use(tensor, torch.float32))

    with torch.no_grad():
        wanted = layer(x)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer(torch.empty(3, 64)).shape == wanted.shape
        names = [str(node.target) for node in make_fx(layer)(x).graph.nodes]
        assert sum("dequantize" in name for name in names) == 1 and len(names) < 8, names
        assert torch.equal(layer(x), wanted)


def test_two_copies_of_the_package_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "__init__.py").touch()
    link(tmp_path / "plugin" / "nfq_core", ROOT / "nfq_core")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import nfq_core.packed.op as first, plugin.nfq_core.packed.op as second\n"
        "print(first.NAMESPACE != second.NAMESPACE)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-500:]
