"""Runs in a program's own Python: imports its modules, loads the extension, and runs one check.

Usage: driver.py CHECK FOLDER, with a folder made by `conftest.py`. PROGRAM in the environment is the folder of
Automatic1111's web UI, Forge or Forge Neo. The last line printed is the result, as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

CHECK, FOLDER = sys.argv[1], Path(sys.argv[2])
PROGRAM = Path(os.environ["PROGRAM"])
IS_NEO = (PROGRAM / "modules_forge" / "packages").is_dir()
KIND = "neo" if IS_NEO else "forge" if (PROGRAM / "backend").is_dir() else "webui"
FLAGS = {"webui": ["--use-cpu", "all", "--no-half"], "forge": ["--always-cpu"], "neo": ["--cpu"]}


def start() -> None:
    """Import the program as its `webui.py` does, with FOLDER as data folder, and let it list and load extensions."""
    os.chdir(PROGRAM)
    sys.path[:0] = [str(PROGRAM)]
    sys.argv = ["webui.py", *FLAGS[KIND], "--data-dir", str(FOLDER), "--skip-torch-cuda-test"]
    if KIND == "forge":
        sys.path[1:1] = [str(PROGRAM / "packages_3rdparty"), str(PROGRAM / "repositories" / "huggingface_guess")]
    if KIND != "webui":
        from modules_forge.initialization import initialize_forge

        initialize_forge()
    from modules import initialize

    initialize.imports()
    from modules import extensions, scripts, sd_models

    extensions.list_extensions()
    sd_models.list_models()
    # Only ours: other extensions need packages that the tests do not install.
    extensions.extensions[:] = [found for found in extensions.extensions if found.name == "ComfyUI-NFQ"]
    scripts.load_scripts()


def path_of(name: str) -> str:
    """The path of a checkpoint."""
    return str(FOLDER / "models" / "Stable-diffusion" / name)


def reader() -> Any:
    """The function by which the program reads a checkpoint to merge it; what it returns is always dense."""
    from modules import extras, sd_models

    if KIND == "webui":
        return sd_models.read_state_dict
    return (extras if IS_NEO else sd_models).load_torch_file


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two state dicts have the same names and the same values in them."""
    import torch

    return left.keys() == right.keys() and all(torch.equal(left[key].float(), right[key].float()) for key in left)


def raised(call: Any, *args: Any, **kwargs: Any) -> str:
    """Type and text of the error that a call raises; empty if it raises none."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_loaded() -> dict[str, Any]:
    """Whether the extension is loaded from its own folder, and which names it leaves behind."""
    from modules import scripts

    first = reader().__module__
    scripts.script_callbacks.script_unloaded_callback()
    undone = reader().__module__
    scripts.load_scripts()
    again = reader().__module__
    scripts.script_callbacks.before_ui_callback()
    ours = sys.modules[first]
    patching = sys.modules[f"{first.rpartition('.')[0]}.patching"]
    return {
        "reader": first,
        "undone": undone,
        "again": again,
        "file": ours.__file__,
        "limits": patching.limits,
        "nodes": "nodes" in sys.modules,
        "core": sorted(name for name in sys.modules if name.endswith("nfq_core")),
        "path": [entry for entry in sys.path if "ComfyUI-NFQ" in entry],
    }


def check_list() -> dict[str, Any]:
    """Titles, hashes and metadata in the program's checkpoint list."""
    from modules import hashes, sd_models

    info = sd_models.get_closet_checkpoint_match("tiny.nfq")
    short = info.calculate_shorthash()
    return {
        "titles": sorted(sd_models.checkpoints_list),
        "name": info.name,
        "title": info.title,
        "short": short,
        "sha256": hashes.calculate_sha256(info.filename),
        "by_hash": sd_models.checkpoint_aliases[short].name,
        "metadata": sorted(info.metadata),
        "settings": info.metadata["nfq"]["settings"],
    }


