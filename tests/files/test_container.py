"""The container: readable by the library, and every change of every byte noticed."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from math import prod

import pytest
import torch
import zstandard
from forging import compressed, forge, replaced
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import random_half

import nfq_core
from nfq_core.errors import CorruptFileError, NFQError, UnsupportedFileError
from nfq_core.files.container import HASH_KEY, MAX_CONTAINER_HEADER_BYTES, PREFIX, Facts, NFQFile, Source
from nfq_core.files.safetensors_io import DTYPE_NAMES, Entry, dtype_bytes, tensor_bytes
from nfq_core.files.writer import ContainerWriter, Plan
from nfq_core.fitting.quantizer import quantize
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.packed.codec import decode, encode
from nfq_core.packed.formats import nf_format
from nfq_core.planning.policy import plan_tensors

FACTS = Facts({"levels": 16}, "plain", "unknown", Source("a.safetensors", 2062, "5" * 64, {"title": "Ä"}))


WEIGHT = random_half(16, 64)
BIAS = random_half(7, seed=1)


def write(path, tensors, **options) -> int:
    """A container of `tensors`, those of two dimensions quantised to 16 levels."""
    packed = {key: quantize(tensor) for key, tensor in tensors.items() if tensor.dim() == 2}
    plans = {
        key: Plan(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), nf_format(16) if key in packed else None)
        for key, tensor in tensors.items()
    }
    with ContainerWriter(path, plans, FACTS, **options) as writer:
        for key, tensor in tensors.items():
            if key in packed:
                writer.write_quantized(key, encode(packed[key].data, packed[key].sections))
            else:
                writer.write_kept(key, [tensor_bytes(tensor)])
        return writer.finish()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One quantised weight and one kept bias."""
    path = tmp_path_factory.mktemp("container") / "small.nfq.safetensors"
    write(path, {"a.weight": WEIGHT, "a.bias": BIAS})
    return path


def load_all(path) -> dict[str, bytes]:
    """The bytes of every tensor by its own name, verified."""
    with NFQFile(path) as file:
        found = {}
        for key in [*file.kept, *file.quantized]:
            tensor = file.load(key)
            file.verify(key)
            found[key] = bytes(tensor_bytes(tensor.data if key in file.quantized else tensor))
        return found


def refusal(path, error=CorruptFileError) -> str:
    with pytest.raises(NFQError) as caught:
        load_all(path)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_is_written_is_read(small):
    with NFQFile(small) as file:
        assert file.keys() == ["a.bias", "a.weight"]
        assert file.container_version == 1
        assert file.writer == f"ComfyUI-NFQ {nfq_core.__version__}"
        assert file.facts == FACTS
        assert torch.equal(file.load("a.bias"), BIAS)
        weight, wanted = file.load("a.weight"), quantize(WEIGHT)
        assert (weight.format, weight.shape, weight.dtype) == (wanted.format, wanted.shape, wanted.dtype)
        assert torch.equal(weight.data, wanted.data)
        assert file.stored_bytes("a.bias") == 14
        assert file.stored_bytes("a.weight") == file.entries["nfq.a.weight"].nbytes


def test_sizes_of_tensors(small):
    with NFQFile(small) as file:
        keys = file.keys()
        assert [file.packed_bytes(key) for key in keys] == [14, 562]
        assert [file.dense_bytes(key) for key in keys] == [14, 2048]


def test_the_library_reads_it(small):
    tensors = load_file(small)
    assert tensors.keys() == {"a.bias", "nfq.a.weight"}
    assert torch.equal(tensors["a.bias"], BIAS)
    stored = tensors["nfq.a.weight"]
    assert stored.dtype == torch.uint8
    assert stored.dim() == 1
    with safe_open(small, "pt") as file:
        metadata = file.metadata()
    # The documented layout, read with nothing of ours but the codec.
    item = json.loads(metadata["nfq"])["quantized"]["a.weight"]
    packed = quantize(WEIGHT)
    assert (item["format"], item["shape"], item["dtype"]) == ("nf16_b64", [16, 64], "F16")
    assert sum(item["frames"]) == len(stored)
    assert torch.equal(
        decode(memoryview(stored.numpy()), item["frames"], packed.format.sections(WEIGHT.numel())), packed.data
    )
    assert metadata["format"] == "pt"


