"""A whole sampling step of SDXL's UNet on a GPU, in diffusers: packed, with LoRAs, resident, beside fp16 and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from time import perf_counter

import torch
from torch import nn

from nfq_core import NFTensor
from nfq_core.layers import PackedLinear, assign_state, dense_layers, packed_layers
from nfq_core.layers.low_rank import LowRank
from nfq_core.models.unet_keys import UNetArchitecture, tensor_shapes
from nfq_core.planning.allocation import PRESETS
from nfq_core.planning.policy import Settings

from .part import SMALL, Part, added_bytes, fan_in_std, graphed, measure, random_unet
from .rivals import nf4_layer, q4_0_layer, without_bitsandbytes

SDXL_CONFIG = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    # diffusers takes the number of heads here: heads are 64 wide.
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""What SDXL base's `unet/config.json` says, where diffusers' own defaults are others."""

SMALL_CONFIG = SDXL_CONFIG | {
    "sample_size": 16,
    "down_block_types": SDXL_CONFIG["down_block_types"][:2],
    "up_block_types": SDXL_CONFIG["up_block_types"][1:],
    "block_out_channels": SMALL.channels,
    "transformer_layers_per_block": (1, 1),
    "cross_attention_dim": SMALL.context_width,
    "attention_head_dim": (1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": SMALL.added_width,
}

BATCH = 2
"""With and without the prompt, for CFG."""

TOKENS = 77
LORA_RANK = 32

LORA_CHANGE = 0.01
"""What a LoRA adds to a weight, in terms of its root mean square."""

VISIBLE = 0.01
"""The least difference that LoRAs make, in terms of the result's standard deviation."""

BALANCED = "packed, preset balanced"

ROUNDS = 12
COMPILED_ROUNDS = 8

AT_MOST = {"packed": 1.03, "packed, 1 LoRA": 1.05, "packed, 4 LoRAs": 1.05, "resident": 1.01}
"""What a step may take in terms of fp16's."""

FULL_COMPILE_SECONDS = 150
"""Time that is left at least where a whole UNet is compiled, as long as none has been."""

State = Mapping[str, NFTensor | torch.Tensor]


def empty_unet(architecture: UNetArchitecture) -> nn.Module:
    """diffusers' UNet without memory; AssertionError where its tensors are others than `unet_keys` says."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SMALL_CONFIG if architecture is SMALL else SDXL_CONFIG))
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    if shapes != tensor_shapes(architecture, "diffusers"):
        raise AssertionError("diffusers' UNet has other tensors than unet_keys says")
    return unet


def make_unet(architecture: UNetArchitecture, state: State) -> nn.Module:
    """diffusers' UNet over the tensors of `state`, which it shares; packed weights in packed layers."""
    unet = empty_unet(architecture)
    assign_state(unet, state)
    return unet.eval().requires_grad_(False)


def dense_state(state: State) -> dict[str, torch.Tensor]:
    """A UNet's tensors in fp16: the same numbers, for a GPU's clock depends on them."""
    return {name: tensor.dequantize() if isinstance(tensor, NFTensor) else tensor for name, tensor in state.items()}


def add_low_rank(unet: nn.Module, count: int, generator: torch.Generator) -> nn.Module:
    """Put `count` LoRAs of random factors on every linear layer of the transformers; returns the UNet."""
    device = generator.device
    for name, layer in packed_layers(unet).items():
        if not isinstance(layer, PackedLinear) or ".attentions." not in name:
            continue
        rows, columns = layer.weight_shape

        def factor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        coefficient = LORA_CHANGE * fan_in_std(layer.weight_shape) / LORA_RANK**0.5
        parts = [(factor(rows, LORA_RANK), factor(LORA_RANK, columns), coefficient) for _ in range(count)]
        layer.low_rank = LowRank.sum(parts, device=device, dtype=torch.float16)
    return unet


def step_of(part: Part, unet: nn.Module) -> Callable[[], torch.Tensor]:
    """One call of a UNet: two latents at 1024 × 1024 pixels, tokens, added conditions, always the same."""
    generator = torch.Generator(part.device).manual_seed(1)
    config = unet.config

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, device=part.device).half()

    latents = made(config.in_channels, config.sample_size, config.sample_size)
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
    """Bytes of a model's tensors, those of bitsandbytes' scales included, which lie beside its parameters."""
    states = [state for tensor in unet.parameters() if (state := getattr(tensor, "quant_state", None)) is not None]
    return sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers(), *(state.absmax for state in states)))


