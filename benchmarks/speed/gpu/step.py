"""SDXL's UNet in diffusers on a GPU: a step (packed, with LoRAs, compiled, other layers); quantising and loading."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from samples import unet_config
from torch import nn

import nfq_core
from nfq_core import NFTensor
from nfq_core.layers import PackedLinear, assign_state, dense_layers, packed_layers
from nfq_core.layers.low_rank import LowRank
from nfq_core.models.unet_keys import UNetArchitecture, tensor_shapes
from nfq_core.planning.settings import Settings

from ...shared import milliseconds, synchronize, timed, unavailable
from .part import BY_LEVELS, Part, Q4Layer, State, added_bytes, nf4_layer, random_state

BATCH = 2  # With and without the prompt, for CFG
SIDE, SMALL_SIDE = 128, 16  # Sides of the latents; SDXL draws 1024 pixels from 128
TOKENS, LORA_RANK = 77, 32
LORA_CHANGE = 0.01  # Root mean square of a LoRA's change of a weight, relative to the weight's
ONE_LORA, FOUR_LORAS = "packed, 1 LoRA", "packed, 4 LoRAs"
SAME_WEIGHTS = ("fp16", "packed", ONE_LORA, FOUR_LORAS, "resident")
ROUNDS, FILE_ROUNDS = 12, 3


def dense_state(state: State) -> dict[str, torch.Tensor]:
    """A UNet's tensors in fp16: the same numbers, because a GPU's clock depends on them."""
    return {name: tensor.dequantize() if isinstance(tensor, NFTensor) else tensor for name, tensor in state.items()}


def empty_unet(architecture: UNetArchitecture) -> nn.Module:
    """diffusers' UNet without memory; AssertionError if its tensors differ from those in `unet_keys`."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(architecture))
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    if shapes != tensor_shapes(architecture, "diffusers"):
        raise AssertionError("diffusers' UNet has other tensors than unet_keys says")
    return unet


def make_unet(architecture: UNetArchitecture, state: State) -> nn.Module:
    """diffusers' UNet with the tensors of `state`, which it shares; packed weights get packed layers."""
    unet = empty_unet(architecture)
    assign_state(unet, state)
    return unet.eval().requires_grad_(False)


def add_low_rank(unet: nn.Module, count: int) -> nn.Module:
    """Put `count` LoRAs of random factors on every linear layer of the transformers; returns the UNet."""
    for name, layer in packed_layers(unet).items():
        if not isinstance(layer, PackedLinear) or ".attentions." not in name:
            continue
        rows, columns = layer.weight_shape
        coefficient, device = LORA_CHANGE * (columns * LORA_RANK) ** -0.5, layer.buffer.device
        pairs = [(torch.randn(rows, LORA_RANK), torch.randn(LORA_RANK, columns)) for _ in range(count)]
        layer.low_rank = LowRank.sum([(*pair, coefficient) for pair in pairs], device=device, dtype=torch.float16)
    return unet


def step_of(part: Part, unet: nn.Module) -> Callable[[], torch.Tensor]:
    """One call of a UNet, always on the same inputs: two latents, tokens, added conditions."""
    generator = torch.Generator(part.device).manual_seed(1)
    config, side = unet.config, SMALL_SIDE if part.small else SIDE

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, device=part.device).half()

    latents = made(config.in_channels, side, side)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "timestep": torch.tensor(601, device=part.device),
        "encoder_hidden_states": made(TOKENS, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": made(pooled), "time_ids": made(6)},
    }

    @torch.no_grad()
    def step() -> torch.Tensor:
        return unet(latents, **inputs, return_dict=False)[0]

    return step


def own_bytes(unet: nn.Module) -> int:
    """Bytes of a model's tensors, with bitsandbytes' scales, which are not among its parameters."""
    states = [state for tensor in unet.parameters() if (state := getattr(tensor, "quant_state", None)) is not None]
    return sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers(), *(state.absmax for state in states)))


