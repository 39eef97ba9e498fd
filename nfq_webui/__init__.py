"""The extension for Automatic1111's web UI and Forge: a thin layer over `nfq_core`."""

import sys
from pathlib import Path


def register() -> None:
    """Hook into the program's loading, and add the tab and the settings; called whenever it loads its extensions."""
    from modules import script_callbacks, sd_models, shared

    from . import page
    from .loading import NFQLoading

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
