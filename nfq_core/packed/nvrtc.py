"""NVRTC, NVIDIA's run-time compiler, which torch brings for CUDA: found and called through ctypes.

Neither a CUDA toolkit nor a host compiler nor a GPU is needed to compile.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

NOT_THE_LIBRARY = ("builtins", ".alt.")
"""Parts of the names of other files beside it."""


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refuses to compile; the message is one sentence without a full stop."""


class Nvrtc:
    """The functions of one NVRTC library.

    Args:
        library: the loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @property
    def version(self) -> str:
        """Its version, such as "12.4"."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"{major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        """The architectures that it compiles for, such as 86 for compute capability 8.6, in ascending order."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return sorted(found)

    def target(self, capability: tuple[int, int]) -> str:
        """The architecture to compile for, for a device of a compute capability.

        Returns:
            ``sm_86`` for machine code; ``compute_86`` for code that the driver translates, if the device is newer than
            NVRTC.

        Raises:
            NvrtcError: every architecture is newer than the device.
        """
        wanted, known = 10 * capability[0] + capability[1], self.architectures()
        older = [architecture for architecture in known if architecture <= wanted]
        if not older:
            raise NvrtcError(
                f"NVRTC {self.version} compiles for compute capability {known[0] / 10} and newer, this device has "
                f"{capability[0]}.{capability[1]}"
            )
        return f"sm_{wanted}" if older[-1] == wanted else f"compute_{older[-1]}"

    def compile(self, source: str, target: str) -> bytes:
        """Compile CUDA C++ 17.

        Args:
            source: the program, which includes nothing.
            target: see `target`.

        Returns:
            Machine code for sm_…, text with a final zero byte for compute_…; the driver loads both.

        Raises:
            NvrtcError: the source is refused.
        """
        library, program = self._library, ctypes.c_void_p()
        self._check(
            library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"decode.cu", 0, None, None),
        )
        try:
            options = (ctypes.c_char_p * 2)(f"--gpu-architecture={target}".encode(), b"--std=c++17")
            if library.nvrtcCompileProgram(program, len(options), options):
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").split("\n")
                first = next((line for line in log if "error" in line), log[0]).strip()
                raise NvrtcError(f"NVRTC {self.version} refuses the kernel for {target}: {first or 'no reason given'}")
            return self._read(program, "CUBIN" if target.startswith("sm_") else "PTX")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        """One of a program's outputs: "CUBIN", "PTX" or "ProgramLog"."""
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, text))
        return text.raw

    def _check(self, result: int) -> None:
        if result:
            raise NvrtcError(f"NVRTC fails ({self._library.nvrtcGetErrorString(result).decode()})")


def load_nvrtc() -> Nvrtc:
    """The NVRTC of torch's CUDA version; NvrtcError if none can be loaded."""
    failures = []
    for candidate in candidates():
        try:
            _load_builtins(candidate)
            return Nvrtc(ctypes.CDLL(candidate))
        except (OSError, AttributeError) as error:
            failures.append(str(error).strip().partition("\n")[0])
    # The last one was a mere name, which most machines do not know.
    raise NvrtcError(
        f"NVRTC cannot be loaded ({failures[0]})" if failures[1:] else "NVRTC is not installed beside torch"
    )


def candidates() -> Iterator[str]:
    """Paths of the library to try, torch's files and NVIDIA's packages that torch needs; then a name for the loader."""
    windows = sys.platform == "win32"
    version = torch.version.cuda or ""
    major = version.partition(".")[0]
    # CUDA 11.2 and later share one name, as do all versions of later majors.
    number = {"": "", "11": "11.2"}.get(major, major)
    name = f"nvrtc64_{number.replace('.', '') if major == '11' else major + '0'}_0.dll" if windows else "libnvrtc.so"
    suffix = f".{number}" if number and not windows else ""
    patterns = ("nvrtc64_*.dll",) if windows else ("libnvrtc.so*", "libnvrtc-*.so*")
    files = [path for folder in _folders() for pattern in patterns for path in sorted(folder.glob(pattern))]
    files = [path for path in files if not any(part in path.name for part in NOT_THE_LIBRARY)]
    # Packages of several CUDA versions may be installed side by side.
    files.sort(key=lambda path: not (path.name == name if windows else path.name.endswith(suffix)))
    yield from map(str, files)
    yield name + suffix


def _folders() -> Iterator[Path]:
    yield Path(torch.__file__).parent / "lib"
    spec = find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        # Up to CUDA 12 nvidia/cuda_nvrtc/lib or, under Windows, bin; since then nvidia/cu13/lib or bin/x86_64.
        for pattern in ("*/lib", "*/bin", "*/bin/*"):
            yield from sorted(Path(folder).glob(pattern))


def _load_builtins(candidate: str) -> None:
    """Load the library's second file first, which the library does not look for beside itself on every system."""
    pattern = "nvrtc-builtins64_*.dll" if sys.platform == "win32" else "libnvrtc-builtins*.so*"
    for path in Path(candidate).parent.glob(pattern) if Path(candidate).is_absolute() else ():
        if ".alt." not in path.name:
            ctypes.CDLL(str(path))