def check_read() -> dict[str, Any]:
    """Results of the program's readers for our files and others."""
    read = reader()
    stock = read(path_of("dequantised.safetensors"))
    unet = {key: value for key, value in stock.items() if key.startswith("model.")}
    return {
        "same": same(read(path_of("tiny.nfq.safetensors")), stock),
        "renamed": same(read(path_of("renamed.safetensors")), stock),
        "unet": raised(lambda: same(read(path_of("unet.nfq.safetensors")), unet) or 1 / 0),
        "damaged": raised(read, path_of("damaged.nfq.safetensors")),
        "newer": raised(read, path_of("newer.nfq.safetensors")),
        "foreign": raised(read, path_of("foreign.nfq.safetensors")),
        "parts": {} if KIND == "webui" else parts(),
    }


def parts() -> dict[str, bool]:
    """Results of Forge's reader of models and of the files that 'VAE / Text Encoder' names."""
    import backend.loader

    read = backend.loader.load_torch_file
    encoder = str(FOLDER / "models" / "modules" / "clip_l")
    dense = read(f"{encoder}.safetensors")
    found = {"text encoder": same(read(f"{encoder}.nfq.safetensors"), dense)}
    if IS_NEO:
        tensors, metadata = read(f"{encoder}.nfq.safetensors", safe_load=True, device=None, return_metadata=True)
        found["pair"] = same(tensors, dense) and "nfq" in metadata
        tensors, metadata = read(path_of("tiny.nfq.safetensors"), return_metadata=True)
        packed = [value for value in tensors.values() if getattr(value, "gguf_cls", None)]
        found["packed"] = len(packed) > 40 and {len(value.shape) for value in packed} == {2, 4}
        found["stock pair"] = read(f"{encoder}.safetensors", return_metadata=True)[1] is not None
    return found


def check_page() -> dict[str, Any]:
    """The tab and the settings, built with the program's gradio, and the results of the tab's buttons."""
    import gradio as gr
    from modules import script_callbacks, shared

    shared.opts.data["sd_model_checkpoint"] = "tiny.nfq.safetensors"
    script_callbacks.ui_settings_callback()
    with gr.Blocks() as whole:
        tabs = script_callbacks.ui_tabs_callback()
        for tab, label, elem in tabs:
            with gr.Tab(label, id=elem):
                tab.render()
    functions = {}
    for function in whole.fns.values() if isinstance(whole.fns, dict) else whole.fns:
        if function.fn is not None:
            functions[function.fn.__name__] = function.fn
    make, show = functions["quantise"], functions["show"]
    levels, plain = ("levels", "fast", "auto", 12, 24), "dequantised.safetensors"
    estimate = list(functions["estimate"](plain, *levels, "", False, False))
    made = list(make(plain, *levels, "", False, False))
    again = list(make(plain, *levels, "", False, False))
    outside = list(make(plain, "small", "fast", "5bit", 12, 24, "../../outside", False, False))
    twice = list(make("tiny.nfq.safetensors", "tiny", "fast", "auto", 12, 24, "", False, False))
    kept = list(make(plain, "tiny", "fast", "keep", 12, 24, "kept", False, False))
    stopped = make(plain, "balanced", "best", "8bit", 16, 32, "sub/stopped", True, False)
    first = next(stopped)
    functions["stop"]()
    from modules import sd_models

    return {
        "tabs": [[label, elem] for _, label, elem in tabs],
        "options": sorted(name for name in shared.opts.data_labels if name.startswith("nfq_")),
        "settings": shared.opts.data_labels["nfq_facts"].default,
        "shown": show("tiny.nfq.safetensors"),
        "plain": show("dequantised.safetensors"),
        "broken": show("newer.nfq.safetensors"),
        "estimate": estimate[-1],
        "made": made[-1],
        "kept": [kept[-1], show("kept.nfq.safetensors")],
        "again": again[-1],
        "outside": outside[-1],
        "twice": twice[-1],
        "stopped": [first, list(stopped)[-1]],
        "titles": sorted(sd_models.checkpoints_list),
        "files": sorted(path.name for path in (FOLDER / "models").rglob("*") if "stopped" in path.name),
    }


def check_change() -> dict[str, Any]:
    """Loading a model, changing to files that cannot be loaded, and the model that the program then has."""
    program = importlib.import_module(f"program_{KIND}")
    return program.change(path_of, raised)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        sys.path.append(str(Path(__file__).parent))
        start()
        answer = globals()[f"check_{CHECK}"]()
    print(json.dumps(answer))
