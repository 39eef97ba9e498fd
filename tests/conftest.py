"""Settings of the test run.

The repository's root is a package for the host, which imports it with relative imports. pytest would import its
`__init__.py` before the first test; the hook below has the root collected as a plain directory instead. A hook
that stands in this file itself is not asked about folders above it, so it is registered as a plugin.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class PlainRoot:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(PlainRoot())
