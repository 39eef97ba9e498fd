"""Where operating systems differ: names of files, what an open one allows, links that not all may make, error texts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WINDOWS = sys.platform == "win32"

names_are_bytes = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name has to be Unicode")

replaces_open_files = pytest.mark.skipif(WINDOWS, reason="an open file can be neither replaced nor removed there")


def link(path: Path, target: Path | str) -> None:
    """Make a symbolic link; the test is skipped where Windows does not let this user make one."""
    try:
        path.symlink_to(target)
    except OSError:
        if not WINDOWS:
            raise
        pytest.skip("this user may not make links")


def words(call: Callable[[], object]) -> str:
    """What this system says of why `call` fails."""
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.strerror
