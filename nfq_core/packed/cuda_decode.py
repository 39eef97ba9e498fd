"""The decode as one CUDA kernel launch per weight, with the same bits as `torch_decode`.

NVRTC compiles `decode.cu` at run time, so that neither Triton nor a compiler has to be installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from .cuda_driver import Driver, load_driver
from .formats import FORMATS
from .layout import BLOCK, BlockFormat
from .nvrtc import NvrtcError, load_nvrtc
from .scales import SCALE_MANTISSAS, SCALE_STEPS_PER_OCTAVE

SOURCE = Path(__file__).with_name("decode.cu")

OUTPUTS = {torch.float16: "Fp16", torch.bfloat16: "Bf16", torch.float32: "Fp32"}
"""Dtypes that the kernels write, with their names in the source."""

THREADS = 128
"""Threads per program: few, so that small layers occupy many multiprocessors."""

COLUMNS = 8
"""Weights of a block per thread, as in the source."""

MIN_BLOCKS_PER_UNIT = 8
"""Fewest blocks of which a thread decodes its columns: enough to repay its share of the tables."""

ALIGNMENT = 16
"""Alignment in bytes of packed buffers and outputs, for 128-bit loads and stores."""


class Arguments(ctypes.Structure):
    """The kernels' parameter, as in the source."""

    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("coarse", ctypes.c_void_p),
        ("fine", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("weights", ctypes.c_uint32),
    )


def blocks_per_unit(fmt: BlockFormat) -> int:
    """Consecutive blocks of which one thread decodes its columns: whole groups of both planes."""
    blocks = fmt.blocks_per_group
    while blocks < MIN_BLOCKS_PER_UNIT:
        blocks *= 2
    return blocks


def programs(fmt: BlockFormat, weights: int) -> int:
    """Thread blocks of a launch."""
    return -(-weights // (blocks_per_unit(fmt) * COLUMNS * THREADS))


def kernel_formats() -> list[BlockFormat]:
    """The formats with a kernel, which is called as the format's id."""
    return [fmt for fmt in FORMATS.values() if fmt.has_kernel]


def source(dtype: torch.dtype) -> str:
    """The CUDA program with a kernel for every format, whose output has this dtype, one of OUTPUTS."""
    kernels = [
        f"K({fmt.id}, {fmt.levels}, {fmt.coarse_radix}, {fmt.coarse_digits}, {fmt.fine_bits}, {fmt.window}, "
        f"{blocks_per_unit(fmt)})"
        for fmt in kernel_formats()
    ]
    definitions = {
        "BLOCK": BLOCK,
        "COLUMNS": COLUMNS,
        "THREADS": THREADS,
        "OUTPUT": OUTPUTS[dtype],
        "SCALE_OCTAVE": SCALE_STEPS_PER_OCTAVE,
        "SCALE_MANTISSAS": ", ".join(map(str, SCALE_MANTISSAS)),
        "FORMATS(K)": " ".join(kernels),
    }
    return "".join(f"#define {name} {value}\n" for name, value in definitions.items()) + SOURCE.read_text("utf-8")


class CudaDecoder:
    """The kernels of one output dtype, loaded on one device.

    Args:
        driver: the driver.
        device: a CUDA device with an index.
        image: the compiled `source`.
    """

    def __init__(self, driver: Driver, device: torch.device, image: bytes) -> None:
        self._driver = driver
        self._device = device
        self._context = driver.primary_context(device.index)
        self._functions = driver.load(self._context, image, [fmt.id for fmt in kernel_formats()])

    def dequantize_into(self, out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
        """`torch_decode.dequantize_into` in one launch on torch's current stream, without synchronising.

        Where `data` or `out` is not aligned to ALIGNMENT, or the number of weights is no multiple of COLUMNS, the
        kernel works on a copy. Scale parameters are not checked here; `NFTensor.validate` checks them when a file is
        read.

        Args:
            out: its dtype is that of the kernels, its device that of the decoder.
        """
        weights = out.numel()
        if data.data_ptr() % ALIGNMENT:
            data = data.clone()
        if weights % COLUMNS or out.data_ptr() % ALIGNMENT:
            whole = out.new_empty(-(-weights // COLUMNS) * COLUMNS)
            self._launch(whole, data, fmt, weights)
            out.view(-1).copy_(whole[:weights])
        else:
            self._launch(out, data, fmt, weights)

    def _launch(self, out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat, weights: int) -> None:
        """Decode to an aligned tensor, which has room for a multiple of COLUMNS."""
        sections, start = fmt.sections_of(data, weights), data.data_ptr()
        arguments = Arguments(
            start if sections.coarse else fmt.levels_in(data, sections).data_ptr(),
            start + sections.coarse,
            start + sections.fine,
            start + sections.scales,
            out.data_ptr(),
            out.numel(),
        )
        stream = torch.cuda.current_stream(self._device).cuda_stream
        function, grid = self._functions[fmt.id], programs(fmt, weights)
        self._driver.launch(self._context, function, grid, THREADS, stream, arguments)


def load(device: torch.device, dtype: torch.dtype) -> tuple[CudaDecoder, str]:
    """Compile and load the kernels for a device and output dtype, which takes seconds.

    Returns:
        The decoder, and what compiled it for what, in words.

    Raises:
        NvrtcError: NVRTC is missing, or does not compile for the device.
        DriverError: the driver is missing, or does not load the kernels.
    """
    if dtype not in OUTPUTS:
        raise NvrtcError(f"the kernels write {_names(OUTPUTS)}")
    image, words = _compiled(torch.cuda.get_device_capability(device), dtype)
    return CudaDecoder(load_driver(), device, image), words


def _names(dtypes: Iterable[torch.dtype]) -> str:
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(names)} and {last}"


@lru_cache(16)
def _compiled(capability: tuple[int, int], dtype: torch.dtype) -> tuple[bytes, str]:
    """The compiled kernels, and what compiled them for what; equal devices share them."""
    nvrtc = load_nvrtc()
    target = nvrtc.target(capability)
    return nvrtc.compile(source(dtype), target), f"compiled by NVRTC {nvrtc.version} for {target}"