def test_workflow_and_prompt_are_metadata_of_their_own(tmp_path):
    extra = {"workflow": '{"nodes":[{"title":"Größe 🎨"}]}', "prompt": '{"1":{}}'}
    write(tmp_path / "a", {"a.weight": WEIGHT}, extra=extra)
    with safe_open(tmp_path / "a", "pt") as file:
        assert extra.items() <= file.metadata().items()
    assert load_all(tmp_path / "a").keys() == {"a.weight"}


def test_a_workflow_that_imitates_the_hash_field_does_no_harm(tmp_path):
    extra = {"workflow": f'"{HASH_KEY}":"{"0" * 64}"', "prompt": "0" * 64, HASH_KEY + "2": "0" * 64}
    write(tmp_path / "a", {"a.weight": WEIGHT}, extra=extra)
    assert load_all(tmp_path / "a").keys() == {"a.weight"}


def test_the_same_tensors_make_the_same_bytes(small, tmp_path):
    write(tmp_path / "again", {"a.weight": WEIGHT, "a.bias": BIAS})
    assert (tmp_path / "again").read_bytes() == small.read_bytes()


def test_kept_tensors_are_aligned_to_their_own_size(tmp_path):
    dtypes = [torch.uint8, torch.float64, torch.bool, torch.float16, torch.int64, torch.float32, torch.bfloat16]
    tensors = {f"{n}.{dtype}": torch.ones(2 * n + 1).to(dtype) for n, dtype in enumerate(dtypes * 2)}
    write(tmp_path / "a", {"first": WEIGHT, **tensors})
    with NFQFile(tmp_path / "a") as file:
        assert len(file.raw_header) % 8 == 0
        for key in tensors:
            assert file.entries[key].start % dtype_bytes(file.entries[key].dtype) == 0
            assert torch.equal(file.load(key), tensors[key])


def test_a_weight_planned_to_be_quantised_may_be_kept(tmp_path):
    plans = {key: Plan("F16", (16, 64), nf_format(16)) for key in ("a", "b")}
    with ContainerWriter(tmp_path / "a", plans, FACTS) as writer:
        writer.write_kept("a", [memoryview(tensor_bytes(WEIGHT))[:99], tensor_bytes(WEIGHT)[99:]])
        writer.write_quantized("b", encode(quantize(WEIGHT).data, nf_format(16).sections(1024)))
        assert writer.quantized_keys == ["b"]
        writer.finish()
    assert load_all(tmp_path / "a")["a"] == bytes(tensor_bytes(WEIGHT))
    assert torch.equal(load_file(tmp_path / "a")["a"], WEIGHT)


def test_a_container_without_tensors(tmp_path):
    assert write(tmp_path / "a", {}) == (tmp_path / "a").stat().st_size
    assert load_all(tmp_path / "a") == {}


def test_without_finish_no_file_appears(tmp_path):
    with ContainerWriter(tmp_path / "a", {"a": Plan("F16", (7,))}, FACTS) as writer:
        writer.write_kept("a", [tensor_bytes(BIAS)])
    assert list(tmp_path.iterdir()) == []


def test_the_header_of_sdxl_stays_under_four_mebibytes(tmp_path):
    entries = {key: Entry("F16", shape, 0, 0) for key, shape in tensor_shapes(SDXL_BASE, "prefixed").items()}
    plans = plan_tensors(entries, nfq_core.Settings())[1]
    with ContainerWriter(tmp_path / "a", plans, FACTS) as writer:
        # Half a megabyte of workflow still fits beside it.
        assert writer._reserved < MAX_CONTAINER_HEADER_BYTES - (1 << 19)
    assert prod(plans["model.diffusion_model.out.2.weight"].shape) == 320 * 4 * 9


def test_a_header_beyond_four_mebibytes_is_refused(tmp_path):
    with pytest.raises(NFQError, match=r"a: the header may need 4,\d+,\d+ bytes of the 4,194,304 allowed"):
        write(tmp_path / "a", {"a.weight": WEIGHT}, extra={"workflow": " " * (4 << 20)})
    assert list(tmp_path.iterdir()) == []


