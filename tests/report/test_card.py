"""Model cards: the front matter as any YAML reader takes it, the table, and what is said where nothing was given."""

from __future__ import annotations

import hashlib
import io
import json
import sys

import pytest
from commands import as_json, one_line, run
from safetensors.torch import save_file
from samples import SMALL_MODEL, TINY, random_unet

import nfq_core
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import compare_files
from nfq_core.cli import commands as cli
from nfq_core.planning.settings import Formats, Settings
from nfq_core.report.card import PLACEHOLDERS, front_matter, quoted
from nfq_core.sizes import size_in_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet, and files of 32 and 12 levels."""
    folder = tmp_path_factory.mktemp("card")
    save_file(random_unet(architecture=TINY), folder / "model.safetensors")
    for levels in (32, 12):
        quantize_file(
            folder / "model.safetensors",
            folder / f"nf{levels}.nfq.safetensors",
            Settings(Formats.of(levels)),
        )
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return [folder / "nf32.nfq.safetensors", folder / "nf12.nfq.safetensors"]


def printed(capsys, *arguments: object) -> str:
    code, out, error = run(capsys, "card", *arguments)
    assert (code, error) == (0, "")
    return out


def refused(capsys, *arguments: object) -> str:
    code, out, error = run(capsys, "card", *arguments)
    assert (code, out) == (1, "")
    return one_line(error)


def fields(card: str) -> dict:
    yaml = pytest.importorskip("yaml")
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


TEXTS = [
    "plain",
    "",
    "a: b",
    "# no comment",
    "\"quoted\" \\ 'and'",
    "two\nlines\tand a tab",
    "--- ",
    "null",
    "1.0",
    "@at %percent *star &and !bang {[",
    "日本語 ü 😀",
    "\u2028\u2029\x85\x00\x1f\x7f\xa0\ufeff",
    "\U000e0001",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_from_yaml(text):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(quoted(text)) == text
    assert yaml.safe_load(f"a: {quoted(text)}  # comment") == {"a": text}
    assert "\n" not in quoted(text)


def test_quoted_by_hand():
    assert quoted('a"b\\c\n') == r'"a\"b\\c\n"'
    assert quoted("\x85\u2028\U000e0001é") == r'"\U00000085\U00002028\U000E0001é"'


def test_front_matter_by_hand():
    written = front_matter({"a": "b", "c": ["d", "e"]}, {"a": "fill in"})
    assert written == '---\na: "b"  # fill in\nc:\n  - "d"\n  - "e"\n---'


def test_what_was_given_is_said(capsys, files):
    base = 'some: "one"/モデル #1'
    card = printed(capsys, *files, "--base-model", base, "--license", "openrail++")
    found = fields(card)
    assert found["base_model"] == base and found["license"] == "openrail++"
    assert found["base_model_relation"] == "quantized" and found["library_name"] == "comfyui-nfq"
    assert {"nfq", "quantized"} <= set(found["tags"])
    assert "fill in" not in card.lower()
    # The rest of the pipeline gets the UNet's dtype, which is the original's, whatever that was.
    assert f"from_pretrained({json.dumps(base, ensure_ascii=False)}, unet=unet).to(unet.dtype)" in card


def test_what_was_not_given_is_plainly_marked(capsys, files):
    card = printed(capsys, files[0])
    found = fields(card)
    assert (found["base_model"], found["license"]) == (PLACEHOLDERS["base_model"], PLACEHOLDERS["license"])
    assert all(value.startswith("FILL-IN") for value in PLACEHOLDERS.values())
    assert "# fill in, or give --base-model\n" in card and "# fill in, or give --license\n" in card


def row_of(card: str, name: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith(f"| `{name}`")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_table_and_checksums(capsys, files):
    card = printed(capsys, *reversed(files))
    for path in files:
        with nfq_core.NFQFile(path) as file:
            weights = sum(entry.weights for entry in file.quantized.values())
            stored = sum(map(file.stored_bytes, file.quantized)) * 8 / weights
            packed = sum(entry.packed_bytes for entry in file.quantized.values()) * 8 / weights
        row = row_of(card, path.name)
        assert row[1:5] == ["UNet", size_in_words(path.stat().st_size), f"{stored:.2f}", f"{packed:.2f}"]
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in card
    assert "SQNR, dB |" not in card
    assert card.index("| `nf32") < card.index("| `nf12")
    assert "levels 12, conv\\_levels 32" in card
    # 12 levels take fewer than the 4.1 bits that are recommended, 32 more: 12 is nearer.
    assert [row_of(card, path.name)[-1] for path in files] == ["", "**recommended**"]
    chosen = printed(capsys, *files, "--recommend", files[0])
    assert [row_of(chosen, path.name)[-1] for path in files] == ["**recommended**", ""]
    assert 'load_unet("nf32.nfq.safetensors"' in chosen


def test_errors_with_the_original(capsys, folder, files):
    card = printed(capsys, *files, "--original", folder / "model.safetensors")
    for path in files:
        assert row_of(card, path.name)[5] == f"{compare_files(folder / 'model.safetensors', path)['sqnr_db']:.2f}"


def test_errors_and_plots_of_a_report(capsys, folder, files, tmp_path):
    out = tmp_path / "my report"
    as_json(capsys, "report", folder / "model.safetensors", *files, "--out", out)
    card = printed(capsys, *files, "--report", out)
    measured = printed(capsys, *files, "--original", folder / "model.safetensors")
    for path in files:
        assert row_of(card, path.name) == row_of(measured, path.name)
    assert "![Error of each layer](my%20report/layers.png)" in card and "(my%20report/report.md)" in card
    assert "pictures.png" not in card
    (out / "size.png").unlink()
    assert "size.png" not in printed(capsys, *files, "--report", out)

    quantize_file(folder / "model.safetensors", tmp_path / "new.nfq.safetensors")
    told = refused(capsys, files[0], tmp_path / "new.nfq.safetensors", "--report", out)
    assert "new.nfq.safetensors is not in" in told and "run `nfq report` with it" in told
    for text in ("{", "[]", '{"files": [{}]}', "{}", "NaN"):
        (out / "report.json").write_text(text)
        assert "report.json is damaged" in refused(capsys, files[0], "--report", out)
    assert "report.json cannot be read" in refused(capsys, files[0], "--report", tmp_path / "gone")


def test_json(capsys, folder, files):
    told = as_json(capsys, "card", *files, "--original", folder / "model.safetensors", "--license", "mit")
    assert told["placeholders"] == ["base_model"] and told["license"] == "mit"
    assert told["recommended"] == "nf12.nfq.safetensors"
    assert all({"name", "sha256", "file_bytes", "bits_per_weight", "sqnr_db"} <= one.keys() for one in told["files"])


def test_a_card_that_goes_to_a_file_is_utf8(capsys, files, monkeypatch):
    wanted = printed(capsys, files[0], "--base-model", "a/モデル")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
        assert cli.main(["card", str(files[0]), "--base-model", "a/モデル"]) == 0
        sys.stdout.flush()
        assert sys.stdout.buffer.getvalue().decode("utf-8").splitlines() == wanted.splitlines()


def test_a_terminal_gets_a_card_in_its_own_encoding(files, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
        patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert cli.main(["card", str(files[0]), "--base-model", "a/ü モ"]) == 0
        sys.stdout.flush()
        assert r"ü \u30e2".encode("cp1252") in sys.stdout.buffer.getvalue()


def test_a_card_in_a_file_of_its_own(capsys, files, tmp_path):
    wanted = printed(capsys, files[0], "--base-model", "a/モデル")
    arguments = [files[0], "--base-model", "a/モデル", "--out", tmp_path / "card.md"]
    assert printed(capsys, *arguments) == f"card: {tmp_path / 'card.md'}\n"
    assert (tmp_path / "card.md").read_bytes() == wanted.encode("utf-8")
    told = refused(capsys, *arguments, "--original", tmp_path / "gone")
    assert "card.md exists already; --force overwrites it" in told
    (tmp_path / "card.md").write_text("another")
    assert "gone: no such file" in refused(capsys, *arguments, "--force", "--original", tmp_path / "gone")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["another"]
    assert as_json(capsys, "card", *arguments, "--force")["base_model"] == "a/モデル"
    assert (tmp_path / "card.md").read_bytes() == wanted.encode("utf-8")


def test_whole_checkpoints_and_plain_weights_are_used_otherwise(capsys, tmp_path):
    unet = {f"model.diffusion_model.{key}": tensor for key, tensor in random_unet(architecture=TINY).items()}
    parts = {
        "conditioner.a.bias": SMALL_MODEL["norm.bias"],
        "first_stage_model.a.bias": SMALL_MODEL["norm.bias"].clone(),
    }
    save_file(unet | parts, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "whole")
    card = printed(capsys, tmp_path / "whole")
    assert row_of(card, "whole")[1] == "checkpoint"
    assert "models/checkpoints" in card and "models/diffusion_models" not in card
    save_file(SMALL_MODEL, tmp_path / "b")
    quantize_file(tmp_path / "b", tmp_path / "plain")
    card = printed(capsys, tmp_path / "plain")
    assert row_of(card, "plain")[1] == "weights"
    assert "ComfyUI**" not in card and "nfq_core.load" in card and "pipeline_tag" not in fields(card)


def test_refusals(capsys, files, tmp_path):
    save_file(SMALL_MODEL, tmp_path / "plain")
    assert "no such file" in refused(capsys, tmp_path / "gone")
    assert "is not an .nfq.safetensors file" in refused(capsys, tmp_path / "plain")
    assert "named twice" in refused(capsys, files[0], files[0])
    assert "cannot be recommended" in refused(capsys, files[0], "--recommend", files[1])
    assert "tensor 'input_blocks" in refused(capsys, files[0], "--original", tmp_path / "plain")
    code, _, error = run(capsys, "card", files[0], "--original", "a", "--report", "b")
    assert code == 2 and "not allowed with" in error
