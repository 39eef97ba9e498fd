"""Which of PEFT's adapters work beside packed layers, by whichever door they are added, and how others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_diffusers_doors import close, lora, noise, pack, small_unet

from nfq_core import NFQError
from nfq_core.diffusers.lora import SUPPORTED_METHODS, adapter_error

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

LAYERS = {"Linear": "to_q", "Conv2d": "conv1", "both": "(.*to_q|.*conv1)"}
METHODS = {
    "lora": lambda target: peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False),
    "ia3": lambda target: peft.IA3Config(target_modules=target, feedforward_modules=[], init_ia3_weights=False),
    "ia3 feed-forward": lambda target: peft.IA3Config(
        target_modules=target, feedforward_modules=target, init_ia3_weights=False
    ),
    "oft": lambda target: peft.OFTConfig(r=0, oft_block_size=8, target_modules=target, init_weights=False),
    "boft": lambda target: peft.BOFTConfig(boft_block_size=4, target_modules=target, init_weights=False),
}
REFUSED = [("ia3 feed-forward", "Conv2d"), ("boft", "Conv2d"), ("ia3 feed-forward", "both"), ("boft", "both")]
"""By PEFT 0.21; older versions read the weight in more cases, which must then be refused."""
DOORS = {
    "add_adapter": lambda unet, config: unet.add_adapter(config),
    "get_peft_model": lambda unet, config: peft.get_peft_model(unet, config),
    "inject": lambda unet, config: peft.inject_adapter_in_model(config, unet),
}
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return pack(small_unet(), tmp_path_factory.mktemp("unet"))


@pytest.fixture
def twins(unet: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A packed model, and a stock one of the same weights."""
    return copy.deepcopy(unet), copy.deepcopy(unet).dequantize()


def has_adapters(unet: torch.nn.Module) -> bool:
    return any("base_layer" in name for name in unet.state_dict())


def test_every_method_is_listed() -> None:
    assert {name.split()[0] for name in METHODS} == set(SUPPORTED_METHODS)


@pytest.mark.parametrize(
    ("kind", "door"),
    [("Linear", "add_adapter"), ("Conv2d", "add_adapter"), ("both", "get_peft_model"), ("both", "inject")],
)
@pytest.mark.parametrize("method", METHODS)
def test_methods(twins: tuple, method: str, kind: str, door: str) -> None:
    plain, results = noise(twins[0]), []
    target = LAYERS[kind] if kind == "both" else [LAYERS[kind]]
    try:
        for model in twins:
            torch.manual_seed(0)
            DOORS[door](model, METHODS[method](target))
            results.append(noise(model))
    except NFQError as error:
        assert "needs dense weights, and these are packed; dequantize the model first" in str(error)
        assert f"{method.split()[0].upper()} on '" in str(error) and not results
        assert torch.equal(noise(twins[0]), plain) and not has_adapters(twins[0])
        # What was refused is forgotten: the same name serves again.
        twins[0].add_adapter(lora("to_q", "conv1"))
        assert not close(noise(twins[0]), plain)
    assert not results or (close(*results) and not close(results[0], plain))
    if (method, kind) in REFUSED or method in ("lora", "ia3"):
        assert bool(results) == ((method, kind) not in REFUSED)
    if newer_peft():
        assert bool(results) == ((method, kind) not in REFUSED)


def newer_peft() -> bool:
    """Whether OFT and BOFT turn the inputs of Linear layers; older versions turn the weights."""
    return tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)


