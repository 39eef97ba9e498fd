"""Converting files there and back: what is quantised, what stays, what is refused."""

from __future__ import annotations

import hashlib
import logging
import math
import os

import pytest
import torch
from forging import plain, split
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import SMALL_MODEL, TINY, random_unet, random_weight

import nfq_core
from nfq_core import NFQFile, NFTensor, Settings, quantize
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import verify_file
from nfq_core.checkpoints.metadata import MAX_METADATA_BYTES, MAX_METADATA_WARNINGS
from nfq_core.errors import CorruptFileError, NFQError, TargetExistsError, UnsupportedFileError, printable
from nfq_core.files.article import write_article_file
from nfq_core.files.container import FACTS_KEY, Source
from nfq_core.files.safetensors_io import tensor_bytes
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from nfq_core.planning.settings import Formats


def exact(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, bytes(tensor_bytes(tensor))


MIXED = {
    "linear.weight": random_weight(40, 50).half(),
    "conv.weight": random_weight(16, 8, 3, 3, seed=1).bfloat16(),
    "wide.weight": random_weight(33, 37, seed=2),
    "double.weight": random_weight(32, 32, seed=3).double(),
    "norm.bias": random_weight(7, seed=4).half(),
    "token_embedding.weight": random_weight(64, 64, seed=5).half(),
    "tiny.weight": random_weight(3, 5, seed=6).half(),
    "empty.weight": torch.empty(0, 4096),
    "position_ids": torch.arange(2048).view(2, 1024),
    "mask": random_weight(64, 64, seed=7) > 0,
    "scale": torch.tensor(3.5),
    "eight.weight": random_weight(64, 64, seed=8).to(torch.float8_e4m3fn),
}
QUANTISED = ["linear.weight", "conv.weight", "wide.weight", "double.weight", "eight.weight"]
MEANT = MIXED | {"eight.weight": MIXED["eight.weight"].half()}
"""What is quantised: eight-bit floats as what a host computes in."""
METADATA = {"modelspec.title": "Größe", "workflow": '{"nodes":["🎨"]}', "prompt": '{"1":{}}', "format": "pt"}


@pytest.fixture
def mixed(tmp_path):
    save_file(MIXED, tmp_path / "mixed.safetensors", metadata=METADATA)
    return tmp_path / "mixed.safetensors"


@pytest.fixture
def container(mixed, tmp_path):
    quantize_file(mixed, tmp_path / "mixed.nfq.safetensors", Settings(Formats()))
    return tmp_path / "mixed.nfq.safetensors"


def test_every_tensor_there_and_back(mixed, tmp_path):
    before = mixed.read_bytes()
    target, back = tmp_path / "a.nfq.safetensors", tmp_path / "back.safetensors"
    result = quantize_file(mixed, target, Settings(Formats()))
    assert (result["quantized"], result["kept"]) == (5, 7)
    assert result["file_bytes"] == target.stat().st_size
    assert result["original_bytes"] == mixed.stat().st_size == len(before)
    assert result["warnings"] == []
    assert mixed.read_bytes() == before

    result = dequantize_file(target, back)
    assert (result["file_bytes"], result["tensors"]) == (back.stat().st_size, len(MIXED))
    restored = load_file(back)
    assert restored.keys() == MIXED.keys()
    for key, tensor in MIXED.items():
        if key in QUANTISED:
            # By definition: the fp16 values of the packed weight, in the dtype that the source had.
            wanted = quantize(MEANT[key], 32 if tensor.dim() > 2 else 16).dequantize(MEANT[key].dtype)
            assert exact(restored[key]) == exact(wanted)
            assert not torch.equal(restored[key], MEANT[key])
        else:
            assert exact(restored[key]) == exact(tensor)


def test_settings_choose_formats_and_are_recorded(mixed, tmp_path):
    settings = Settings(Formats.of(7, 12), effort="best")
    quantize_file(mixed, tmp_path / "a", settings)
    with NFQFile(tmp_path / "a") as file:
        assert {key: entry.format.id for key, entry in file.quantized.items()} == {
            key: "nf12_b64" if key == "conv.weight" else "nf7_b64" for key in QUANTISED
        }
        assert file.facts.settings == settings.as_dict()


def test_trellis_formats_go_all_the_way(mixed, tmp_path):
    settings = Settings(Formats.of(format="t4w8_b64", conv_format="t5w9_b64"))
    quantize_file(mixed, tmp_path / "a", settings)
    assert verify_file(tmp_path / "a")["ok"]
    with NFQFile(tmp_path / "a") as file:
        assert {key: entry.format.id for key, entry in file.quantized.items()} == {
            key: "t5w9_b64" if key == "conv.weight" else "t4w8_b64" for key in QUANTISED
        }
        assert file.facts.settings == settings.as_dict()
    dequantize_file(tmp_path / "a", tmp_path / "back")
    restored = load_file(tmp_path / "back")
    for key in QUANTISED:
        wanted = quantize(MEANT[key], format="t5w9_b64" if key == "conv.weight" else "t4w8_b64")
        assert exact(restored[key]) == exact(wanted.dequantize(MEANT[key].dtype))


def test_the_source_is_recorded(mixed, container):
    with NFQFile(container) as file:
        source = file.facts.source
    assert source.name == "mixed.safetensors"
    assert source.bytes == mixed.stat().st_size
    assert source.sha256 == hashlib.sha256(mixed.read_bytes()).hexdigest()
    assert source.metadata == {name: METADATA[name] for name in ("modelspec.title", "format")}


@pytest.mark.parametrize("tensors", [{}, {"only.bias": torch.ones(3)}, {"empty": torch.empty(0)}])
def test_the_source_hash_covers_files_with_nothing_to_quantise(tmp_path, tensors):
    save_file(tensors, tmp_path / "a")
    result = quantize_file(tmp_path / "a", tmp_path / "b")
    assert (result["quantized"], result["kept"]) == (0, len(tensors))
    with NFQFile(tmp_path / "b") as file:
        assert file.facts.source.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    dequantize_file(tmp_path / "b", tmp_path / "c")
    assert {key: exact(value) for key, value in load_file(tmp_path / "c").items()} == {
        key: exact(value) for key, value in tensors.items()
    }


def test_metadata_is_restored(container, tmp_path):
    dequantize_file(container, tmp_path / "back")
    with safe_open(tmp_path / "back", "pt") as file:
        assert file.metadata() == METADATA


@pytest.mark.parametrize("name", ["workflow", "prompt"])
def test_workflow_and_prompt_stand_where_the_page_looks(mixed, tmp_path, name):
    save_file(MIXED, tmp_path / "one", metadata={name: METADATA[name], "title": "a"})
    for source, wanted in ((mixed, {"workflow", "prompt"}), (tmp_path / "one", {name})):
        quantize_file(source, tmp_path / "a", overwrite=True)
        with NFQFile(tmp_path / "a") as file:
            assert {key: file.metadata[key] for key in wanted} == {key: METADATA[key] for key in wanted}
            assert file.metadata.keys() == {"nfq", "nfq_header_sha256", "format"} | wanted
            assert not file.facts.source.metadata.keys() & {"workflow", "prompt"}
        with safe_open(tmp_path / "a", "pt") as file:
            assert wanted <= file.metadata().keys()


def test_metadata_that_imitates_the_container_does_no_harm(tmp_path):
    metadata = {"nfq_header_sha256": "0" * 64, "workflow": '"nfq_header_sha256":"' + "0" * 64 + '"'}
    save_file(MIXED, tmp_path / "a", metadata=metadata)
    quantize_file(tmp_path / "a", tmp_path / "b")
    dequantize_file(tmp_path / "b", tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        assert file.metadata() == metadata | {"format": "pt"}


LONG = {
    "a workflow": ({"title": "b", "workflow": "w" * (1 << 20)}, ["workflow"]),
    "the longest of several": ({"a": "a" * 600_000, "b": "b" * 700_000, "c": "c" * 400_000}, ["b"]),
    "two of several": ({"a": "a" * 900_000, "b": "b" * 800_000, "c": "c" * 700_000}, ["a", "b"]),
    "many bytes of few characters": ({"a": "ä" * 600_000, "b": "b" * 500_000}, ["a"]),
    # Each takes four bytes, as JSON within JSON.
    "quotes": ({"a": '"' * 300_000, "b": "b" * 600_000}, ["a"]),
    # Each takes seven.
    "control characters": ({"a": "\x01" * (1 << 20)}, ["a"]),
    "a name": ({"a" * (1 << 20): "b", "c": "d"}, ["a" * (1 << 20)]),
}


@pytest.mark.parametrize(("metadata", "left_out"), LONG.values(), ids=LONG)
def test_metadata_too_long_for_the_header_is_left_out_with_a_warning(tmp_path, caplog, metadata, left_out):
    save_file({"a.weight": random_weight(32, 33)}, tmp_path / "a", metadata=metadata)
    with caplog.at_level(logging.WARNING, logger="nfq"):
        result = quantize_file(tmp_path / "a", tmp_path / "b", Settings(Formats()))
    assert result["quantized"] == 1
    for name, warning in zip(left_out, result["warnings"], strict=True):
        wanted = f"metadata {name!r} is left out: {len(metadata[name]):,} characters are too many for the header"
        assert warning == printable(wanted)
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'a'}: {w}" for w in result["warnings"]]
    dequantize_file(tmp_path / "b", tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        kept = {name: text for name, text in metadata.items() if name not in left_out}
        assert file.metadata() == kept | {"format": "pt"}


def test_very_many_texts_of_metadata_are_left_out_in_few_words(tmp_path):
    # Six bytes a name and six a text, as JSON within JSON, and four or five digits: 80,000 take more than a mebibyte.
    save_file({"a.weight": random_weight(32, 33)}, tmp_path / "a", metadata={str(n): "" for n in range(80_000)})
    warnings = quantize_file(tmp_path / "a", tmp_path / "b", Settings(Formats()))["warnings"]
    assert len(warnings) == MAX_METADATA_WARNINGS + 1
    with NFQFile(tmp_path / "b") as file:
        left_out = 80_000 - len(file.facts.source.metadata)
    assert warnings[-1] == f"{left_out - MAX_METADATA_WARNINGS:,} more entries of the metadata are left out"


def test_dequantised_files_do_not_claim_to_be_containers(tmp_path):
    source = Source("a", 0, "", {FACTS_KEY: "{}", "title": "b"})
    nfq_core.save({"a.bias": torch.ones(3)}, tmp_path / "a", source=source)
    dequantize_file(tmp_path / "a", tmp_path / "b")
    with safe_open(tmp_path / "b", "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "b"}


def test_metadata_just_short_enough_is_kept(tmp_path):
    # Name and text each take six bytes more than their own, as JSON within JSON: the quotes of both, and backslashes.
    metadata = {"workflow": "w" * (MAX_METADATA_BYTES - len("workflow") - 12)}
    save_file({"a.weight": random_weight(32, 33)}, tmp_path / "a", metadata=metadata)
    assert quantize_file(tmp_path / "a", tmp_path / "b", Settings(Formats()))["warnings"] == []
    with NFQFile(tmp_path / "b") as file:
        assert file.metadata["workflow"] == metadata["workflow"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_dtype_touches_quantised_tensors_only(container, tmp_path, dtype):
    dequantize_file(container, tmp_path / "back", dtype)
    restored = load_file(tmp_path / "back")
    for key, tensor in MIXED.items():
        if key in QUANTISED:
            halves = quantize(MEANT[key], 32 if tensor.dim() > 2 else 16).dequantize()
            assert exact(restored[key]) == exact(halves.to(dtype))
        else:
            assert exact(restored[key]) == exact(tensor)


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_a_unet_in_every_layout(tmp_path, layout):
    tensors = random_unet(layout, architecture=TINY)
    beside = {"first_stage_model.decoder.conv_in.weight": random_weight(64, 64, 3, 3).half()}
    save_file(tensors | beside, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    with NFQFile(tmp_path / "b") as file:
        assert (file.facts.layout, file.facts.architecture) == (layout, "unknown")
        first, last, inner = {
            "diffusers": ("conv_in.weight", "conv_out.weight", "mid_block.resnets.0.conv1.weight"),
        }.get(layout, ("input_blocks.0.0.weight", "out.2.weight", "middle_block.0.in_layers.2.weight"))
        prefix = CHECKPOINT_PREFIX if layout == "prefixed" else ""
        assert beside.keys() | {prefix + first, prefix + last} <= file.kept.keys()
        assert prefix + inner in file.quantized


def test_source_order_and_names_do_not_matter(tmp_path):
    tensors = {"zwei/ü 2": random_weight(32, 32).half(), "": torch.ones(3), 'a\nb"c\\': random_weight(32, 33)}
    save_file(tensors, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    dequantize_file(tmp_path / "b", tmp_path / "c")
    assert load_file(tmp_path / "c").keys() == tensors.keys()


HARD = {
    "zeros": torch.zeros(64, 64).half(),
    "zero blocks": torch.cat([torch.zeros(16, 64), random_weight(16, 64), torch.zeros(1, 64)]).half(),
    "a huge outlier": random_weight(64, 64).mul(0.01).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(3e4)),
    "one weight above zero": torch.zeros(64, 64).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0)),
    "a constant": torch.full((64, 64), 0.1).half(),
    "rows of one": random_weight(2000, 1).half(),
    "rows of 1,001": random_weight(3, 1001).half(),
    "a prime number of weights": random_weight(1, 1031).half(),
    "bf16 over many octaves": (random_weight(64, 64) * torch.logspace(-3, 3, 64)[:, None]).bfloat16(),
    "fp32 subnormal in fp16": (random_weight(64, 64) * torch.logspace(-9, 0, 64)[:, None]),
    "fp32 just inside fp16": random_weight(64, 64).clamp(-1, 1) * 3e4,
    "fp16's largest number": random_weight(64, 64)
    .mul(0.02)
    .index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-65504.0)),
    "fp16 up to its ends": (random_weight(64, 64) * 3e4).clamp(-65504, 65504).half(),
    "one tiny block of many": torch.cat([random_weight(1, 64) * 1e-5, random_weight(1200, 64)]),
}


@pytest.mark.parametrize("weight", HARD.values(), ids=HARD)
@pytest.mark.parametrize("levels", [32, 16, 7])
def test_must_convert(tmp_path, weight, levels):
    save_file({"a.weight": weight}, tmp_path / "a")
    assert quantize_file(tmp_path / "a", tmp_path / "b", Settings(Formats.of(levels, levels)))["quantized"] == 1
    dequantize_file(tmp_path / "b", tmp_path / "c")
    restored = load_file(tmp_path / "c")["a.weight"]
    assert (restored.dtype, restored.shape) == (weight.dtype, weight.shape)
    blocks = torch.nn.functional.pad(weight.flatten().double(), (0, -weight.numel() % 64)).view(-1, 64)
    errors = torch.nn.functional.pad(restored.flatten().double(), (0, -weight.numel() % 64)).view(-1, 64) - blocks
    largest = blocks.abs().amax(dim=1)
    assert (errors[largest == 0] == 0).all()
    # Whatever scale is best for a block, the all-zero result would have this error; a scale can be wrong by one step of
    # the coarsest grid, 2**(3/16), and the smallest is 2**-14, which leaves weights under its own size unresolved.
    bound = blocks.square().sum(dim=1).clamp_min(64 * 2.0**-28)
    assert (errors.square().sum(dim=1) <= bound).all()
    # No weight of ours is far beyond its block's largest: fp16 rounding and a 2**(15/16) scale range at most.
    assert restored.abs().max() <= weight.abs().max() * 2.0


UNFIT = {
    "a NaN": (
        random_weight(64, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(math.nan)),
        "NaN or Inf",
    ),
    "an Inf": (
        random_weight(64, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-math.inf)),
        "NaN or Inf",
    ),
    "NaN only": (torch.full((64, 64), math.nan).bfloat16(), "NaN or Inf"),
    "beyond fp16": (random_weight(64, 64) * 1e5, "out of the range of fp16 scales"),
    "many blocks below every scale": (
        (random_weight(64, 64) * torch.logspace(-6, 3, 64)[:, None]).bfloat16(),
        "of its blocks that hold weights would decode to zeros",
    ),
    "far below fp16": (random_weight(64, 64) * 1e-12, "out of the range of fp16 scales"),
}


