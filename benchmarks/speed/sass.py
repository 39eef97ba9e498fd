"""Machine code of GPU kernels, counted: nvcc or Triton compiles it, cuobjdump disassembles it, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PADDING = ("NOP", "BRA")
"""What fills the end of a kernel: a jump to itself, and no operations."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code."""

    instructions: list[str]
    """In order, without the padding at the end; a predicate such as ``@!P0`` comes first."""
    addresses: list[int]
    spill_bytes: int
    """Bytes that a thread spills to local memory or keeps on its stack."""
    registers: int

    @property
    def operations(self) -> list[str]:
        """The instructions' names with modifiers, such as ``LDG.E.64``."""
        return [re.sub(r"^@\S+ ", "", one).split()[0] for one in self.instructions]

    def count(self, name: str) -> int:
        """How many instructions have this name, without modifiers."""
        return sum(one.split(".")[0] == name for one in self.operations)

    def widths(self, name: str) -> dict[str, int]:
        """How many loads or stores with this name move how many bits."""
        found: Counter[str] = Counter()
        for one in self.operations:
            if one.split(".")[0] == name:
                bits = re.search(r"\.[US]?(8|16|64|128)\b", one)
                found[bits[1] if bits else "32"] += 1
        return dict(found)

    def loops(self) -> int:
        """How many jumps go backwards."""
        jumps = zip(self.addresses, self.instructions, strict=True)
        targets = ((address, re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", one)) for address, one in jumps)
        return sum(1 for address, target in targets if target and int(target[1], 16) <= address)


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit, which Triton's wheel has in part; empty if it is not installed."""
    folders = [Path(spec.origin).parent / "backends/nvidia/bin"] if (spec := find_spec("triton")) else []
    return shutil.which(name) or next((str(path) for path in (one / name for one in folders) if path.exists()), "")


def obstacle() -> str:
    """Why kernels cannot be compiled and counted here; empty if they can."""
    missing = [name for name in ("nvcc", "cuobjdump") if not tool(name)]
    return f"{' and '.join(missing)} not installed" if missing else ""


def compiled(source: str, architecture: int) -> bytes | str:
    """Compile CUDA C++ with nvcc, for example for architecture 86; returns machine code, or nvcc's first error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decode.cu"
        path.write_text(source, encoding="utf-8")
        target = path.with_suffix(".cubin")
        command = [tool("nvcc"), "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-o", str(target), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        return target.read_bytes() if not done.returncode else done.stderr.strip().partition("\n")[0]


def kernels(cubin: bytes) -> dict[str, Kernel]:
    """The kernels in machine code, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        texts = [
            subprocess.run([tool("cuobjdump"), what, str(path)], check=True, capture_output=True, text=True).stdout
            for what in ("-sass", "-res-usage")
        ]
    return parsed(*texts)


def parsed(sass: str, usage: str) -> dict[str, Kernel]:
    """The kernels in what ``cuobjdump -sass`` and ``cuobjdump -res-usage`` print."""
    resources = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    registers = {name: int(count) for name, count, _, _ in resources}
    spilled = {name: int(stack) + int(local) for name, _, stack, local in resources}
    found = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL):
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body, re.MULTILINE)
        while lines and lines[-1][1].split()[0] in PADDING:
            lines.pop()
        addresses, instructions = [int(address, 16) for address, _ in lines], [text for _, text in lines]
        found[name] = Kernel(instructions, addresses, spilled[name], registers[name])
    return found
