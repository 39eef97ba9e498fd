"""Run by Automatic1111's web UI, Forge and Forge Neo before they start: installs missing packages."""

from importlib.util import find_spec

if find_spec("zstandard") is None:
    try:
        import launch
    except ImportError:
        # ComfyUI-Manager also runs this file, but installs requirements.txt itself.
        pass
    else:
        launch.run_pip('install "zstandard>=0.22"', "zstandard for NFQ")
