"""Our loader gives the same latents as the stock loader: samplers, adapters, hooks, ControlNet, merges."""

from __future__ import annotations

import pytest
import torch
from graphs import DENSE, ORIGINAL, OURS, loader, lora, sample
from models import KINDS, NARROW_KOALA, random_unet
from safetensors.torch import load_file, save_file

from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX

MODEL = ["model", 0]


def both(host, build) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of one graph with our loader, and with the stock loader and the dequantised file."""
    ours, dense = host.latent(build({"model": OURS})), host.latent(build({"model": DENSE}))
    assert torch.isfinite(ours).all() and ours.std() > 0
    return ours, dense


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"])
def test_samplers_give_the_same_latents(host, sampler: str) -> None:
    ours, dense = both(host, lambda nodes: sample(nodes, MODEL, sampler, steps=3))
    assert torch.equal(ours, dense)


def test_latents_are_close_to_the_originals(host) -> None:
    ours = host.latent(sample({"model": OURS}, MODEL))
    original = host.latent(sample({"model": ORIGINAL}, MODEL))
    # Random weights and CFG amplify the changes by quantising: a trained model is far closer.
    correlation = torch.corrcoef(torch.stack([ours.flatten(), original.flatten()]))[0, 1]
    assert 0.8 < correlation < 1


@pytest.mark.parametrize("prefix", ["", CHECKPOINT_PREFIX], ids=["ldm", "prefixed"])
def test_v_prediction(host, base, prefix: str) -> None:
    """The markers next to the UNet are kept, in LDM's layout and under a checkpoint's prefix.

    The stock loader loses them under a prefix, so the dense file has no prefix.
    """
    unets = base / "models" / "diffusion_models"
    tensors = {prefix + key: value for key, value in random_unet(NARROW_KOALA).items()}
    save_file(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, unets / "v.safetensors")
    quantize_file(unets / "v.safetensors", unets / "v.nfq.safetensors")
    dequantize_file(unets / "v.nfq.safetensors", unets / "v-dense.safetensors")
    dense = {key.removeprefix(prefix): value for key, value in load_file(unets / "v-dense.safetensors").items()}
    save_file(dense, unets / "v-dense.safetensors")
    names = ("v.nfq.safetensors", "v-dense.safetensors")
    ours, dense = (host.latent(sample({"model": loader(name)}, MODEL, "dpmpp_2m")) for name in names)
    kind = host.check("prediction", {"model": loader(names[0])}, model=MODEL)
    for name in ("v.safetensors", *names):
        (unets / name).unlink()
    assert torch.equal(ours, dense)
    # With zero terminal SNR the first sigma is far larger than the 14.6 of other models.
    assert kind["type"] == "V_PREDICTION" and kind["sigma_max"] > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_kinds(host, kind: str) -> None:
    def build(nodes: dict) -> dict:
        return sample(nodes | {"lora": lora(kind, 0.7, MODEL)}, ["lora", 0])

    ours, dense = both(host, build)
    assert (ours - dense).abs().max() <= 2e-4 * dense.abs().max()
    without = host.latent(sample({"model": OURS}, MODEL))
    assert (ours - without).abs().max() > 1e-3 * dense.abs().max(), "the adapter had no effect"


def test_bypassed_adapter(host) -> None:
    """LoraLoaderBypass, which adds to a layer's output instead of its weight."""
    if "LoraLoaderBypassModelOnly" not in host.get("/object_info"):
        pytest.skip("this host has no LoraLoaderBypassModelOnly")

    def build(nodes: dict) -> dict:
        bypass = lora("locon", 0.7, MODEL) | {"class_type": "LoraLoaderBypassModelOnly"}
        return sample(nodes | {"lora": bypass}, ["lora", 0])

    ours, dense = both(host, build)
    assert torch.equal(ours, dense)
    assert not torch.equal(ours, host.latent(sample({"model": OURS}, MODEL)))


def test_several_adapters_and_changing_strengths(host) -> None:
    """Each run equals the dense one; without adapters the model gives its first latent again."""

    def build(strengths: dict[str, float]):
        def graph(nodes: dict) -> dict:
            last = MODEL
            for kind, strength in strengths.items():
                nodes = nodes | {kind: lora(kind, strength, last)}
                last = [kind, 0]
            return sample(nodes, last)

        return graph

    before = host.latent(build({})({"model": OURS}))
    for strengths in ({"lora": 0.5, "loha": 1.0, "dora": 0.3}, {"lora": -0.8, "loha": 0.2}, {"lora": 1.5}):
        ours, dense = both(host, build(strengths))
        assert (ours - dense).abs().max() <= 2e-4 * dense.abs().max(), strengths
    assert torch.equal(host.latent(build({})({"model": OURS})), before)