def test_a_header_of_too_many_tensors_is_refused(tmp_path):
    with pytest.raises(NFQError, match=r"of the 4,194,304 allowed; there are too many tensors"):
        ContainerWriter(tmp_path / "a", {f"tensor {i}": Plan("F16", (1,)) for i in range(60_000)}, FACTS)


def header_of(small, target, size: int):
    """A sound copy of `small` whose header has `size` bytes."""

    def fill(header, facts):
        header["__metadata__"]["workflow"] = " " * (size - empty)

    empty = 0
    forge(small, target, lambda header, facts: header["__metadata__"].update(workflow=""))
    empty = 8 + int.from_bytes(target.read_bytes()[:8], "little")
    return forge(small, target, fill)


def test_a_header_of_four_mebibytes_is_read(small, tmp_path):
    path = header_of(small, tmp_path / "a", MAX_CONTAINER_HEADER_BYTES)
    assert 8 + int.from_bytes(path.read_bytes()[:8], "little") == MAX_CONTAINER_HEADER_BYTES == 4 << 20
    assert load_all(path) == load_all(small)


def test_a_reader_refuses_a_header_beyond_four_mebibytes(small, tmp_path):
    path = header_of(small, tmp_path / "a", MAX_CONTAINER_HEADER_BYTES + 1)
    assert "has 4,194,305 bytes, that of one at most 4,194,304" in refusal(path, UnsupportedFileError)


@pytest.mark.parametrize("name", [PREFIX + "a", "__metadata__"])
def test_names_that_the_format_needs_itself_are_refused(tmp_path, name):
    with pytest.raises(NFQError, match="name"):
        write(tmp_path / "a", {name: BIAS})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"x": float("nan")}, {"x": 10**20}, {"x": "\udcff"}, {"x": object()}])
