"""SDXL's UNet in diffusers with packed, dense, offloaded and other programs' layers, for the steps of `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod

import torch
from models import packed_unet
from samples import unet_config
from torch import nn

from nfq_core import NFTensor
from nfq_core.layers import PackedLinear, assign_state, dense_layers, packed_layers
from nfq_core.layers.low_rank import LowRank
from nfq_core.models.unet_keys import UNetArchitecture, tensor_shapes
from nfq_core.planning.settings import Formats, Settings

BATCH = 2  # With and without the prompt, for CFG
TOKENS, LORA_RANK = 77, 32
LORA_CHANGE = 0.01  # Root mean square of a LoRA's change of a weight, relative to the weight's
Q4_0_BLOCK = 32
BY_LEVELS = Settings(Formats())  # 16 levels, 32 for convolutions

State = Mapping[str, NFTensor | torch.Tensor]


@lru_cache(2)
def random_state(architecture: UNetArchitecture, settings: Settings = BY_LEVELS) -> State:
    """A UNet's tensors on the CPU, quantised by the usual rules, with random codes."""
    return packed_unet(architecture, "diffusers", settings)


def empty_unet(architecture: UNetArchitecture) -> nn.Module:
    """diffusers' UNet without memory; AssertionError if its tensors differ from those in `unet_keys`."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(architecture))
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    if shapes != tensor_shapes(architecture, "diffusers"):
        raise AssertionError("diffusers' UNet has other tensors than unet_keys says")
    return unet


def make_unet(
    architecture: UNetArchitecture, device: torch.device, settings: Settings = BY_LEVELS, dense: bool = False
) -> nn.Module:
    """diffusers' UNet on a device, with packed layers or, in fp16, the same weights: clocks depend on the numbers."""
    unet = empty_unet(architecture)
    state = {name: tensor.to(device) for name, tensor in random_state(architecture, settings).items()}
    for name, tensor in state.items():
        if dense and isinstance(tensor, NFTensor):
            state[name] = tensor.dequantize()
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


def offload(unet: nn.Module, device: torch.device) -> nn.Module:
    """Keep the tensors of Linear and Conv2d layers in RAM and copy them to the device for each call; returns the UNet.

    Hosts do this with layers that do not fit into VRAM. The memory in RAM is pinned for a CUDA device.
    """

    def keep(layer: nn.Module) -> None:
        tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        kept = [tensor.data.cpu() for tensor in tensors]
        if device.type == "cuda":
            kept = [tensor.pin_memory() for tensor in kept]

        def put(there: bool) -> None:
            for tensor, own in zip(tensors, kept, strict=True):
                tensor.data = own.to(device, non_blocking=True) if there else own

        put(False)
        layer.register_forward_pre_hook(lambda *_: put(True))
        layer.register_forward_hook(lambda *_: put(False))

    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            keep(layer)
    return unet


def contestants(architecture: UNetArchitecture, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """The makers of the UNets by name; NFQ's and the dense ones share their weights, except the preset's."""

    def made(loras: int = 0, dense: bool = False) -> nn.Module:
        torch.manual_seed(0)
        unet = make_unet(architecture, device, dense=dense)
        return add_low_rank(unet, loras) if loras else unet

    def resident() -> nn.Module:
        unet = made()
        dense_layers(unet)
        return unet

    def replaced(kinds: tuple[type, ...], replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
        unet = made(dense=True)
        for name in [name for name, tensor in random_state(architecture).items() if isinstance(tensor, NFTensor)]:
            path, _, attribute = name.removesuffix(".weight").rpartition(".")
            parent = unet.get_submodule(path)
            if isinstance(layer := getattr(parent, attribute), kinds):
                setattr(parent, attribute, replace(layer))
        return unet

    return {
        "fp16": lambda: made(dense=True),
        "packed": made,
        "resident": resident,
        "packed, 1 LoRA": lambda: made(1),
        "packed, 4 LoRAs": lambda: made(4),
        "fp16, offloaded": lambda: offload(made(dense=True), device),
        "packed, offloaded": lambda: offload(made(), device),
        "packed, offloaded, 1 LoRA": lambda: offload(made(1), device),
        "packed, default preset": lambda: make_unet(architecture, device, Settings()),
        "bitsandbytes NF4": lambda: replaced((nn.Linear,), nf4_layer),
        "Q4_0 in torch": lambda: replaced((nn.Linear, nn.Conv2d), Q4Layer),
    }


def step_of(unet: nn.Module, device: torch.device, side: int) -> Callable[[], torch.Tensor]:
    """One call of a UNet, always on the same inputs: two latents of a side, tokens, added conditions."""
    generator = torch.Generator(device).manual_seed(1)
    config = unet.config

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, device=device).half()

    latents = made(config.in_channels, side, side)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "timestep": torch.tensor(601, device=device),
        "encoder_hidden_states": made(TOKENS, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": made(pooled), "time_ids": made(6)},
    }

    @torch.no_grad()
    def step() -> torch.Tensor:
        return unet(latents, **inputs, return_dict=False)[0]

    return step


def own_bytes(unet: nn.Module, device: torch.device) -> int:
    """Bytes of a model's tensors on a device, with bitsandbytes' scales, which are not among its parameters."""
    states = [state for tensor in unet.parameters() if (state := getattr(tensor, "quant_state", None)) is not None]
    tensors = (*unet.parameters(), *unet.buffers(), *(state.absmax for state in states))
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)


def nf4_layer(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' 4-bit layer with the weight of a dense fp16 one."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    packed = Linear4bit(*sizes, torch.float16, quant_type="nf4", device="meta")
    packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(layer.weight.device)
    packed.bias = layer.bias
    return packed


def random_q4_0(shape: Sequence[int], std: float, device: torch.device) -> torch.Tensor:
    """Q4_0 blocks of random codes with about this standard deviation: uint8 of shape (blocks, 18)."""
    size = -(-prod(shape) // Q4_0_BLOCK), 2 + Q4_0_BLOCK // 2
    data = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    # Codes are -8 … 7, all equally likely: a variance of 21.25.
    data[:, :2] = torch.full((1,), std / 21.25**0.5, dtype=torch.float16, device=device).view(torch.uint8)
    return data


def dequantize_q4_0(data: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Q4_0 blocks as fp16 of `shape`; as in GGUF plugins, each call makes the shifts anew."""
    scales, codes = data.split([2, Q4_0_BLOCK // 2], dim=1)
    shifts = torch.tensor([0, 4], device=data.device, dtype=torch.uint8).view(1, 2, 1)
    digits = (codes.unsqueeze(1) >> shifts) & 15
    values = digits.view(len(data), Q4_0_BLOCK).to(torch.int8) - 8
    return (scales.view(torch.float16) * values).view(-1)[: prod(shape)].view(tuple(shape))


class Q4Layer(nn.Module):
    """A Linear or Conv2d layer that dequantises its weight from random Q4_0 blocks at every call."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.shape, self.bias = tuple(layer.weight.shape), layer.bias
        self.convolution = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        blocks = random_q4_0(self.shape, prod(self.shape[1:]) ** -0.5, layer.weight.device)
        self.register_buffer("blocks", blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result with the dequantised weight."""
        weight = dequantize_q4_0(self.blocks, self.shape)
        if self.convolution is None:
            return nn.functional.linear(x, weight, self.bias)
        return nn.functional.conv2d(x, weight, self.bias, *self.convolution)