@pytest.mark.parametrize(("weight", "reason"), UNFIT.values(), ids=UNFIT)
def test_kept_with_a_warning_naming_the_tensor(tmp_path, caplog, weight, reason):
    good = random_weight(63, 65).half()
    save_file({"good.weight": good, "bad.weight": weight, "z.bias": torch.ones(3)}, tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="nfq"):
        result = quantize_file(tmp_path / "a", tmp_path / "b", Settings(Formats()))
    assert (result["quantized"], result["kept"]) == (1, 2)
    (warning,) = result["warnings"]
    assert "tensor 'bad.weight' is kept as it is" in warning
    assert reason in warning
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'a'}: {warning}"]
    dequantize_file(tmp_path / "b", tmp_path / "c", torch.float16)
    for path in ("b", "c"):
        assert exact(load_file(tmp_path / path)["bad.weight"]) == exact(weight)


def test_a_dtype_that_torch_lacks_is_carried_through(tmp_path):
    header = {
        "a.weight": {"dtype": "F16", "shape": [32, 32], "data_offsets": [0, 2048]},
        "b.scale": {"dtype": "F8_E3M4", "shape": [4], "data_offsets": [2048, 2052]},
    }
    data = bytes(tensor_bytes(random_weight(32, 32).half())) + b"\x7e\x7f\x80\x81"
    (tmp_path / "a").write_bytes(plain(header, data))
    quantize_file(tmp_path / "a", tmp_path / "b")
    dequantize_file(tmp_path / "b", tmp_path / "c")
    with NFQFile(tmp_path / "b") as file, pytest.raises(UnsupportedFileError, match=r"'b\.scale' has dtype F8_E3M4"):
        file.load("b.scale")
    written, payload = split((tmp_path / "c").read_bytes())
    assert written["b.scale"]["dtype"] == "F8_E3M4"
    assert payload[-4:] == b"\x7e\x7f\x80\x81"


