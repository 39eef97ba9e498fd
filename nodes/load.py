"""Loading MODEL, CLIP and VAE from our files."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ..nfq_core import NFQError, NFQFile, NFTensor, UnsupportedFileError
from ..nfq_core.checkpoints.kinds import NO_MODELS, kind_name
from ..nfq_core.checkpoints.memory import choose_memory_mode, needed_bytes
from ..nfq_core.checkpoints.state_dict import StateDict, load_tensors
from ..nfq_core.checkpoints.whole_checkpoint import MARKERS, host_names, text_encoders_of
from ..nfq_core.files.container import Facts, Source
from ..nfq_core.files.safetensors_io import Entry
from ..nfq_core.models.components import find_components, model_name
from ..nfq_core.models.text_encoders import find_text_encoders, owner_finder, text_encoder_warnings
from ..nfq_core.models.unet import UNKNOWN, detect
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from ..nfq_core.packed.backends import warm_up
from ..nfq_core.planning.settings import TEXT_ENCODERS_SETTING, of_unet
from .clip import MissingCLIP, adopt_clip
from .host import CHECKPOINTS, PROVENANCE, UNETS, NodeProgress, Provenance
from .misfits import listening
from .ops import NFLayer, NFOps
from .packed_tensor import LoadedTensor
from .patcher import adopt

log = logging.getLogger("nfq")


def load_unet(
    path: str, memory: str = "packed", disable_dynamic: bool = False, progress: NodeProgress | None = None
) -> ModelPatcher:
    """Load the diffusion model of one of our files as a MODEL.

    Args:
        path: a file with a diffusion model or a whole checkpoint; only its diffusion model is read.
        memory: "packed"; "resident": a stock MODEL with dequantised weights; "auto": either, depending on free memory.
        disable_dynamic: whether the host wants a model without DynamicVRAM; packed models never use it.
        progress: see `NodeProgress`.

    Raises:
        NFQError: the file is missing, damaged, foreign or newer, or its diffusion model is incomplete or unknown to
            the host.
    """
    with NFQFile(path) as file:
        names, wanted = _model_names(file)
        mode = _memory_mode(memory, file, names)
        tensors = load_tensors(file, wanted, memory=mode, progress=progress or NodeProgress())
        return build_model({names.get(key, key): tensors[key] for key in wanted}, file, mode, disable_dynamic)


def load_checkpoint(
    path: str, memory: str = "packed", progress: NodeProgress | None = None
) -> tuple[ModelPatcher, Any, Any]:
    """Load MODEL, CLIP and VAE from a whole checkpoint of ours; arguments as for `load_unet`.

    As with a stock loader, a missing CLIP or VAE fails only when it is used.

    Raises:
        NFQError: as `load_unet`, or the file contains neither CLIP nor VAE.
    """
    with NFQFile(path) as file:
        names, wanted = _model_names(file)
        mode = _memory_mode(memory, file, names)
        tensors = load_tensors(
            file, memory=mode, dense=_dense_companions(file, names), progress=progress or NodeProgress()
        )
        model = build_model({names.get(key, key): tensors[key] for key in wanted}, file, mode)
        clip, vae = _clip_and_vae(file, names, tensors)
    if isinstance(clip, MissingCLIP) and getattr(vae, "first_stage_model", None) is None:
        raise NFQError(
            f"{path} contains neither CLIP nor VAE; move it to models/{UNETS} and use Load NFQ Diffusion Model"
        )
    for part, reload in ((clip, load_clip_patcher), (vae, load_vae_patcher)):
        if getattr(part, "patcher", None) is not None:
            part.patcher.cached_patcher_init = (reload, (path, mode))
    return model, clip, vae


def load_clip_patcher(path: str, memory: str = "packed", disable_dynamic: bool = False) -> Any:
    """Load the patcher of a file's CLIP again, when the host wants it without DynamicVRAM or for a second device."""
    return _companions_of(path, memory, disable_dynamic)[0].patcher


