"""The extension for web UIs, with stubs of the programs: how it loads, which calls it handles or passes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import stub_webui
import torch
from safetensors.torch import save_file
from samples import TINY, random_half
from structure import absolute_imports
from stub_webui import ROOT, Program
from text_models import SMALL_G, SMALL_L, random_tensors

from benchmarks.checkpoint_shapes import text_encoders
from nfq_core import NFTensor, load, quantize_state_dict, save
from nfq_core.models.unet_keys import tensor_shapes

COMPANIONS = {"conditioner.x": random_half(8, 8), "first_stage_model.y": random_half(8)}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test loads the extension again, because it keeps references to the program's modules."""
    yield
    for name in [name for name in sys.modules if name.startswith("nfq_extension_")]:
        del sys.modules[name]


@pytest.fixture(params=["automatic", "forge", "neo"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Program:
    made = stub_webui.install(monkeypatch, kind=request.param)
    made.load_extension()
    made.read.clear()
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    shapes = tensor_shapes(TINY, "diffusers")
    unet = quantize_state_dict(
        {name: random_half(*shape, seed=n) / 16 for n, (name, shape) in enumerate(shapes.items())}
    )
    save(unet | COMPANIONS, folder / "whole.nfq.safetensors", settings={"levels": 16})
    save(unet, folder / "unet.nfq.safetensors")
    shutil.copy(folder / "whole.nfq.safetensors", folder / "renamed.safetensors")
    (folder / "cut.nfq.safetensors").write_bytes((folder / "whole.nfq.safetensors").read_bytes()[:-1])
    (folder / "other.safetensors").write_bytes(b"something else")
    return folder


@dataclass(frozen=True)
class Info:
    filename: str


def reader(program: Program):
    """The function by which the program reads checkpoints that it merges."""
    models = program.modules["modules.sd_models"]
    if hasattr(models, "read_state_dict"):
        return models.read_state_dict
    merger = program.modules["modules.extras"]
    return (merger if hasattr(merger, "load_torch_file") else models).load_torch_file


def change(program: Program, path: Path):
    """Make the program change its model to a file, by its own functions."""
    models, info = program.modules["modules.sd_models"], Info(str(path))
    if hasattr(models, "reload_model_weights"):
        return models.reload_model_weights(info=info)
    models.model_data.forge_loading_parameters = {"checkpoint_info": info}
    return program.modules["modules.processing"].forge_model_reload()


def test_loading_leaves_no_module_names(program: Program) -> None:
    assert reader(program).__module__.startswith("nfq_extension_")
    package = reader(program).__module__.partition(".")[0]
    assert sys.modules[f"{package}.nfq_core"].__file__ == str(ROOT / "nfq_core" / "__init__.py")
    assert "nodes" not in sys.modules and f"{package}.nodes" not in sys.modules
    assert len(program.tabs) == len(program.settings) == 1


def test_it_leaves_the_module_path(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forge leaves every extension's folder on the path."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    others = [entry for entry in sys.path if Path(entry) != ROOT]
    for callback in program.before_ui:
        callback()
    assert sys.path == others


def test_unloading_scripts_undoes_everything(program: Program) -> None:
    for undo in program.unload:
        undo()
    assert reader(program).__module__ == "stub_webui"
    program.load_extension()
    assert reader(program).__module__.startswith("nfq_extension_")


def test_other_files_are_read_by_the_program(program: Program, files: Path) -> None:
    for path in (files / "other.safetensors", files / "missing.safetensors", files / "model.ckpt"):
        assert reader(program)(str(path)) == "stock"
        assert program.read.pop()[0][0] == str(path)
        assert change(program, path) == "stock"


@pytest.mark.parametrize("name", ["whole.nfq.safetensors", "renamed.safetensors"])
def test_our_files_are_read_with_ldm_names(program: Program, files: Path, name: str) -> None:
    found = reader(program)(str(files / name))
    assert found.keys() == {*tensor_shapes(TINY, "prefixed"), *COMPANIONS}
    wanted = load(files / name)["down_blocks.1.attentions.0.proj_in.weight"]
    assert isinstance(wanted, NFTensor)
    assert torch.equal(found["model.diffusion_model.input_blocks.3.1.proj_in.weight"], wanted.dequantize())


def test_packed_text_encoders_are_dense(program: Program, tmp_path: Path) -> None:
    """In both programs, in the dtype that they had, whether the UNet stays packed or not."""
    text = text_encoders(SMALL_L, SMALL_G) | {"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3)}
    tensors = random_tensors(tensor_shapes(TINY, "prefixed")) | random_tensors(text, torch.bfloat16)
    save(quantize_state_dict(tensors), tmp_path / "a.nfq.safetensors")
    wanted = load(tmp_path / "a.nfq.safetensors", memory="resident")
    readers = [reader(program)]
    if "backend.loader" in program.modules:
        readers.append(program.modules["backend.loader"].load_torch_file)
    for read in readers:
        found = read(str(tmp_path / "a.nfq.safetensors"))
        assert found.keys() == tensors.keys()
        for key in text:
            assert type(found[key]) is torch.Tensor and torch.equal(found[key], wanted[key])


def test_a_model_is_dropped_only_for_a_readable_one(program: Program, files: Path) -> None:
    assert "conditioner.x" in change(program, files / "whole.nfq.safetensors")
    calls = len(program.read)
    for name, sentence in (
        ("cut.nfq.safetensors", "fetch it again"),
        ("missing.nfq.safetensors", "no such file"),
        ("unet.nfq.safetensors", "has no text encoder and no VAE; "),
    ):
        # The error class belongs to the extension's own core, not to the installed one.
        with pytest.raises(Exception, match=sentence) as error:
            change(program, files / name)
        assert type(error.value).__module__.startswith("nfq_extension_")
        assert program.warnings[-1] == str(error.value) and "\n" not in str(error.value)
    assert len(program.read) == calls, "the program was called"


CHANGES = {
    "another parameter": lambda program: _set(program, "backend.loader", "load_torch_file", lambda ckpt, mode=0: {}),
    "another result": lambda program: _set(program, "backend.loader", "load_torch_file", lambda ckpt: [ckpt]),
    "an error": lambda program: _set(program, "backend.loader", "load_torch_file", lambda ckpt: 1 / 0),
    "no such function": lambda program: delattr(program.modules["modules.processing"], "forge_model_reload"),
    "other data": lambda program: delattr(program.modules["modules.sd_models"].model_data, "forge_hash"),
}


def _set(program: Program, module: str, name: str, function) -> None:
    setattr(program.modules[module], name, function)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_program_that_has_changed_stays_as_it_is(monkeypatch, caplog, change) -> None:
    program = stub_webui.install(monkeypatch, kind="neo")
    change(program)
    before = {name: dict(vars(module)) for name, module in program.modules.items() if name != "gradio"}
    program.load_extension()
    assert {name: dict(vars(program.modules[name])) for name in before} == before
    (sentence,) = [record.getMessage() for record in caplog.records]
    assert (
        sentence.startswith("NFQ checkpoints cannot be loaded here: this program has changed (")
        and "\n" not in sentence
    )
    assert len(program.tabs) == 1, "files can still be quantised"


def test_without_suitable_layers_weights_are_dequantised(files: Path, monkeypatch, caplog) -> None:
    program = stub_webui.install(monkeypatch, kind="neo")
    monkeypatch.setattr(stub_webui.Linear, "forward", lambda self, values: values)
    program.load_extension()
    assert caplog.records[-1].getMessage().startswith("Weights cannot stay packed in memory here: ")
    found = program.modules["backend.loader"].load_torch_file(str(files / "whole.nfq.safetensors"))
    assert not any(hasattr(value, "gguf_cls") for value in found.values())


def test_forge_neo_gets_a_pair_on_demand(files: Path, monkeypatch) -> None:
    program = stub_webui.install(monkeypatch, kind="neo")
    program.load_extension()
    tensors, metadata = reader(program)(str(files / "whole.nfq.safetensors"), return_metadata=True, device=None)
    assert tensors.keys() == reader(program)(str(files / "whole.nfq.safetensors")).keys() and "nfq" in metadata


@pytest.mark.parametrize("kind", ["forge", "neo"])
def test_weights_stay_packed_as_far_as_the_layers_allow(files: Path, monkeypatch, kind: str) -> None:
    program = stub_webui.install(monkeypatch, kind=kind)
    program.load_extension()
    read, args = program.modules["backend.loader"].load_torch_file, program.modules["backend.args"].dynamic_args
    path = str(files / "whole.nfq.safetensors")
    packed, dense = read(path), reader(program)(path)
    linear = "model.diffusion_model.input_blocks.3.1.proj_in.weight"
    weight = packed[linear]
    assert weight.gguf_cls.__name__ == "NFQ" and weight.data.dtype == torch.uint8
    assert isinstance(weight, torch.nn.Parameter) and weight.shape == dense[linear].shape
    moved = weight.to(device="cpu", dtype=None, non_blocking=True, copy=True)
    assert moved.data.dtype == torch.uint8 and moved.gguf_cls is weight.gguf_cls
    assert torch.equal(weight.gguf_cls.dequantize_pytorch(moved), dense[linear])
    assert torch.equal(weight.to(torch.float32), dense[linear].float()), "cast, it is dense"
    assert weight.dtype == torch.float16, "merged weights are rounded to the dtype in which they compute"
    assert type(weight).__name__ == "Parameter", "Forge Neo pins no other"
    assert torch.equal(weight.detach().clone(), dense[linear]), "what the program saves is dense"
    merged = weight.gguf_cls.quantize_pytorch(dense[linear].float() + 1, moved)
    assert moved is merged and torch.equal(merged.data, (dense[linear].float() + 1).half()) and merged.gguf_cls is None
    assert weight.gguf_cls is not None
    convolution = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert (packed[convolution].gguf_cls is None) == (kind == "forge")
    assert torch.equal(packed[convolution].unpacked(), dense[convolution])
    assert not hasattr(packed["conditioner.x"], "gguf_cls")
    args["forge_unet_storage_dtype"] = torch.float8_e4m3fn
    assert not any(hasattr(value, "gguf_cls") for value in read(path).values())


def test_install_adds_missing_packages(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text("def run_pip(command, what): print(command)\n")
    blocked = "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    run = blocked + f"exec(open({str(ROOT / 'install.py')!r}).read())"
    for folder, output in ((tmp_path, 'install "zstandard>=0.22"\n'), (ROOT / "docs", "")):
        result = subprocess.run([sys.executable, "-c", run], cwd=folder, capture_output=True, text=True, check=True)
        assert result.stdout == output
    (requirement,) = (ROOT / "requirements.txt").read_text().split()
    assert requirement in (ROOT / "install.py").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "nfq_webui").glob("*.py")), ids=lambda path: path.name)
def test_its_modules_import_their_own_relatively(path: Path) -> None:
    allowed = {"packed.py": {"torch"}, "loading.py": {"torch"}}
    allowed |= {"forge.py": {"backend", "modules", "torch"}, "layers.py": {"backend", "torch"}}
    others = {"gradio", "modules", "torch"} if path.name != "conversion.py" else set()
    assert absolute_imports(path) <= allowed.get(path.name, others) | set(sys.stdlib_module_names)


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch):
    program = stub_webui.install(monkeypatch, kind="automatic")
    program.load_extension()
    return sys.modules[f"{reader(program).__module__.partition('.')[0]}.nfq_webui.conversion"]


def test_where_a_new_checkpoint_goes(conversion, tmp_path: Path) -> None:
    assert (
        conversion.default_name("/models/some model.v2.safetensors", conversion.Settings()) == "some model.v2-balanced"
    )
    assert conversion.target_path(str(tmp_path), "new v9.Turbo") == str(tmp_path / "new v9.Turbo.nfq.safetensors")
    for name in ("new", "new.nfq.safetensors", " new "):
        assert conversion.target_path(str(tmp_path), name) == str(tmp_path / "new.nfq.safetensors")
    assert conversion.target_path(str(tmp_path), "sub\\new") == str(tmp_path / "sub" / "new.nfq.safetensors")
    for name in ("", " ", ".", "..", "../new", "sub/../../new", "/elsewhere/new", "sub/"):
        with pytest.raises(Exception, match="is not a file name in"):
            conversion.target_path(str(tmp_path), name)
    for name in ("new.safetensors", "new.ckpt", "new.nfq"):
        with pytest.raises(Exception, match=r"programs list such a file only if .*; call it new\.nfq\.safetensors"):
            conversion.target_path(str(tmp_path), name)


def test_one_checkpoint_is_quantised_at_a_time_and_can_be_stopped(conversion, tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "sub" / "new.nfq.safetensors"
    save_file({"weight": random_half(512, 512), "other.weight": random_half(512, 512, seed=1)}, source)
    converter, settings = conversion.Converter(), conversion.Settings(effort="best")
    lines = converter.run(str(source), str(target), settings)
    assert next(lines) == "reading"
    with pytest.raises(Exception, match="another checkpoint is being quantised"):
        next(converter.run(str(source), str(target), settings))
    converter.stop()
    assert list(lines)[-1] == "stopped; nothing was written" and list(target.parent.iterdir()) == []
    lines = converter.run(str(source), str(target), settings)
    next(lines)
    lines.close()
    assert list(target.parent.iterdir()) == [], "closing the page ends the work"
    assert list(converter.run(str(source), str(target), settings))[-1].startswith(f"{target}: 1.05 MB → 235 KB in")
    assert load(target).keys() == {"weight", "other.weight"}
    for path, overwrite, message in (
        (source, False, "tick Overwrite"),
        (tmp_path / "none.safetensors", True, "no such file"),
    ):
        with pytest.raises(Exception, match=message):
            list(converter.run(str(path), str(target), settings, overwrite))


@pytest.mark.parametrize("weights", [{}, {"weight": random_half(64, 64)}], ids=["all empty", "two empty"])
def test_empty_tensors_do_not_disturb_the_progress(conversion, tmp_path: Path, monkeypatch, weights: dict) -> None:
    """Checkpoints of v-prediction models have empty tensors, `v_pred` and `ztsnr`, which may come first."""
    convert, seen = conversion.quantize_file, []

    def watched(*arguments: object, progress, **named: object) -> dict:
        def report(done: int, total: int, name: str) -> None:
            progress(done, total, name)
            seen.append((done, name))

        return convert(*arguments, progress=report, **named)

    monkeypatch.setattr(conversion, "quantize_file", watched)
    source, target = tmp_path / "source.safetensors", tmp_path / "new.nfq.safetensors"
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(marks | weights, source)
    *_, last = conversion.Converter().run(str(source), str(target), conversion.Settings())
    assert last.startswith(f"{target}: ")
    assert {name for done, name in seen if not done} == marks.keys()
    assert load(target).keys() == marks.keys() | weights.keys()


def test_extras_are_named_and_left_out_by_the_check_box(conversion, tmp_path: Path) -> None:
    shapes = tensor_shapes(TINY, "prefixed")
    tensors = {name: random_half(*shape, seed=n) / 16 for n, (name, shape) in enumerate(shapes.items())}
    save_file(tensors | COMPANIONS | {"model_ema.x": random_half(256, 256)}, tmp_path / "a.safetensors")
    tick = f"; tick {conversion.DROP_EXTRAS!r} to leave them out"
    for drop, message in ((False, tick), (True, "is left out: EMA weights")):
        target = str(tmp_path / f"{drop}.nfq.safetensors")
        lines = conversion.Converter().run(
            str(tmp_path / "a.safetensors"), target, conversion.Settings(), drop_extras=drop
        )
        *_, last = lines
        assert message in last and "--drop-extras" not in last
        assert ("model_ema.x" in load(target)) is not drop


@pytest.mark.parametrize(
    ("preset", "choice", "bits"),
    [("small", "auto", "5bit"), ("balanced", "auto", "8bit"), ("levels", "auto", "8bit")]
    + [("small", bits, bits) for bits in ("keep", "8bit", "5bit")],
)
def test_the_tab_s_choice_for_text_encoders(monkeypatch, tmp_path: Path, preset: str, choice: str, bits: str) -> None:
    program = stub_webui.install(monkeypatch, kind="automatic")
    program.load_extension()
    page = sys.modules[f"{reader(program).__module__.partition('.')[0]}.nfq_webui.page"]
    seen, widgets = [], MagicMock()
    monkeypatch.setattr(page, "gr", widgets)
    monkeypatch.setattr(page.converter, "run", lambda *arguments: seen.append(arguments) or iter(["done"]))
    models, shared = (program.modules[f"modules.{name}"] for name in ("sd_models", "shared"))
    shared.cmd_opts = SimpleNamespace(no_gradio_queue=False, ckpt_dir=str(tmp_path))
    models.get_closet_checkpoint_match = lambda title: Info(f"/models/{title}")
    models.list_models = lambda: None
    program.tabs[0]()
    choices = [call.args[0] for call in widgets.Dropdown.call_args_list]
    assert ["auto", "keep", "8bit", "5bit"] in choices
    # The buttons of a stub are one object: refresh, estimate, quantise, stop.
    quantise = widgets.Button.return_value.click.call_args_list[2].args[0]
    assert list(quantise("a.safetensors", preset, "fast", choice, 16, 32, "new", False, False)) == ["done"]
    _, target, settings, *_ = seen[0]
    assert settings.text_encoder_bits == bits and target == str(tmp_path / "new.nfq.safetensors")