def test_bytes_do_not_depend_on_threads(mixed, tmp_path, monkeypatch):
    files = []
    for threads in (1, 3):
        monkeypatch.setattr("nfq_core.parallel.default_threads", lambda threads=threads: threads)
        quantize_file(mixed, tmp_path / f"{threads}")
        files.append((tmp_path / f"{threads}").read_bytes())
    assert files[0] == files[1]


def test_progress_tells_of_every_tensor_and_ends_at_the_total(mixed, container, tmp_path):
    for convert, source, tensors in ((quantize_file, mixed, MIXED), (dequantize_file, container, MEANT)):
        seen = []
        convert(source, tmp_path / "out", overwrite=True, progress=lambda *args, seen=seen: seen.append(args))
        assert {name for _, _, name in seen} == MIXED.keys()
        assert len({total for _, total, _ in seen}) == 1
        assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
        assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("convert", [quantize_file, dequantize_file])
def test_an_interrupted_conversion_leaves_nothing_behind(mixed, container, tmp_path, convert):
    (tmp_path / "old").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = mixed if convert is quantize_file else container
    for target, overwrite in (("new", False), ("old", True)):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / target, overwrite=overwrite, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_quantised_file_is_not_quantised_again(container, tmp_path):
    with pytest.raises(NFQError, match=r"is quantised already; dequantise it first with `nfq dequantize`"):
        quantize_file(container, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_plain_file_is_not_dequantised(mixed, tmp_path):
    with pytest.raises(UnsupportedFileError, match=r"is not an \.nfq\.safetensors file"):
        dequantize_file(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_source_is_never_overwritten_by_its_result(mixed, container, overwrite):
    for convert, source in ((quantize_file, mixed), (dequantize_file, container)):
        before = source.read_bytes()
        with pytest.raises(NFQError, match="is the source itself"):
            convert(source, source, overwrite=overwrite)
        assert source.read_bytes() == before


def test_existing_targets(mixed, container, tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    for convert, source in ((quantize_file, mixed), (dequantize_file, container)):
        with pytest.raises(TargetExistsError):
            convert(source, tmp_path / "old")
        assert (tmp_path / "old").read_bytes() == b"old"
    quantize_file(mixed, tmp_path / "old", Settings(Formats()), overwrite=True)
    assert (tmp_path / "old").read_bytes() == container.read_bytes()


def test_a_damaged_tensor_stops_dequantising(container, tmp_path):
    with NFQFile(container) as file:
        last = max(file.entries, key=lambda name: file.entries[name].end).removeprefix("nfq.")
    data = bytearray(container.read_bytes())
    data[-1] ^= 16
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(CorruptFileError, match=rf"bad: tensor '{last}' is damaged"):
        dequantize_file(tmp_path / "bad", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_source_that_shrinks_while_it_is_read(mixed, tmp_path):
    def cut(*_: object) -> None:
        with open(mixed, "r+b") as file:
            file.truncate(3000)

    with pytest.raises(CorruptFileError, match=r"mixed\.safetensors became shorter"):
        quantize_file(mixed, tmp_path / "a", progress=cut)
    assert not (tmp_path / "a").exists()


def test_packed_weights_stay_packed(container):
    with NFQFile(container) as file:
        assert all(isinstance(file.load(key), NFTensor) for key in QUANTISED)


def test_an_article_file_is_left_to_its_importer(tmp_path):
    write_article_file(tmp_path / "a", {"linear.weight": random_weight(64, 64)}, 16, 32)
    with pytest.raises(UnsupportedFileError, match="import-article"):
        quantize_file(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_a_target_it_goes_next_to_the_source(tmp_path):
    save_file(SMALL_MODEL, tmp_path / "model.safetensors")
    made = quantize_file(tmp_path / "model.safetensors", preset="small")
    assert made["target"] == str(tmp_path / "model-small.nfq.safetensors")
    assert made["file_bytes"] == os.path.getsize(made["target"])
    (tmp_path / "folder").mkdir()
    back = dequantize_file(made["target"], tmp_path / "folder", torch.float32)
    assert back["target"] == str(tmp_path / "folder" / "model-small-fp32.safetensors")
    with pytest.raises(TargetExistsError, match="exists already; overwrite=True overwrites it"):
        quantize_file(tmp_path / "model.safetensors", preset="small")
    quantize_file(tmp_path / "model.safetensors", preset="small", overwrite=True)


WRONG_SETTINGS = {
    "an unknown preset": ({"preset": "smal"}, "preset must be one of large, balanced, small, tiny, got 'smal'"),
    "both": ({"preset": "small", "settings": Settings()}, r"write Settings\.of\(preset='small', …\)"),
    "a preset as settings": ({"settings": "small"}, "write preset='small'"),
}


@pytest.mark.parametrize(("given", "told"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings_are_refused(tmp_path, given, told):
    save_file(SMALL_MODEL, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        quantize_file(tmp_path / "model.safetensors", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
