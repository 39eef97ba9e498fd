"""The extension of Automatic1111's web UI and its relatives: thin over `nfq_core`."""

import sys
from pathlib import Path


def register() -> None:
    """Called each time the program loads its extensions: takes up the program's loading, adds a tab and settings."""
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
    """Forge leaves extensions' folders on the module path; ours has a `nodes`, a name that belongs to others."""
    folder = Path(__file__).parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry) != folder]
