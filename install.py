"""Run by Automatic1111's web UI and its relatives before they start: installs what they lack."""

from importlib.util import find_spec

if find_spec("zstandard") is None:
    try:
        import launch
    except ImportError:
        # Another program: ComfyUI's manager installs requirements.txt, and runs this file too.
        pass
    else:
        launch.run_pip('install "zstandard>=0.22"', "zstandard for NFQ")