def load_vae_patcher(path: str, memory: str = "packed", disable_dynamic: bool = False) -> Any:
    """Load the patcher of a file's VAE again, as `load_clip_patcher`."""
    return _companions_of(path, memory, disable_dynamic)[1].patcher


def _companions_of(path: str, memory: str, disable_dynamic: bool) -> tuple[Any, Any]:
    with NFQFile(path) as file:
        names, _ = _model_names(file)
        shapes = file.shapes()
        model = {key: torch.empty(shapes[key], device="meta") for key in names if len(shapes[key]) > 1}
        wanted = [key for key in file.keys() if key not in model]  # noqa: SIM118
        others = load_tensors(file, wanted, memory=memory, dense=_dense_companions(file, names))
        return _clip_and_vae(file, names, model | others, disable_dynamic)


def _dense_companions(file: NFQFile, names: Mapping[str, str]) -> set[str]:
    """The tensors of VAE and the rest, which the host holds dense; `names` lists the diffusion model's."""
    owner = owner_finder(find_text_encoders(file.shapes()))
    return {key for key in file.keys() if key not in names and owner(key) is None}  # noqa: SIM118


def _clip_and_vae(
    file: NFQFile, names: Mapping[str, str], tensors: StateDict, disable_dynamic: bool = False
) -> tuple[Any, Any]:
    """Make CLIP and VAE from a checkpoint's tensors.

    `names` lists the diffusion model's, of which the host reads shapes, and small tensors to tell variants.
    """
    model = {CHECKPOINT_PREFIX + name: _without_memory(tensors[key]) for key, name in names.items()}
    others = {key: value for key, value in tensors.items() if key not in names}
    packed = any(isinstance(value, NFTensor) for value in others.values())
    shapes = file.shapes()
    warnings = text_encoder_warnings(detect(shapes), shapes)
    load_parts = comfy.sd.load_state_dict_guess_config
    result = load_parts(
        model | _for_host(others),
        output_model=False,
        output_clip=not warnings,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        te_model_options={"custom_operations": NFOps} if packed else {},
        **(_static(load_parts) if disable_dynamic or packed else {}),
    )
    clip, vae = result[1:3] if result else (None, None)
    if clip is None or (packed and not _is_filled(clip)):
        found = " and ".join(encoder.name for encoder in find_text_encoders(shapes))
        has = f"its text encoders ({found}) are not all that its UNet reads" if found else "it has no text encoders"
        reason = warnings[0] if warnings else f"{has}, so load CLIP from another file"
        return MissingCLIP(f"{file.path.name}: {reason}, with Load NFQ CLIP or DualCLIPLoader"), vae
    if packed:
        adopt_clip(clip)
        bits = {key: value for key, value in file.facts.settings.items() if key == TEXT_ENCODERS_SETTING}
        clip.patcher.set_attachments(PROVENANCE, Provenance(bits, file.facts.source, os.path.basename(file.path)))
    return clip, vae


