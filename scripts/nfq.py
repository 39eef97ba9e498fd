"""The entry point of Automatic1111's web UI and its relatives, which run every file in an extension's `scripts`.

They run it under a name without a package, and while they do, the extension's folder leads their module path: a plain
import of `nfq_core` might find another copy, and `nodes` is a name that belongs to others. So the folder is made a
package under a name of its own, and what is needed is imported from there.
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
