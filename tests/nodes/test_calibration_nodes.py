"""The calibration nodes in a stub of the host: when they collect, what they write, which MODELs they refuse."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from samples import SMALLEST, TINY, unet_config

from nfq_core import Calibration
from nfq_core.calibration.collector import Collector


class Patcher:
    """The part of the host's model patcher that sampling needs here."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.model = torch.nn.ModuleDict({"diffusion_model": unet})
        self.model.diffusion_model = unet
        self.attachments: dict[str, Any] = {}
        self.wrappers: list[Callable] = []
        self.model_options: dict[str, Any] = {}

    def get_model_object(self, name: str) -> object:
        return None

    def get_injections(self, key: str) -> list:
        return []

    def use_ejected(self) -> object:
        return nullcontext()

    def clone(self) -> Patcher:
        twin = Patcher(self.model.diffusion_model)
        twin.attachments, twin.wrappers = dict(self.attachments), list(self.wrappers)
        twin.model_options = dict(self.model_options)
        return twin

    def set_attachments(self, key: str, value: object) -> None:
        self.attachments[key] = value

    def get_attachment(self, key: str) -> object:
        return self.attachments.get(key)

    def add_wrapper_with_key(self, kind: object, key: str, wrapper: Callable) -> None:
        self.wrappers.append(wrapper)

    def remove_wrappers_with_key(self, kind: object, key: str) -> None:
        self.wrappers.clear()

    def sample(self, seed: int = 0, fails: bool = False) -> None:
        """Sample in two steps, as the host's sampler does."""

        def outer_sample(noise: torch.Tensor, latent: None, sampler: None, sigmas: torch.Tensor) -> torch.Tensor:
            unet = self.model.diffusion_model
            added = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
            for sigma in sigmas[:-1]:
                unet(noise, sigma, torch.zeros(1, 2, 8), added_cond_kwargs=added)
                if fails:
                    raise InterruptedError
            return noise

        class Executor:
            class_obj = SimpleNamespace(model_patcher=self)

            def __call__(self, *arguments: Any) -> torch.Tensor:
                return outer_sample(*arguments)

        run = Executor()
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        arguments = (noise, None, None, torch.tensor([2.0, 1.0, 0.0]))
        for wrapper in self.wrappers:
            wrapper(run, *arguments)
        if not self.wrappers:
            run(*arguments)


@pytest.fixture
def model() -> Patcher:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return Patcher(diffusers.UNet2DConditionModel(**unet_config(SMALLEST)).requires_grad_(False))