def test_a_refused_adapter_leaves_others(twins: tuple) -> None:
    packed = twins[0]
    packed.add_adapter(lora("to_q", "conv_in"), "one")
    before, names = noise(packed), set(packed.state_dict())
    with pytest.raises(NFQError, match=r"IA3 on '.*conv1' needs dense weights"):
        packed.add_adapter(METHODS["ia3 feed-forward"](["conv_out", "conv1"]), "two")
    assert torch.equal(noise(packed), before) and set(packed.state_dict()) == names
    assert packed.active_adapters() == ["one"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lora("to_q", use_dora=True), "DoRA needs dense weights"),
        (lambda: peft.LoHaConfig(r=2, target_modules=["to_q"]), "LOHA( on '.*')? needs dense weights"),
        (lambda: peft.LoKrConfig(r=2, target_modules=["to_q", "conv1"]), "LOKR( on '.*')? needs dense weights"),
    ],
)
@doors
def test_adapters_that_need_dense_weights(twins: tuple, config: Callable, message: str, door: Callable) -> None:
    unet, before = twins[0], noise(twins[0])
    with pytest.raises(NFQError, match=message):
        door(unet, config())
    assert torch.equal(noise(unet), before) and not has_adapters(unet)


@pytest.mark.parametrize("part", ["lokr_w1", "hada_w1_a", "lora_magnitude_vector"])
def test_files_of_such_adapters(unet: torch.nn.Module, part: str) -> None:
    with pytest.raises(NFQError, match=r"(LoKr|LoHa|DoRA) needs dense weights, and these are packed; dequantize"):
        unet.load_lora_adapter({f"mid_block.attentions.0.proj_in.{part}": torch.ones(2, 2)}, prefix=None)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("pissa", "needs dense weights, and these are packed"),
        ("pissa_niter_4", "needs dense weights, and these are packed"),
        ("olora", "needs dense weights, and these are packed"),
        ("OLoRA", "needs dense weights, and these are packed"),
        ("corda", "needs dense weights, and these are packed"),
        ("loftq", "needs dense weights, and these are packed"),
        ("mica", "needs dense weights, and these are packed"),
        ("orthogonal", "takes its dtype from the weights, and packed weights are uint8; choose True"),
        ("some other", "is not known to work with packed weights; choose True, False, 'gaussian' or 'eva'"),
    ],
)
@doors
def test_initialisations(twins: tuple, start: str, message: str, door: Callable) -> None:
    config, (unet, _) = lora("conv_in", "to_q"), twins
    before = noise(unet)
    # Set afterwards: configurations check packages and versions of their own.
    config.init_lora_weights = start
    with pytest.raises(NFQError, match=f"init_lora_weights='{start}' {message}"):
        door(unet, config)
    assert torch.equal(noise(unet), before) and not has_adapters(unet)


@pytest.mark.parametrize("start", [True, "gaussian", "Gaussian"])
@doors
def test_initialisations_that_work(twins: tuple, start: object, door: Callable) -> None:
    unet, before = twins[0], noise(twins[0])
    door(unet, lora("to_q", init_lora_weights=start))
    assert has_adapters(unet) and close(noise(unet), before)


def test_stock_models_are_initialised_as_ever(twins: tuple) -> None:
    noise(twins[0])
    twins[1].add_adapter(lora("to_q", init_lora_weights="pissa"))
    assert has_adapters(twins[1])


@pytest.mark.parametrize("door", ["fuse_lora", "merge_adapter", "merge_and_unload"])
def test_other_adapters_cannot_be_merged(twins: tuple, door: str) -> None:
    config = METHODS["ia3"](["to_q"])
    with pytest.raises(NFQError, match="kind IA3 cannot be merged into packed weights"):
        if door == "fuse_lora":
            twins[0].add_adapter(config)
            twins[0].fuse_lora()
        else:
            getattr(peft.get_peft_model(twins[0], config), door)()


def test_adapters_are_tried_where_layers_are_offloaded(twins: tuple) -> None:
    accelerate = pytest.importorskip("accelerate")
    packed = twins[0]
    accelerate.cpu_offload(packed, execution_device="cpu")
    packed.add_adapter(METHODS["ia3"](["to_q"]))
    assert has_adapters(packed)


def test_peft_is_wrapped_once(twins: tuple) -> None:
    from peft.tuners.lora import LoraModel

    from nfq_core.diffusers import patches

    noise(twins[0]), list(twins[0].named_modules())
    before = LoraModel._create_and_replace
    patches.wrap_adapter_creation.__wrapped__(adapter_error)
    assert LoraModel._create_and_replace is before
