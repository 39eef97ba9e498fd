"""A calibration collected around an ordinary sampler, saved, and used for quantising."""

from __future__ import annotations

import pytest
import torch
from driver import HostError
from graphs import ORIGINAL as NARROW
from graphs import VEGA as OURS
from graphs import VEGA_ORIGINAL as ORIGINAL
from graphs import lora, quantize, sample, save

from nfq_core import Calibration, NFQFile
from nfq_core.calibration.statistics import LayerInputs

NAME = "vega.calibration.safetensors"


def collect(model: list, **inputs: bool) -> dict:
    return {"class_type": "NFCollectCalibration", "inputs": {"model": model, **inputs}}


def keep(model: list, **inputs: object) -> dict:
    samples = ["latent sampler", 0]
    return {
        "class_type": "NFSaveCalibration",
        "inputs": {"model": model, "samples": samples, "filename_prefix": "vega", **inputs},
    }


def test_collect_save_and_quantize(host) -> None:
    plain = host.latent(sample({"model": ORIGINAL}, ["model", 0], steps=1))
    nodes = {"model": ORIGINAL, "collect": collect(["model", 0], hessians=False)}
    prompt = sample(nodes, ["collect", 0], steps=1) | {"kept": keep(["collect", 0])}
    assert torch.equal(host.latent(prompt), plain)
    (message,) = host.run(prompt)["kept"]["text"]
    assert message.startswith(f"saved output/nfq_calibrations/{NAME} (") and message.endswith("2 samplings")
    found = Calibration.load(host.output / "nfq_calibrations" / NAME)
    assert (found.architecture, found.prompts, found.steps) == ("Segmind Vega", 2, 1)
    # At so few pixels the innermost layers see too few tokens.
    assert len(found.inputs) + len(found.faults) > 217 and len(found.sensitivities) >= 8
    made = quantize(["model", 0], levels=7, conv_levels=7, calibration=NAME)
    host.run({"model": ORIGINAL, "made": made, "saved": save(["made", 0], "calibrated")})
    with NFQFile(host.output / "diffusion_models" / "calibrated.nfq.safetensors") as file:
        assert file.facts.settings["calibration"] == NAME
    with pytest.raises(HostError, match="exists; choose another filename_prefix"):
        again = {"model": ORIGINAL, "collect": collect(["model", 0], hessians=False, sensitivities=False)}
        host.run(sample(again, ["collect", 0], steps=1) | {"kept": keep(["collect", 0])})


def calibrate(model: list, **inputs: object) -> dict:
    """With as little sampling as the node allows."""
    clip = {"class_type": "NFQTestClip", "inputs": {}}
    node = {"class_type": "NFCalibrate", "inputs": {"model": model, "clip": ["clip", 0]}}
    node["inputs"] |= {"prompts": 2, "steps": 1, "side": 256, "filename_prefix": "auto", **inputs}
    return {"clip": clip, "calibration": node}


def test_calibrate_and_quantize_in_one_graph(host) -> None:
    made = quantize(["model", 0], preset="small", calibration=["calibration", 0])
    nodes = {"model": NARROW, **calibrate(["model", 0]), "made": made, "saved": save(["made", 0], "in-one-go")}
    (message,) = host.run(nodes)["calibration"]["text"]
    name = message.removeprefix("saved ")
    assert name.startswith("auto-")
    found = Calibration.load(host.output / "nfq_calibrations" / name)
    assert (found.prompts, found.steps) == (2, 1) and found.sensitivities
    assert all(inputs.correlation is not None for inputs in found.inputs.values())
    with NFQFile(host.output / "diffusion_models" / "in-one-go.nfq.safetensors") as file:
        assert file.facts.settings["calibration"] == name and file.facts.settings["target_bpw"] == 3.4
    # The same MODEL again, through another node: nothing is sampled.
    again = {"model": NARROW, **calibrate(["model", 0])}
    again["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["calibration", 0]}}
    again["calibration"]["inputs"]["cfg"] = 5.0
    assert host.run(again)["calibration"]["text"] == [f"found {name} again"]


def test_a_lora_is_calibrated_by_itself(host) -> None:
    nodes = {"model": NARROW, "tuned": lora("lora", 1.0, ["model", 0]), **calibrate(["tuned", 0])}
    nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["calibration", 0]}}
    (message,) = host.run(nodes)["calibration"]["text"]
    assert message.startswith("saved auto-")
    # The host has the LoRA's weights loaded by now, and the node runs again for another start of the name.
    nodes["calibration"]["inputs"]["filename_prefix"] = "auto.calibration.safetensors"
    assert host.run(nodes)["calibration"]["text"] == [message.replace("saved", "found") + " again"]


def test_a_model_that_predicts_v_is_calibrated_as_such(host) -> None:
    found = {}
    for prediction in ("eps", "v_prediction"):
        kind = {"model": ["model", 0], "sampling": prediction, "zsnr": prediction == "v_prediction"}
        nodes = {"model": NARROW, "kind": {"class_type": "ModelSamplingDiscrete", "inputs": kind}}
        nodes |= calibrate(["kind", 0], filename_prefix=prediction)
        nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["calibration", 0]}}
        (message,) = host.run(nodes)["calibration"]["text"]
        found[prediction] = Calibration.load(host.output / "nfq_calibrations" / message.removeprefix("saved "))
    first = "input_blocks.1.0.in_layers.2.weight"
    importance = [each.inputs[first].importance for each in found.values()]
    assert not torch.equal(*importance) and all(map(torch.isfinite, map(torch.sum, importance)))


def test_a_packed_model_is_refused(host) -> None:
    with pytest.raises(HostError, match="a calibration needs dense weights"):
        nodes = {"model": OURS, "collect": collect(["model", 0])}
        host.run(sample(nodes, ["collect", 0], steps=1))
    with pytest.raises(HostError, match="a calibration needs dense weights"):
        nodes = {"model": OURS, **calibrate(["model", 0])}
        nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["calibration", 0]}}
        host.run(nodes)


def test_a_compiled_model_is_refused(host) -> None:
    """Before the node and after it."""
    compiled = {"class_type": "TorchCompileModel", "inputs": {"model": ["model", 0], "backend": "inductor"}}
    before = {"model": ORIGINAL, "compiled": compiled, "last": collect(["compiled", 0])}
    behind = {"model": ORIGINAL, "collect": collect(["model", 0])}
    behind["last"] = compiled | {"inputs": {"model": ["collect", 0], "backend": "inductor"}}
    for nodes in (before, behind):
        with pytest.raises(HostError, match="this MODEL is compiled, which hides the inputs of its layers"):
            host.run(sample(nodes, ["last", 0], steps=1))


def test_a_calibration_of_another_architecture_is_refused(host) -> None:
    folder = host.output / "nfq_calibrations"
    folder.mkdir(exist_ok=True)
    inputs = LayerInputs(torch.ones(320), 100)
    Calibration({"input_blocks.1.0.in_layers.2.weight": inputs}, "SDXL").save(folder / "other.calibration.safetensors")
    made = quantize(["model", 0], calibration="other.calibration.safetensors")
    with pytest.raises(HostError, match="the calibration was made with SDXL, this model is Segmind Vega"):
        host.run({"model": ORIGINAL, "made": made, "saved": save(["made", 0], "uncalibrated")})
    assert not (host.output / "diffusion_models" / "uncalibrated.nfq.safetensors").exists()
