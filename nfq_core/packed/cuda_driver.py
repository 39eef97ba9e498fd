"""The few functions of NVIDIA's driver that load and launch a kernel, called through ctypes."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""The driver's library, in the loader's path of every machine with the driver."""

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""


class DriverError(RuntimeError):
    """The driver is missing, or one of its functions failed; the message is one sentence without a full stop."""


class Driver:
    """The functions of the driver's library.

    Args:
        library: the loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        library.cuCtxPushCurrent_v2.argtypes = [pointer]
        library.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
        library.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
        library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        self._check("cuInit", library.cuInit(0))

    def primary_context(self, index: int) -> int:
        """The context in which torch works on a device: a handle, kept for the life of the process."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(device), index))
        self._check("cuDevicePrimaryCtxRetain", self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        return context.value

    def load(self, context: int, image: bytes, names: list[str]) -> dict[str, int]:
        """Load a compiled module for the life of the process.

        Args:
            context: a context.
            image: machine code or PTX, see `nvrtc.Nvrtc.compile`.
            names: kernels in it.

        Returns:
            Handles of the kernels, by name.

        Raises:
            DriverError: the driver refuses the image, for example because it is older than NVRTC.
        """
        module, functions = ctypes.c_void_p(), {}
        pushed = self._enter(context)
        try:
            self._check("cuModuleLoadData", self._library.cuModuleLoadData(ctypes.byref(module), image))
            for name in names:
                function = ctypes.c_void_p()
                result = self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
                self._check("cuModuleGetFunction", result)
                functions[name] = function.value
        finally:
            self._leave(pushed)
        return functions

    def launch(
        self, context: int, function: int, programs: int, threads: int, stream: int, arguments: ctypes.Structure
    ) -> None:
        """Launch a kernel that has one structure as its parameter, without waiting for it.

        Args:
            context: the context of the kernel and the stream; it need not be the current one of this thread.
            function: handle of the kernel.
            programs: thread blocks.
            threads: threads per thread block.
            stream: handle of the stream.
            arguments: the structure, copied by the call.

        Raises:
            torch.cuda.OutOfMemoryError: the driver is out of memory.
            DriverError: any other failure.
        """
        parameters = ctypes.c_void_p(ctypes.addressof(arguments))
        pushed = self._enter(context)
        try:
            result = self._library.cuLaunchKernel(
                function, programs, 1, 1, threads, 1, 1, 0, stream, ctypes.byref(parameters), None
            )
        finally:
            self._leave(pushed)
        if result == OUT_OF_MEMORY:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory while the kernel that decodes weights was launched")
        self._check("cuLaunchKernel", result)

    def _enter(self, context: int) -> bool:
        """Make a context current for this thread; whether it was not."""
        current = ctypes.c_void_p()
        self._check("cuCtxGetCurrent", self._library.cuCtxGetCurrent(ctypes.byref(current)))
        if current.value == context:
            return False
        self._check("cuCtxPushCurrent", self._library.cuCtxPushCurrent_v2(context))
        return True

    def _leave(self, pushed: bool) -> None:
        """Undo `_enter`."""
        if pushed:
            self._check("cuCtxPopCurrent", self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))

    def _check(self, function: str, result: int) -> None:
        if result:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(result, ctypes.byref(name))
            raise DriverError(f"{function} of the NVIDIA driver fails ({(name.value or b'unknown error').decode()})")


@cache
def load_driver() -> Driver:
    """The driver of this machine; DriverError if there is none."""
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except (OSError, AttributeError) as error:
        raise DriverError(f"the NVIDIA driver cannot be loaded ({error})") from None