@pytest.fixture
def nodes(plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    folder_paths = importlib.import_module("folder_paths")
    output = tmp_path / "output"
    (tmp_path / "models" / "nfq_calibrations").mkdir()

    def image_path(prefix: str, directory: str) -> tuple:
        folder = output / Path(prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder), Path(prefix).name, 0, "", prefix

    monkeypatch.setattr(folder_paths, "get_save_image_path", image_path, raising=False)
    extension = asyncio.run(plugin.comfy_entrypoint())
    return {node.__name__: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture
def error(plugin: ModuleType) -> type:
    """The error class of the plugin's own copy of the core."""
    return importlib.import_module(f"{plugin.__name__}.nfq_core.errors").NFQError


def hooks(model: Patcher) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.diffusion_model.modules()
    )


def with_collector(nodes: dict, model: Patcher, **inputs: bool) -> Patcher:
    return nodes["NFCollectCalibration"].execute(model, **inputs).result[0]


def test_data_of_several_samplings_adds_up(nodes: dict, model: Patcher, tmp_path: Path) -> None:
    clone = with_collector(nodes, model)
    expected = Collector(model.model.diffusion_model, hessians=True)
    for seed in (1, 2):
        clone.sample(seed)
        with expected.watching():
            model.sample(seed)
        assert hooks(model) == 0
        message = nodes["NFSaveCalibration"].execute(clone, None, "mine").ui["text"][0]
        assert message.startswith("saved output/nfq_calibrations/mine.calibration.safetensors (")
        assert ("1 sampling: queue more" in message) == (seed == 1)
    found = Calibration.load(tmp_path / "output" / "nfq_calibrations" / "mine.calibration.safetensors")
    assert (found.prompts, found.steps) == (2, 2)
    wanted = expected.calibration()
    # A layer that is called once per step gets too few inputs here.
    assert found.inputs.keys() | found.faults.keys() == wanted.inputs.keys() and found.sensitivities
    for name in found.inputs:
        inputs = wanted.inputs[name]
        assert inputs.rows == found.inputs[name].rows
        assert torch.equal(inputs.importance, found.inputs[name].importance)
        assert torch.equal(inputs.correlation, found.inputs[name].correlation)


def test_collects_only_the_requested_data(nodes: dict, model: Patcher, tmp_path: Path) -> None:
    clone = with_collector(nodes, model, hessians=False, sensitivities=False)
    clone.sample()
    nodes["NFSaveCalibration"].execute(clone, None, "plain")
    found = Calibration.load(tmp_path / "output" / "nfq_calibrations" / "plain.calibration.safetensors")
    assert not found.sensitivities and all(inputs.correlation is None for inputs in found.inputs.values())


def test_another_unet_is_sampled_without_collecting(nodes: dict, model: Patcher, error: type) -> None:
    """A packed copy, or a loader's second copy, still has the wrapper."""
    clone = with_collector(nodes, model)
    other = clone.clone()
    other.model = Patcher(type(model.model.diffusion_model)(**unet_config(SMALLEST))).model
    other.sample()
    with pytest.raises(error, match="nothing was sampled with this MODEL"):
        nodes["NFSaveCalibration"].execute(clone, None)


def test_an_interrupt_leaves_no_hooks(nodes: dict, model: Patcher) -> None:
    clone = with_collector(nodes, model)
    with pytest.raises(InterruptedError):
        clone.sample(fails=True)
    assert hooks(model) == 0


def test_a_compiled_model_is_refused(nodes: dict, model: Patcher, error: type) -> None:
    """Before and after the node: compiled code does not call hooks."""
    compiled = with_collector(nodes, model)
    compiled.model_options["torch_compile_kwargs"] = {"backend": "inductor"}
    message = "this MODEL is compiled, which hides the inputs of its layers; remove TorchCompileModel"
    with pytest.raises(error, match=message):
        compiled.sample()
    assert hooks(model) == 0
    with pytest.raises(error, match=message):
        with_collector(nodes, compiled)


def test_refusals(nodes: dict, model: Patcher, error: type, tmp_path: Path) -> None:
    save = nodes["NFSaveCalibration"].execute
    with pytest.raises(error, match="this MODEL collects no calibration"):
        save(model, None)
    clone = with_collector(nodes, model)
    with pytest.raises(error, match="nothing was sampled with this MODEL; connect it to a sampler"):
        save(clone, None)
    clone.sample()
    path = tmp_path / "output" / "nfq_calibrations" / "mine.calibration.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"another's")
    with pytest.raises(error, match="exists; choose another filename_prefix, or switch overwrite on"):
        save(clone, None, "mine")
    assert path.read_bytes() == b"another's"
    save(clone, None, "mine", True)
    assert Calibration.load(path).prompts == 1
    with pytest.raises(error, match="this MODEL has no Linear or Conv2d layers; a calibration needs some"):
        with_collector(nodes, Patcher(torch.nn.Sequential(torch.nn.ReLU())))


def test_a_quantized_model_is_refused(nodes: dict, model: Patcher, error: type) -> None:
    """Tensors that report a floating dtype, as those of the host's formats and ours do, and tensors of integers."""
    quantized = importlib.import_module("comfy_kitchen.tensor").QuantizedTensor

    class ReportsFloatingDtype(torch.nn.Parameter, quantized):
        pass

    layer = model.model.diffusion_model.conv_in
    for weight in (
        ReportsFloatingDtype(layer.weight.data, False),
        torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), False),
    ):
        layer.weight = weight
        with pytest.raises(error, match="this MODEL is quantised, but a calibration needs dense weights"):
            with_collector(nodes, model)


class Clip:
    def __init__(self, width: int = 48) -> None:
        self._width = width

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return [[torch.zeros(1, 77, self._width), {"text": tokens}]]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch, plugin: ModuleType) -> list[tuple]:
    """The prompts that were sampled; sampling itself is the stub's."""
    seen: list[tuple] = []

    def sample(model: Patcher, noise: object, steps: int, cfg: float, *more: Any, **options: Any) -> torch.Tensor:
        seen.append((*(cond[0][1]["text"] for cond in more[2:4]), steps, cfg))
        model.sample(options["seed"])
        options["callback"](steps - 1)
        return torch.zeros(1)

    def key_patches(model: Patcher) -> dict[str, list]:
        return {key: [(weight, None)] for key, weight in model.model.diffusion_model.state_dict().items()}

    host = importlib.import_module("comfy.sample")
    monkeypatch.setattr(host, "sample", sample, raising=False)
    monkeypatch.setattr(importlib.import_module(f"{plugin.__name__}.nodes.calibration"), "key_patches", key_patches)
    return seen


def calibrate(nodes: dict, model: Patcher, clip: Any = None, **inputs: Any) -> tuple[str, str]:
    """Name and message of NFQ Calibrate."""
    node = nodes["NFCalibrate"]
    node.hidden = SimpleNamespace(unique_id="1")
    made = node.execute(model, clip or Clip(), **{"prompts": 2, "steps": 2, **inputs})
    return made.result[0], made.ui["text"][0]


