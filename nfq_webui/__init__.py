"""The extension for Automatic1111's web UI, Forge and Forge Neo: a thin layer over `nfq_core`."""

import logging
import sys
from pathlib import Path

log = logging.getLogger("nfq")


def register() -> None:
    """Hook into the program's loading, and add the tab and the settings; called whenever it loads its extensions."""
    try:
        _register()
    except (ImportError, AttributeError) as error:
        log.error("NFQ cannot be used: this program has changed (%s); update the extension", error)


def _register() -> None:
    from modules import script_callbacks, sd_models, shared

    from . import page, patching
    from .loading import NFQLoading

    patching.limits.clear()
    forge = hasattr(sd_models, "forge_model_reload")
    if forge:
        from .forge import install
    else:
        from .automatic import install
    install(NFQLoading())
    page.register(sd_models, shared, forge)
    script_callbacks.on_before_ui(_leave_module_path)


def _leave_module_path() -> None:
    """Remove our folder from the module path, where Forge leaves it: our `nodes` could hide another module."""
    folder = Path(__file__).parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry) != folder]