def without_diffusers(part: Part) -> bool:
    """Whether diffusers is missing, which is then noted."""
    missing = find_spec("diffusers") is None
    if missing:
        part.skip("everything", "diffusers is not installed")
    return missing


def step(part: Part) -> None:
    """All contestants in turns, as they are and as CUDA graphs; memory of each as if it were alone."""
    if without_diffusers(part):
        return
    unets = _contestants(part)
    steps = {name: step_of(part, unet) for name, unet in unets.items()}
    contestants: dict[str, dict] = {}
    for name, call in list(steps.items()):
        if part.attempt(name, lambda call=call: _finite(call())) is None:
            del steps[name]
            continue
        contestants[name] = {"own_bytes": own_bytes(unets[name])}
        if part.on_gpu:
            contestants[name]["step_bytes"] = added_bytes(part.device, call)
        part.note(contestants=contestants)
    if not part.on_gpu:
        part.skip("peak memory", "counted on GPUs only")
    difference = part.attempt("difference", lambda: _differences(steps))
    if difference:
        part.note(difference=difference)
    if difference and "packed" in difference:
        part.target("packed: the largest difference from the resident model's result", difference["packed"], 0, "")
    for name in ("packed, 1 LoRA", "packed, 4 LoRAs"):
        if difference and name in difference and difference[name] < VISIBLE * difference["standard_deviation"]:
            part.fail(name, AssertionError(f"changes the result by {difference[name]:.2g} only"))
    for name, reading in measure(part, steps, 2 if part.small else ROUNDS).items():
        contestants[name] |= reading
    part.note(contestants=contestants)
    _targets(part, contestants, "a step beside fp16's")
    if not part.on_gpu:
        part.skip("CUDA graphs", "there are none on a CPU")
        return
    pool, replays = torch.cuda.graph_pool_handle(), {}
    for name in ("fp16", *AT_MOST, BALANCED):
        replay = name in steps and part.attempt(
            f"{name} as a graph", lambda name=name: graphed(part.device, steps[name], pool)
        )
        if replay:
            replays[name] = replay
    graphs = measure(part, replays, ROUNDS)
    part.note(graphs=graphs)
    _targets(part, graphs, "a step as a CUDA graph beside fp16's")


def _finite(result: torch.Tensor) -> torch.Tensor:
    if not result.isfinite().all():
        raise AssertionError("the step's result is not finite")
    return result