def load_clip(
    paths: Sequence[str], kind: str, disable_dynamic: bool = False, progress: NodeProgress | None = None
) -> Any:
    """Load text encoders as one CLIP.

    Args:
        paths: a file for each text encoder.
        kind: what the host's loaders call its type, such as "sdxl".
        disable_dynamic: whether the host wants a CLIP without DynamicVRAM; packed ones never use it.
        progress: see `NodeProgress`.

    Raises:
        NFQError: a file is missing, damaged, foreign or newer, or no text encoder, or the files do not fit the type.
    """
    if kind == "sdxl" and len(paths) != 2:
        raise NFQError("type sdxl needs the files of CLIP-L and OpenCLIP-G; choose them in clip_name and clip_name2")
    states, found = [], []
    facts: list[Facts] = []
    for path in paths:
        with NFQFile(path) as file:
            found += [encoder.name for encoder in text_encoders_of(file)]
            shapes = file.shapes()
            if any(each.kind == "diffusion model" for each in find_components(detect(shapes), shapes)):
                raise UnsupportedFileError(
                    f"{path} is a whole checkpoint; it belongs in models/{CHECKPOINTS}, where Load NFQ Checkpoint "
                    "finds it"
                )
            tensors = load_tensors(file, progress=progress or NodeProgress())
            states.append(_for_host(tensors))
            facts.append(file.facts)
    load_parts = comfy.sd.load_text_encoder_state_dicts
    misfit = f"type {kind} does not fit {' and '.join(found)}; choose the type of your diffusion model, or other files"
    try:
        clip = load_parts(
            states,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options={"custom_operations": NFOps},
            **_static(load_parts),
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise NFQError(misfit) from None
    if not _is_filled(clip):
        raise NFQError(misfit)
    adopt_clip(clip)
    clip.patcher.set_attachments(PROVENANCE, _common_provenance(facts, os.path.basename(paths[0])))
    clip.patcher.cached_patcher_init = (load_clip_files_patcher, (list(paths), kind))
    return clip


def _common_provenance(facts: Sequence[Facts], name: str) -> Provenance:
    """Where a CLIP of several files came from: the settings on which they agree, and all their sources.

    Args:
        facts: those of the files.
        name: the file that the nodes show.
    """
    first, *others = facts
    settings = dict(item for item in first.settings.items() if all(item in each.settings.items() for each in others))
    source = first.source
    if any(other.source != source for other in others):
        source = Source(" and ".join(dict.fromkeys(each.source.name for each in facts)))
    return Provenance(settings, source, name)


def load_clip_files_patcher(paths: Sequence[str], kind: str, disable_dynamic: bool = False) -> Any:
    """Load the patcher of `load_clip` again, for a second device."""
    return load_clip(paths, kind, disable_dynamic).patcher


def _is_filled(clip: Any) -> bool:
    """Whether each text encoder of a CLIP that was made with our layers got weights from a file."""
    encoders = (each for each in clip.cond_stage_model.children() if isinstance(each, comfy.sd1_clip.SDClipModel))
    return all(any(layer.is_filled for layer in each.modules() if isinstance(layer, NFLayer)) for each in encoders)


def _without_memory(tensor: NFTensor | torch.Tensor) -> torch.Tensor:
    """A weight's shape and dtype without its data; a tensor of one dimension as it is."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() < 2:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _for_host(tensors: StateDict) -> dict[str, torch.Tensor]:
    """Tensors as the host takes them in a state dict."""
    return {key: LoadedTensor.of(value) if isinstance(value, NFTensor) else value for key, value in tensors.items()}


def _static(load: Callable) -> dict[str, bool]:
    """The argument that makes a host's loader return a patcher without DynamicVRAM, on hosts that have DynamicVRAM."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}


def _model_names(file: NFQFile) -> tuple[dict[str, str], list[str]]:
    """The host's names of a file's diffusion model by key, and the keys of all tensors that the host needs for it.

    Raises:
        UnsupportedFileError: the file has no complete diffusion model.
    """
    names = host_names(file)
    return names, [*names, *(key for key in MARKERS if key in file.kept and key not in names)]


def _memory_mode(memory: str, file: NFQFile, names: Mapping[str, str]) -> str:
    """Choose between "packed" and "resident" for the weights in `names`, and log the choice."""
    management = comfy.model_management
    device, cpu = management.get_torch_device(), torch.device("cpu")
    weights = sum(entry.weights for key, entry in file.quantized.items() if key in names)
    dtype = management.unet_dtype(model_params=weights, weight_dtype=torch.float16)
    free = min(management.get_free_memory(device), management.get_free_memory(cpu))
    mode, reason = choose_memory_mode(memory, weights * dtype.itemsize, needed_bytes(file, names)[1], free)
    log.info("%s is loaded %s: %s", file.path.name, mode, reason)
    return mode


def build_model(tensors: StateDict, file: NFQFile, mode: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Make a MODEL from a diffusion model's tensors.

    Args:
        tensors: its tensors by the host's names, and markers; quantised weights are dense if `mode` is "resident".
        file: the file that the tensors come from.
        mode: "packed", or "resident" for a stock MODEL.
        disable_dynamic: whether a resident MODEL must not use DynamicVRAM.

    Raises:
        UnsupportedFileError: a tensor is missing or has the wrong shape, or the host does not know the architecture.
    """
    load_state_dict = comfy.sd.load_diffusion_model_state_dict
    options: dict[str, Any] = {} if mode == "resident" else {"custom_operations": NFOps}
    if mode == "packed" and comfy.model_management.unet_dtype(weight_dtype=torch.float16).itemsize == 1:
        # The host's fp8 flags are for dense models: here they would only round the few tensors that are not quantised.
        dtypes = Counter(value.dtype for value in tensors.values() if isinstance(value, NFTensor))
        options["dtype"] = dtypes.most_common(1)[0][0] if dtypes else torch.float16
    static = _static(load_state_dict) if mode == "packed" or disable_dynamic else {}
    # The weights here are no longer in the form that this entry describes.
    metadata = {key: text for key, text in file.facts.source.metadata.items() if key != "_quantization_metadata"}
    try:
        with listening(shown=True) as heard:
            patcher = load_state_dict(_for_host(tensors), model_options=options, metadata=metadata or None, **static)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        mismatch = str(error).partition("size mismatch")[2].partition("\n")[0]
        raise UnsupportedFileError(
            f"{file.path} has a tensor of the wrong shape{mismatch} Quantise the model again from its original file"
        ) from None
    except KeyError as error:
        # The host recognises a model by some names and reads the sizes of others.
        name = str(error.args[0])
        if "." not in name or name in tensors:
            raise
        raise _lacking(file, name) from None
    if patcher is None:
        raise _unknown(file)
    missing = _missing(patcher.model.diffusion_model, heard.warnings)
    if missing:
        raise _lacking(file, missing[0])
    if mode == "packed":
        adopt(patcher)
        warm_up(patcher.load_device, patcher.model.manual_cast_dtype or patcher.model.get_dtype())
    facts = file.facts
    made = Provenance(of_unet(facts.settings), facts.source, os.path.basename(file.path), facts.expected)
    patcher.set_attachments(PROVENANCE, made)
    patcher.cached_patcher_init = (load_unet, (str(file.path), mode))
    return patcher


def _missing(network: torch.nn.Module, warnings: Sequence[str]) -> list[str]:
    """Names of the parameters that a file did not fill, sorted.

    Args:
        network: the diffusion model.
        warnings: what the host logged when it loaded the model. It names what is missing, but goes on.
    """
    reported = {name for line in warnings if line.startswith("unet missing") for name in re.findall(r"'([^']+)'", line)}
    return sorted(name for name, weight in network.named_parameters() if weight.is_meta or name in reported)


def _lacking(file: NFQFile, name: str) -> UnsupportedFileError:
    return UnsupportedFileError(f"{file.path} lacks tensor {name!r}; download the original model again and quantise it")


def _unknown(file: NFQFile) -> UnsupportedFileError:
    shapes = file.shapes()
    kind = kind_name({key: Entry("", shape, 0, 0) for key, shape in shapes.items()}, None)
    if kind in NO_MODELS:
        return UnsupportedFileError(
            f"{file.path} is a {kind}, not a diffusion model; use it as it was before quantising"
        )
    name = model_name(detect(shapes), shapes)
    architecture = "its architecture" if name == UNKNOWN else name
    return UnsupportedFileError(
        f"{file.path}: this ComfyUI does not know {architecture}; update ComfyUI, or choose another model"
    )
