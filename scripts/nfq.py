"""Entry point for Automatic1111's web UI, Forge and Forge Neo, which run every file in an extension's `scripts` folder.

They run this file without a package, and the extension's folder is first on the module path. A plain import of
`nfq_core` could find another copy, and `nodes` could hide another module. So this file makes the folder a package with
a unique name and imports from that package.
"""

import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).absolute().parent.parent
PACKAGE = f"nfq_extension_{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}"

if PACKAGE not in sys.modules:
    package = ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package

importlib.import_module(f"{PACKAGE}.nfq_webui").register()