def test_facts_that_our_reader_would_refuse_are_not_written(tmp_path, settings):
    with pytest.raises(NFQError, match="a name or setting cannot be written to the header"):
        nfq_core.save({"a": BIAS}, tmp_path / "a", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_unicode_is_refused(tmp_path):
    with pytest.raises(NFQError, match="a name or setting cannot be written to the header"):
        nfq_core.save({"a\udcff": BIAS}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_before_any_work(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(nfq_core.TargetExistsError):
        ContainerWriter(tmp_path / "a", {}, FACTS)
    assert (tmp_path / "a").read_bytes() == b"old"


def test_every_flipped_bit_is_noticed(small, tmp_path):
    data, path = small.read_bytes(), tmp_path / "flipped"
    path.write_bytes(data)
    assert load_all(path).keys() == {"a.weight", "a.bias"}
    silent = []
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([byte ^ (1 << bit)]))
                try:
                    load_all(path)
                except (CorruptFileError, UnsupportedFileError):
                    continue
                silent.append((position, bit))
            file.seek(position)
            file.write(bytes([byte]))
    assert silent == []
    assert path.read_bytes() == data


def test_every_changed_byte_of_the_header_is_noticed_even_padding(small, tmp_path):
    data = small.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert data[end - 1 : end] == b" "
    for position in range(8, end):
        # White space and digits: what JSON would pass over, or read as another number.
        for byte in b"\t 0":
            if data[position] != byte:
                (tmp_path / "a").write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
                with pytest.raises((CorruptFileError, UnsupportedFileError)):
                    NFQFile(tmp_path / "a")


def test_every_truncation_is_noticed(small, tmp_path):
    data = small.read_bytes()
    for length in [*range(0, 40), *range(40, len(data), 37), len(data) - 1]:
        (tmp_path / "a").write_bytes(data[:length])
        refusal(tmp_path / "a", UnsupportedFileError if length < 9 else CorruptFileError)


def test_zeroed_and_doubled_stretches_are_noticed(small, tmp_path):
    data = small.read_bytes()
    generator = random.Random(0)
    for _ in range(100):
        start = generator.randrange(len(data) - 1)
        end = generator.randrange(start + 1, min(start + 500, len(data)) + 1)
        for damaged in (data[:start] + bytes(end - start) + data[end:], data[:end] + data[start:]):
            if damaged != data:
                (tmp_path / "a").write_bytes(damaged)
                with pytest.raises((CorruptFileError, UnsupportedFileError)):
                    load_all(tmp_path / "a")


def test_a_damaged_tensor_is_named_and_the_others_are_read(small, tmp_path):
    data = bytearray(small.read_bytes())
    data[-1] ^= 1
    (tmp_path / "a").write_bytes(data)
    with NFQFile(tmp_path / "a") as file:
        assert torch.equal(file.load("a.bias"), BIAS)
        for read in (file.load, file.verify):
            with pytest.raises(CorruptFileError, match=r"tensor 'a\.weight' is damaged \(checksum mismatch\)"):
                read("a.weight")


def test_forging_nothing_leaves_a_sound_file(small, tmp_path):
    assert load_all(forge(small, tmp_path / "a", lambda header, facts: None)) == load_all(small)


def test_a_newer_container_names_both_versions(small, tmp_path):
    path = forge(small, tmp_path / "a", lambda header, facts: facts | {"container_version": 7})
    message = refusal(path, UnsupportedFileError)
    assert "container version 7" in message
    assert "reads up to 1" in message
    assert "update the plugin" in message


def test_a_newer_container_may_differ_in_everything_else(small, tmp_path):
    path = forge(small, tmp_path / "a", lambda header, facts: {"container_version": 2}, sign=False)
    assert "update the plugin" in refusal(path, UnsupportedFileError)


def test_an_unknown_format_is_named(small, tmp_path):
    def change(header, facts):
        facts["quantized"]["a.weight"]["format"] = "nf16_b128"

    message = refusal(forge(small, tmp_path / "a", change), UnsupportedFileError)
    assert "'nf16_b128'" in message
    assert "nf16_b64" in message
    assert "update the plugin" in message


def test_a_foreign_file_is_no_container(tmp_path):
    save_file({"a": BIAS}, tmp_path / "a")
    assert "is not an .nfq.safetensors file" in refusal(tmp_path / "a", UnsupportedFileError)


def quantized(**fields):
    def change(header, facts):
        facts["quantized"]["a.weight"].update(fields)

    return change


def facts(**fields):
    return lambda header, facts: facts | fields


def source(**fields):
    return lambda header, facts: facts | {"source": asdict(FACTS.source) | fields}


def source_without(name):
    def change(header, facts):
        del facts["source"][name]

    return change


def without_hash(header, facts):
    del header["__metadata__"][HASH_KEY]


def hash_of_surrogates(header, facts):
    header["__metadata__"][HASH_KEY] = "\ud800" * 64


def renamed(old, new):
    def change(header, facts):
        header[new] = header.pop(old)

    return change


def also_kept(header, facts):
    facts["kept"]["a.weight"] = facts["kept"].pop("a.bias")
    header["a.weight"] = header.pop("a.bias")


def frames(change):
    def changed(header, facts):
        item = facts["quantized"]["a.weight"]
        item["frames"] = change(item["frames"])

    return changed


def lacking(name):
    def change(header, facts):
        del facts[name]

    return change


LIES = {
    "a shape too large": (quantized(shape=[32, 64]), "a.weight"),
    "a shape too small": (quantized(shape=[8, 64]), "a.weight"),
    "an enormous shape": (quantized(shape=[1 << 40, 1 << 20]), "needs"),
    "a product beyond 63 bits": (quantized(shape=[1 << 62] * 4), "needs more memory than there can be"),
    "a product that zero hides": (quantized(shape=[1 << 62, 1 << 62, 0]), "needs more memory than there can be"),
    "a zero in the shape": (quantized(shape=[0, 64]), "impossible shape"),
    "two minuses": (quantized(shape=[-16, -64]), "not a count"),
    "a fraction in the shape": (quantized(shape=[16.0, 64]), "not a count"),
    "text in the shape": (quantized(shape=["16", 64]), "not a count"),
    "a shape that is a number": (quantized(shape=1024), "damaged"),
    "infinity": (lambda header, facts: json.dumps(facts).replace("[16, 64]", "[1e999, 64]"), "damaged"),
    "another format of the same planes": (quantized(format="nf32_b64"), "needs"),
    "a format that is a list": (quantized(format=["nf16_b64"]), "damaged"),
    "an integer dtype": (quantized(dtype="I64"), "impossible shape or dtype"),
    "an unknown dtype": (quantized(dtype="F99"), "impossible shape or dtype"),
    "a dtype that is a list": (quantized(dtype=["F16"]), "damaged"),
    "a wrong checksum": (quantized(crc32="00000000"), "checksum mismatch"),
    "a checksum that is a number": (quantized(crc32=0), "not text"),
    "one frame too few": (frames(lambda lengths: lengths[:-1]), "needs"),
    "one frame too many": (frames(lambda lengths: [*lengths, 1]), "needs"),
    "an empty frame": (frames(lambda lengths: [0, *lengths[1:-1], lengths[-1] + lengths[0]]), "needs"),
    "a negative frame": (frames(lambda lengths: [-1, *lengths[1:-1], lengths[-1] + lengths[0] + 1]), "not a count"),
    "frames that exceed the tensor": (frames(lambda lengths: [*lengths[:-1], lengths[-1] + 1]), "needs"),
    "frames cut elsewhere": (frames(lambda lengths: [lengths[0] - 1, lengths[1] + 1, *lengths[2:]]), "'a.weight'"),
    "no frames": (quantized(frames=None), "damaged"),
    "no hash": (without_hash, "checksum mismatch"),
    "a hash that is no text": (hash_of_surrogates, "damaged"),
    "a quantised tensor that is not there": (renamed("nfq.a.weight", "nfq.b.weight"), "damaged"),
    "a kept tensor that is not there": (renamed("a.bias", "b.bias"), "disagrees with itself about tensor 'a.bias'"),
    "a kept tensor that nobody tells of": (facts(kept={}), "disagrees with itself about tensor 'a.bias'"),
    "a tensor both kept and quantised": (also_kept, "disagrees with itself about tensor 'a.weight'"),
    "kept tensors that are a list": (facts(kept=["a.bias"]), "damaged"),
    "quantised tensors that are a list": (facts(quantized=[]), "damaged"),
    "no settings": (lacking("settings"), "damaged"),
    "no source": (lacking("source"), "damaged"),
    "no version": (lacking("container_version"), "damaged"),
    "version 0": (facts(container_version=0), "container version 0 does not exist"),
    "a negative version": (facts(container_version=-1), "damaged"),
    "a version that is true": (facts(container_version=True), "damaged"),
    "a version that is text": (facts(container_version="1"), "damaged"),
    "an infinite version": (
        lambda header, facts: json.dumps(facts).replace('"container_version": 1', '"container_version": 1e999'),
        "damaged",
    ),
    "a version that is a constant": (
        lambda header, facts: json.dumps(facts).replace('"container_version": 1', '"container_version": Infinity'),
        "damaged",
    ),
    "a stored tensor of another dtype": (lambda header, facts: header["nfq.a.weight"].update(dtype="I8"), "1-D U8"),
    "a stored tensor of two dimensions": (
        lambda header, facts: header["nfq.a.weight"].update(shape=[1, *header["nfq.a.weight"]["shape"]]),
        "1-D U8",
    ),
    "a kept tensor that is also the weight": (
        lambda header, facts: facts["kept"].update({"nfq.a.weight": facts["quantized"]["a.weight"]["crc32"]}),
        "no tensor may be called 'nfq.a.weight'",
    ),
    "a sensitivity that is text": (quantized(sensitivity="nan"), "is not a number"),
    "a sensitivity that is true": (quantized(sensitivity=True), "is not a number"),
    "a writer that is a list": (facts(writer=[]), "is not text"),
    "a kept checksum that is a number": (lambda header, facts: facts["kept"].update({"a.bias": 0}), "is not text"),
    "settings that are pairs": (facts(settings=[["levels", 16]]), "is not an object"),
    "a shape of 65 sizes": (quantized(shape=[1] * 65), "65 dimensions"),
    "a source with text for bytes": (source(bytes="2062"), "damaged"),
    "a source with a number for a hash": (source(sha256=5), "damaged"),
    "a source whose metadata is no text": (source(metadata={"a": 1}), "damaged"),
    "a source whose metadata is a list": (source(metadata=[]), "damaged"),
    **{f"a source without {name}": (source_without(name), "damaged") for name in asdict(FACTS.source)},
    "settings that are a number": (facts(settings=3), "damaged"),
    "a layout that is a list": (facts(layout=[]), "damaged"),
    "facts that are a list": (lambda header, facts: "[1]", "damaged"),
    "facts that are cut": (lambda header, facts: json.dumps(facts)[:-5], "damaged"),
    "facts without end": (lambda header, facts: '{"container_version":' + "[" * 100_000, "damaged"),
    "a key that stands twice": (
        lambda header, facts: json.dumps(facts).replace('"kept": {', '"kept": {"a.bias": "00000000", '),
        "damaged",
    ),
    "half of a surrogate pair": (
        lambda header, facts: json.dumps(facts).replace("unknown", "\\ud83d"),
        "damaged",
    ),
}


@pytest.mark.parametrize(("change", "reason"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(small, tmp_path, change, reason):
    assert reason in refusal(forge(small, tmp_path / "a", change, sign=change is not hash_of_surrogates))


def test_fields_that_we_do_not_know_are_ignored(small, tmp_path):
    def change(header, facts):
        for fields in (facts, facts["source"], facts["settings"], facts["quantized"]["a.weight"]):
            fields["colour"] = {"blue": [1, None]}

    path = forge(small, tmp_path / "a", change)
    assert load_all(path) == load_all(small)
    with NFQFile(path) as file:
        assert file.facts.source == FACTS.source


@pytest.mark.parametrize("read", ["load", "verify"])
def test_too_little_memory_is_told_with_file_and_tensor(small, monkeypatch, read):
    def refuse(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with NFQFile(small) as file:
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(NFQError) as caught:
            getattr(file, read)("a.weight")
    assert type(caught.value) is NFQError
    # The levels, 8 groups of 64 bytes, 16 scales and two parameters.
    wanted = f"{small}: tensor 'a.weight': it needs 562 bytes of memory, more than there is"
    assert str(caught.value) == wanted


# The frames of a small nf16 tensor: 32 bytes of levels, codes, block scales and two scale parameters.
def edited(number, place, replacement):
    def changed(pieces):
        data = bytearray(zstandard.ZstdDecompressor().decompress(pieces[number]))
        data[place] = replacement
        found = list(pieces)
        found[number] = compressed(bytes(data))
        return found

    return changed


FALSE_FRAMES = {
    "no zstd": (lambda pieces: [b"garbage!", *pieces[1:]], "frame 0 of"),
    "a longer frame": (lambda pieces: [pieces[0], compressed(bytes(10_000)), *pieces[2:]], "declares 10000 bytes"),
    "a bomb": (lambda pieces: [pieces[0], compressed(bytes(1 << 26)), *pieces[2:]], "declares 67108864 bytes"),
    "a shorter frame": (lambda pieces: [pieces[0], compressed(b""), *pieces[2:]], "declares 0 bytes"),
    "two frames in one": (lambda pieces: [pieces[0] * 2, *pieces[1:]], "frame 0 does not end"),
    "frames in another order": (lambda pieces: [pieces[1], pieces[0], *pieces[2:]], "declares"),
    "levels that are not finite": (edited(0, slice(0, 2), b"\x00\x7e"), "not finite"),
    "a scale stride of 0": (edited(-1, -1, 0), "scale stride must be"),
    "a scale exponent beyond fp16": (edited(-1, -2, 100), "leave the normal fp16 range"),
}


@pytest.mark.parametrize(("make", "reason"), FALSE_FRAMES.values(), ids=FALSE_FRAMES)
def test_frames_that_lie_are_refused_by_load_too(small, tmp_path, make, reason):
    path = replaced(small, tmp_path / "a", "a.weight", make)
    with NFQFile(path) as file, pytest.raises(CorruptFileError, match=reason) as caught:
        file.load("a.weight")
    assert f"{path}: tensor 'a.weight': " in str(caught.value)


def test_replacing_frames_by_equal_ones_leaves_a_sound_file(small, tmp_path):
    path = replaced(small, tmp_path / "a", "a.weight", edited(0, slice(0, 0), b""))
    assert load_all(path) == load_all(small)