def contestants(part: Part) -> dict[str, Callable[[], nn.Module]]:
    """The makers of the UNets by name; SAME_WEIGHTS share their weights."""
    architecture, state = part.architecture, random_state(part)

    def packed(loras: int = 0) -> nn.Module:
        return add_low_rank(make_unet(architecture, state), loras) if loras else make_unet(architecture, state)

    def resident() -> nn.Module:
        unet = packed()
        dense_layers(unet)
        return unet

    def replaced(kinds: tuple[type, ...], replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
        unet = make_unet(architecture, dense_state(state))
        for name in [name for name, tensor in state.items() if isinstance(tensor, NFTensor)]:
            path, _, attribute = name.removesuffix(".weight").rpartition(".")
            parent = unet.get_submodule(path)
            if isinstance(layer := getattr(parent, attribute), kinds):
                setattr(parent, attribute, replace(layer))
        return unet

    balanced = Settings()
    makers = {
        "fp16": lambda: make_unet(architecture, dense_state(state)),
        "packed": packed,
        ONE_LORA: lambda: packed(1),
        FOUR_LORAS: lambda: packed(4),
        "resident": resident,
        "packed, preset balanced": lambda: make_unet(architecture, random_state(part, balanced)),
        "Q4_0 in torch": lambda: replaced((nn.Linear, nn.Conv2d), Q4Layer),
        "bitsandbytes NF4": lambda: replaced((nn.Linear,), nf4_layer),
    }
    if reason := unavailable("bitsandbytes"):
        part.skipped["bitsandbytes NF4"] = reason
        del makers["bitsandbytes NF4"]
    return makers


def step(part: Part) -> None:
    """All contestants in turns; the memory of each by itself."""
    unets = {name: part.attempt(name, make) for name, make in contestants(part).items()}
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    found = part.results["contestants"] = {}
    for name, unet in ((name, unet) for name, unet in unets.items() if unet is not None):
        call = step_of(part, unet)
        if part.attempt(name, lambda call=call: _finite(call())) is not None:
            steps[name] = call
            found[name] = {"own_bytes": own_bytes(unet), **_step_bytes(part, call)}
    part.attempt("difference", lambda: _compare(part, steps))
    _add_times(part, steps, found)


def _finite(result: torch.Tensor) -> torch.Tensor:
    if not result.isfinite().all():
        raise AssertionError("the step's result is not finite")
    return result


def _step_bytes(part: Part, call: Callable[[], object]) -> dict[str, int]:
    return {"step_bytes": added_bytes(part.device, call)} if part.on_gpu else {}


def _add_times(part: Part, steps: Mapping[str, Callable[[], object]], found: dict[str, dict]) -> None:
    for name, ms in milliseconds(steps, part.device, 2 if part.small else ROUNDS).items():
        found[name]["ms"] = ms


def _compare(part: Part, steps: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    """Largest differences from the resident model's result: packed has none, LoRAs change it."""
    resident = steps["resident"]().float()
    found = {name: (steps[name]().float() - resident).abs().amax().item() for name in SAME_WEIGHTS}
    part.results["difference"] = found
    if found["packed"] > 0 or not (found[ONE_LORA] > 0 and found[FOUR_LORAS] > 0):
        raise AssertionError(f"packed differs from the resident model, or a LoRA changes nothing: {found}")


def compiled(part: Part) -> None:
    """fp16 and packed with their transformer blocks under torch.compile."""
    state = random_state(part)
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    found = part.results["compiled"] = {}
    for name, make in {"fp16": dense_state, "packed": lambda state: state}.items():
        unet = make_unet(part.architecture, make(state))
        for module in unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.compile(backend="inductor" if part.on_gpu else "eager", fullgraph=True)
        steps[name] = step_of(part, unet)
        first_call = timed(lambda call=steps[name]: _finite(call()))
        found[name] = {"first_call_s": first_call, **_step_bytes(part, steps[name])}
    _add_times(part, steps, found)


def files(part: Part) -> None:
    """Quantise SDXL's layers on the device, write both files (6.5 GB), load each from the page cache."""
    weights, packed = dense_state(random_state(part)), {}
    quantise = {"quantise": lambda: packed.update(nfq_core.quantize_state_dict(weights, 16))}
    part.results |= milliseconds(quantise, part.device, FILE_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        packed_file, dense_file = Path(folder) / "unet.nfq.safetensors", Path(folder) / "unet.safetensors"
        nfq_core.save(packed, packed_file, settings=BY_LEVELS.as_dict())
        save_file({name: weight.cpu() for name, weight in weights.items()}, dense_file)
        weights.clear()
        packed.clear()
        works = {
            "NFQ": lambda: (nfq_core.load(packed_file, device=part.device), synchronize(part.device)),
            "fp16, safetensors": lambda: (load_file(dense_file, device=str(part.device)), synchronize(part.device)),
        }
        part.results["first_load_s"] = {name: timed(work) for name, work in works.items()}
        part.results["load"] = milliseconds(works, part.device, FILE_ROUNDS)