def test_scheduled_hooks(host) -> None:
    """A LoRA hook on one of two prompts, its strength changing during sampling, and a LoRA that always applies."""

    def build(nodes: dict) -> dict:
        nodes = nodes | {
            "lora": lora("locon", 0.4, MODEL),
            "hook": {
                "class_type": "CreateHookLoraModelOnly",
                "inputs": {"lora_name": "lora.safetensors", "strength_model": 1.0},
            },
            "late": {"class_type": "CreateHookKeyframe", "inputs": {"strength_mult": 0.2, "start_percent": 0.4}},
            "frames": {
                "class_type": "CreateHookKeyframe",
                "inputs": {"strength_mult": 1.0, "start_percent": 0.0, "prev_hook_kf": ["late", 0]},
            },
            "timed": {"class_type": "SetHookKeyframes", "inputs": {"hooks": ["hook", 0], "hook_kf": ["frames", 0]}},
            "hooked": {
                "class_type": "ConditioningSetProperties",
                "inputs": {
                    "cond_NEW": ["positive", 0],
                    "strength": 1.0,
                    "set_cond_area": "default",
                    "hooks": ["timed", 0],
                },
            },
        }
        return sample(nodes, ["lora", 0], steps=4, positive=["hooked", 0])

    ours, dense = both(host, build)
    assert (ours - dense).abs().max() <= 2e-4 * dense.abs().max()
    plain = {"model": OURS, "lora": lora("locon", 0.4, MODEL)}
    assert (ours - host.latent(sample(plain, ["lora", 0], steps=4))).abs().max() > 1e-3 * dense.abs().max()
    again = host.latent(build({"model": OURS}))
    assert torch.equal(again, ours), "a hook was left behind"


@pytest.mark.parametrize("kind", ["NFQTestControlNet", "NFQTestControlLora"])
def test_controlnet(host, kind: str) -> None:
    """ControlNet, and Control-LoRA, which uses the UNet's weights."""

    def build(nodes: dict) -> dict:
        nodes = nodes | {
            "control": {"class_type": kind, "inputs": {"model": MODEL}},
            "image": {"class_type": "NFQTestImage", "inputs": {"number": 3}},
            "controlled": {
                "class_type": "ControlNetApplyAdvanced",
                "inputs": {
                    "positive": ["positive", 0],
                    "negative": ["negative", 0],
                    "control_net": ["control", 0],
                    "image": ["image", 0],
                    "strength": 1.0,
                    "start_percent": 0.0,
                    "end_percent": 1.0,
                },
            },
        }
        return sample(nodes, MODEL, positive=["controlled", 0], negative=["controlled", 1])

    ours, dense = both(host, build)
    assert torch.equal(ours, dense)
    assert not torch.equal(ours, host.latent(sample({"model": OURS}, MODEL)))


MERGES = {
    "ModelMergeSimple": {"ratio": 0.3},
    "ModelMergeBlocks": {"input": 0.2, "middle": 0.5, "out": 0.9},
    "ModelMergeAdd": {},
    "ModelMergeSubtract": {"multiplier": 0.5},
}


@pytest.mark.parametrize("node", MERGES)
def test_merges(host, node: str) -> None:
    """Our MODEL as first, as second and as both: the result equals the merge of dense models."""

    def latent(first: dict, second: dict) -> torch.Tensor:
        merge = {"class_type": node, "inputs": {"model1": ["first", 0], "model2": ["second", 0], **MERGES[node]}}
        return host.latent(sample({"first": first, "second": second, "merge": merge}, ["merge", 0]))

    for first, second in ((OURS, ORIGINAL), (ORIGINAL, OURS), (OURS, OURS)):
        wanted = latent(*(DENSE if model is OURS else model for model in (first, second)))
        got = latent(first, second)
        assert (got - wanted).abs().max() <= 2e-4 * wanted.abs().max()


def test_two_packed_models_in_one_graph(host) -> None:
    """Two models sampled one after the other, one with a LoRA, do not affect each other."""
    ours = {"model": OURS, "lora": lora("lora", 1.0, MODEL)}
    quantised = {"class_type": "NFQuantizeUNet", "inputs": {"model": ["original", 0], "preset": "levels", "levels": 7}}
    other = {"original": ORIGINAL, "packed": quantised}
    alone = [host.latent(sample(ours, ["lora", 0])), host.latent(sample(other, ["packed", 0]))]
    graph = sample(ours, ["lora", 0]) | sample(other, ["packed", 0], name="second")
    outputs = host.run(graph)
    for name, wanted in zip(("latent", "second"), alone, strict=True):
        saved = outputs[name]["latents"][0]
        assert torch.equal(load_file(host.output / saved["subfolder"] / saved["filename"])["latent_tensor"], wanted)
