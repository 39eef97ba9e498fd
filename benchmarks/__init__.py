"""Benchmarks; README.md in this folder lists the commands, their duration, results files and tables."""

from __future__ import annotations

import sys
from pathlib import Path

# Some benchmarks use the tests' random models and their driver of a real ComfyUI.
sys.path += [str(Path(__file__).resolve().parent.parent / "tests" / folder) for folder in ("helpers", "host")]
