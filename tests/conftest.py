"""Settings of the test run.

The repository's root is a package for the host, which imports it with relative imports. pytest would import its
`__init__.py` before the first test; the hook below has the root collected as a plain directory instead. A hook
that stands in this file itself is not asked about folders above it, so it is registered as a plugin.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import stub_host

ROOT = Path(__file__).resolve().parent.parent


class PlainRoot:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """The command takes SIGTERM over, which a test run must not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def command_on_the_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints name the command `nfq` only where it is on the path, as after an installation."""
    folder = tmp_path_factory.getbasetemp() / "bin"
    if not folder.exists():
        folder.mkdir()
        for name in ("nfq", "nfq.bat"):
            (folder / name).touch(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The plugin in a stub of the host whose model folders lie in `tmp_path / "models"`."""
    known = set(sys.modules)
    for folder in ("diffusion_models", "checkpoints"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    stub_host.install(monkeypatch, tmp_path / "models")
    yield stub_host.import_plugin(tmp_path / "ComfyUI-NFQ")
    for name in set(sys.modules) - known:
        if name.startswith(str(tmp_path).replace(".", "_x_")):
            del sys.modules[name]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(PlainRoot())