def _contestants(part: Part) -> dict[str, nn.Module]:
    """The UNets that take part, by name; all but the rivals and the preset compute with the same weights."""
    architecture = part.architecture
    generator = torch.Generator(part.device).manual_seed(0)
    state = random_unet(architecture, generator)

    def resident() -> nn.Module:
        unet = make_unet(architecture, state)
        dense_layers(unet)
        return unet

    def replaced(kinds: tuple[type, ...], replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
        unet = make_unet(architecture, dense_state(state))
        for name in [name for name, tensor in state.items() if isinstance(tensor, NFTensor)]:
            path, _, attribute = name.removesuffix(".weight").rpartition(".")
            parent = unet.get_submodule(path)
            layer = getattr(parent, attribute)
            if isinstance(layer, kinds):
                setattr(parent, attribute, replace(layer))
        return unet

    def q4_0(layer: nn.Module) -> nn.Module:
        return q4_0_layer(layer, generator, fan_in_std(layer.weight.shape))

    balanced = Settings(target_bpw=PRESETS["balanced"])
    makers = {
        "fp16": lambda: make_unet(architecture, dense_state(state)),
        "packed": lambda: make_unet(architecture, state),
        "packed, 1 LoRA": lambda: add_low_rank(make_unet(architecture, state), 1, generator),
        "packed, 4 LoRAs": lambda: add_low_rank(make_unet(architecture, state), 4, generator),
        "resident": resident,
        BALANCED: lambda: make_unet(architecture, random_unet(architecture, generator, balanced)),
        "Q4_0 in torch": lambda: replaced((nn.Linear, nn.Conv2d), q4_0),
    }
    reason = without_bitsandbytes()
    if reason:
        part.skip("bitsandbytes NF4", reason)
    else:
        makers["bitsandbytes NF4"] = lambda: replaced((nn.Linear,), lambda layer: nf4_layer(layer, part.device))
    made = {name: part.attempt(name, make) for name, make in makers.items()}
    return {name: unet for name, unet in made.items() if unet is not None}


def _differences(steps: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """The largest difference of a step's result from the resident model's, and that model's own spread."""
    resident = steps["resident"]().float()
    names = ("packed", "fp16", "packed, 1 LoRA", "packed, 4 LoRAs")
    found = {name: (steps[name]().float() - resident).abs().amax().item() for name in names if name in steps}
    return found | {"standard_deviation": resident.std().item()}


def _targets(part: Part, found: Mapping[str, dict], what: str) -> None:
    for name, at_most in AT_MOST.items():
        if name in found and "fp16" in found:
            part.target(f"{name}: {what}", found[name]["ms"]["median"] / found["fp16"]["ms"]["median"], at_most)


def compiled(part: Part) -> None:
    """fp16 and packed under torch.compile: the repeated blocks alone, then, where time is left, the whole UNet."""
    if without_diffusers(part):
        return
    backend = "inductor" if part.on_gpu else "eager"
    state = random_unet(part.architecture, torch.Generator(part.device).manual_seed(0))
    states = {"fp16": lambda: dense_state(state), "packed": lambda: state}

    def regional(unet: nn.Module) -> None:
        for module in unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.compile(backend=backend, fullgraph=True)

    ways = {"transformer blocks": regional, "whole UNet": lambda unet: unet.compile(backend=backend)}
    found: dict[str, dict] = {way: {} for way in ways}
    for way, compile_unet in ways.items():
        torch._dynamo.reset()
        steps, contestants = {}, found[way]
        needed = FULL_COMPILE_SECONDS if way == "whole UNet" and part.on_gpu else 0
        for name, weights in states.items():
            if part.left() < needed:
                part.skip(f"{way}: {name}", f"{part.left():.0f} s are left, it may take {needed:.0f}")
                continue
            made = part.attempt(f"{way}: {name}", partial(_first_call, part, weights, compile_unet))
            if made:
                steps[name], contestants[name] = made
                needed = contestants[name]["first_call_s"]
                part.note(compiled=found)
        for name, reading in measure(part, steps, 2 if part.small else COMPILED_ROUNDS).items():
            contestants[name] |= reading
        part.note(compiled=found)
        _targets(part, contestants, f"a step, {way} compiled, beside fp16's")
    if not part.on_gpu:
        part.skip("peak memory", "counted on GPUs only")


def _first_call(
    part: Part, weights: Callable[[], State], compile_unet: Callable[[nn.Module], None]
) -> tuple[Callable[[], torch.Tensor], dict[str, float]]:
    """The step of a compiled UNet; the seconds that its first call took, and on a GPU what memory another one takes."""
    unet = make_unet(part.architecture, weights())
    compile_unet(unet)
    step = step_of(part, unet)
    started = perf_counter()
    _finite(step())
    told = {"first_call_s": perf_counter() - started}
    return step, told | ({"step_bytes": added_bytes(part.device, step)} if part.on_gpu else {})
