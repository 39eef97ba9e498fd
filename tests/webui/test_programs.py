"""The extension in the programs themselves, run from their real sources."""

from __future__ import annotations

from collections.abc import Callable

SENTENCES = {
    "damaged": "CorruptFileError: {}damaged.nfq.safetensors: tensor",
    "newer": "UnsupportedFileError: {}newer.nfq.safetensors has container version 9, this version reads up to 1",
    "foreign": "UnsupportedFileError: {}foreign.nfq.safetensors is not an .nfq.safetensors file",
}


def assert_sentences(found: dict, folder: str) -> None:
    for name, sentence in SENTENCES.items():
        assert found[name].startswith(sentence.format(folder)) and "\n" not in found[name]


def test_the_extension_is_loaded_and_unloaded(ask: Callable) -> None:
    found = ask("loaded")
    assert found["reader"].startswith("nfq_extension_") and found["again"] == found["reader"]
    assert not found["undone"].startswith("nfq_extension_")
    assert found["core"] == [found["reader"].partition(".")[0] + ".nfq_core"]
    assert "/extensions/ComfyUI-NFQ/nfq_webui/" in found["file"]
    assert found["path"] == [] and not found["nodes"]
    assert found["limits"] == [], "the program has changed"


def test_files_are_listed_with_hash_and_metadata(ask: Callable) -> None:
    found = ask("list")
    assert {"tiny.nfq.safetensors", "unet.nfq.safetensors"} <= {title.split(" ")[0] for title in found["titles"]}
    assert found["short"] == found["sha256"][:10] and found["title"] == f"tiny.nfq.safetensors [{found['short']}]"
    assert found["by_hash"] == found["name"] == "tiny.nfq.safetensors"
    assert found["metadata"] == ["format", "nfq", "nfq_header_sha256"] and found["settings"]["preset"] == "balanced"


def test_our_files_are_read_like_their_dequantised_versions(ask: Callable, program: str, tmp_path) -> None:
    found = ask("read")
    assert found["same"] and found["renamed"]
    assert "this program needs a whole checkpoint" in found["unet"] if program == "webui" else not found["unet"]
    assert_sentences(found, f"{tmp_path}/models/Stable-diffusion/")
    assert all(found["parts"].values()), found["parts"]


def test_the_page_describes_and_quantises(ask: Callable, tmp_path) -> None:
    found = ask("page")
    folder = f"{tmp_path}/models/Stable-diffusion"
    assert found["tabs"] == [["NFQ", "nfq"]] and "nfq_facts" in found["options"]
    assert "tiny.nfq.safetensors" in found["settings"] and "newer.nfq.safetensors has container" in found["settings"]
    assert "bits/weight" in found["shown"] and "preset balanced" in found["shown"]
    assert found["plain"] == "<p>Not quantised with NFQ.</p>" and "update the plugin" in found["broken"]
    name = f"{folder}/dequantised-NF12-NF24.nfq.safetensors"
    assert f"{name}: about " in found["estimate"] and "\nnothing was written\n" in found["estimate"]
    assert found["made"].startswith(f"{name}: ") and " MB → " in found["made"]
    assert " MB → " in found["kept"][0] and "text_encoders keep" in found["kept"][1]
    assert "dequantised-NF12-NF24.nfq.safetensors" in {title.split(" ")[0] for title in found["titles"]}
    assert found["again"].endswith("exists already; choose another name, or tick Overwrite")
    assert found["outside"].startswith("Error: '../../outside' is not a file name in")
    assert "is quantised already" in found["twice"]
    assert found["stopped"] == ["reading", "stopped; nothing was written"] and found["files"] == []


def test_a_failed_load_keeps_the_model(ask: Callable, tmp_path) -> None:
    found = ask("change")
    assert found["loaded"] and all(found["outputs"].values()), found["outputs"]
    assert_sentences(found, f"{tmp_path}/models/Stable-diffusion/")
    assert "has no text encoder and no VAE; " in found["unet"]
    assert found["kept"] == [True] * 4 and found["output_after"]
    assert found["warnings"] and all("nfq.safetensors" in sentence for sentence in found["warnings"])