def test_calibrate_samples_the_bundled_prompts_once(
    nodes: dict, model: Patcher, tmp_path: Path, sampled: list[tuple], plugin: ModuleType, error: type
) -> None:
    prompts = importlib.import_module(f"{plugin.__name__}.nfq_core.calibration.prompts").PROMPTS
    name, message = calibrate(nodes, model, filename_prefix="mine")
    assert name.startswith("mine-") and name.endswith(".calibration.safetensors") and message == f"saved {name}"
    assert sampled == [(*prompt, 2, 5.0) for prompt in prompts[:2]]
    folder = tmp_path / "output" / "nfq_calibrations"
    found = Calibration.load(folder / name)
    # This UNet's layers are not SDXL's, so their sensitivities are measured.
    assert (found.prompts, found.steps) == (2, 2) and found.sensitivities
    assert calibrate(nodes, model, filename_prefix="mine") == (name, f"found {name} again") and len(sampled) == 2
    others = [calibrate(nodes, model, filename_prefix="mine", steps=1)[0]]
    with torch.no_grad():
        model.model.diffusion_model.conv_in.weight += 1
    others.append(calibrate(nodes, model, filename_prefix="mine")[0])
    assert len({name, *others}) == 3 == len(list(folder.iterdir()))
    (folder / others[1]).write_bytes(b"damaged")
    assert calibrate(nodes, model, filename_prefix="mine") == (others[1], f"saved {others[1]}")
    for prefix in ("", "folder/"):
        with pytest.raises(error, match="has no file name"):
            calibrate(nodes, model, filename_prefix=prefix)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no clip", "there is no CLIP; connect that of the checkpoint loader"),
        ("memory", "out of memory while sampling 512 × 512 pixels; choose a smaller side"),
        ("nan", "prompt 1 gave NaN or infinity; start ComfyUI with --bf16-unet or --fp32-unet"),
        ("interrupt", "interrupted"),
    ],
)
def test_calibrate_keeps_nothing_unfinished(
    nodes: dict,
    model: Patcher,
    tmp_path: Path,
    sampled: list[tuple],
    error: type,
    monkeypatch,
    fault: str,
    message: str,
) -> None:
    host = importlib.import_module("comfy.sample")
    if fault == "memory":

        def fails(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

        monkeypatch.setattr(host, "sample", fails)
    elif fault == "nan":
        monkeypatch.setattr(host, "sample", lambda *_, **__: torch.tensor([float("nan")]))
    elif fault == "interrupt":
        management = importlib.import_module("comfy.model_management")

        def interrupted() -> None:
            raise InterruptedError("interrupted")

        monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupted, raising=False)
    node = nodes["NFCalibrate"]
    node.hidden = SimpleNamespace(unique_id="1")
    with pytest.raises((error, InterruptedError), match=message):
        node.execute(model, None if fault == "no clip" else Clip(), prompts=2, side=512)
    assert not list((tmp_path / "output").rglob("*.safetensors")) and hooks(model) == 0


def test_calibrate_refuses_before_it_samples(
    nodes: dict, model: Patcher, sampled: list[tuple], error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_attention = Patcher(type(model.model.diffusion_model)(**unet_config(TINY)))
    with pytest.raises(error, match="this CLIP gives tokens of width 768, the MODEL reads 48; connect its own CLIP"):
        calibrate(nodes, with_attention, Clip(768))
    with pytest.raises(error, match="this MODEL has no Linear or Conv2d layers; a calibration needs some"):
        calibrate(nodes, Patcher(torch.nn.Sequential(torch.nn.ReLU())))
    compiled = model.clone()
    compiled.model_options["torch_compile_kwargs"] = {"backend": "inductor"}
    with pytest.raises(error, match="this MODEL is compiled"):
        calibrate(nodes, compiled)
    with monkeypatch.context() as patch:
        patch.setattr(Patcher, "get_injections", lambda *_: [object()])
        with pytest.raises(error, match=r"Load LoRA \(Bypass\) works only after NFQ Quantize Model"):
            calibrate(nodes, model)
    layer = model.model.diffusion_model.conv_in
    layer.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), False)
    with pytest.raises(error, match="this MODEL is quantised, but a calibration needs dense weights"):
        calibrate(nodes, model)
    assert not sampled and hooks(model) == 0


def test_quantize_lists_calibrations(nodes: dict, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "nfq_calibrations"
    for name in ("a.calibration.safetensors", "other.safetensors"):
        (folder / name).write_bytes(b"")
    node = nodes["NFQuantizeUNet"]
    (listed,) = [each for each in node.define_schema().inputs if each.id == "calibration"]
    assert listed.options["options"] == ["(none)", "a.calibration.safetensors"]
    assert node.fingerprint_inputs() == ""
    before = node.fingerprint_inputs("a.calibration.safetensors")
    (folder / "a.calibration.safetensors").write_bytes(b"more")
    assert node.fingerprint_inputs("a.calibration.safetensors") != before
