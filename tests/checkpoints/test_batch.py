"""Folders of models: what is converted, what is left alone, what a fault in one file does to the others."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import save_file
from samples import SMALL_MODEL, random_half, random_unet
from systems import WINDOWS, link, replaces_open_files, words

import nfq_core
from nfq_core import NFQFile, Settings
from nfq_core.calibration.statistics import Calibration, LayerInputs
from nfq_core.checkpoints import batch
from nfq_core.checkpoints.batch import convert_folders
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.errors import DEBUG, NFQError
from nfq_core.files import claims
from nfq_core.files.atomic import AtomicFile
from nfq_core.files.safetensors_io import SafetensorsFile
from nfq_core.planning.settings import BitsPerWeight, Formats

TAGGED = "-balanced.nfq.safetensors"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two models and a LoRA; not to be written to."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "sub").mkdir()
    save_file(random_unet(), folder / "one.safetensors")
    save_file(random_unet("diffusers", seed=1), folder / "sub" / "two.safetensors")
    save_file({"x.lora_A.weight": random_half(32, 64)}, folder / "lora.safetensors")
    return folder


@pytest.fixture
def models(library, tmp_path):
    """A copy of the library."""
    return shutil.copytree(library, tmp_path / "models")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def results(report: dict) -> dict[str, str]:
    return {os.path.basename(row["source"]): row["result"] for row in report["files"]}


def reasons(report: dict) -> dict[str, str]:
    return {os.path.basename(row["source"]): row["reason"] for row in report["files"]}


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_models_are_converted_and_others_named(models, out):
    before = files(models)
    report = convert_folders([models], out)
    assert results(report) == {
        "one.safetensors": "converted",
        "two.safetensors": "converted",
        "lora.safetensors": "skipped",
    }
    lora, one, two = report["files"]
    assert (lora["kind"], lora["target"]) == ("LoRA", None) and lora["reason"].startswith("it is a LoRA, which")
    assert one["kind"] == two["kind"] == "SDXL-like UNet"
    assert files(out).keys() == {f"one{TAGGED}", os.path.join("sub", f"two{TAGGED}")}
    for row in (one, two):
        # What the command for one file makes, byte for byte.
        quantize_file(row["source"], out / "alone", overwrite=True)
        assert (out / row["target"]).read_bytes() == (out / "alone").read_bytes()
        assert row["file_bytes"] == os.path.getsize(row["target"])
        assert row["original_bytes"] == os.path.getsize(row["source"])
    totals = report["totals"]
    assert (totals["converted"], totals["skipped"], totals["failed"], totals["done"]) == (2, 1, 0, 0)
    assert totals["original_bytes"] == one["original_bytes"] + two["original_bytes"]
    assert totals["file_bytes"] == one["file_bytes"] + two["file_bytes"]
    assert report["stopped"] == ""
    assert files(models) == before


def test_any_converts_the_others_too(models, out):
    save_file({"x.weight": random_half(32, 64)}, models / "other.safetensors")
    assert reasons(convert_folders([models], out))["other.safetensors"] == "any_kind=True converts it too"
    report = convert_folders([models], out, any_kind=True)
    assert results(report).pop("lora.safetensors") == "skipped"
    assert results(report)["other.safetensors"] == "converted"
    assert (out / f"other{TAGGED}").exists() and not (out / f"lora{TAGGED}").exists()


def test_a_second_run_finds_all_done_without_reading_the_sources(models, out, monkeypatch):
    convert_folders([models], out)
    before = files(out)
    monkeypatch.setattr(batch, "quantize_file", lambda *_, **__: pytest.fail("converted again"))
    monkeypatch.setattr(SafetensorsFile, "sha256", lambda _: pytest.fail("read a source"))
    report = convert_folders([models], out)
    assert results(report) == {"one.safetensors": "done", "two.safetensors": "done", "lora.safetensors": "skipped"}
    assert files(out) == before


def test_a_source_that_was_touched_is_told_by_its_digest(models, out, monkeypatch):
    convert_folders([models], out)
    read, real = [], SafetensorsFile.sha256
    monkeypatch.setattr(SafetensorsFile, "sha256", lambda file: read.append(file.path.name) or real(file))
    os.utime(models / "one.safetensors")
    assert results(convert_folders([models], out))["one.safetensors"] == "done"
    assert read == ["one.safetensors"]
    convert_folders([models], out, rehash=True)
    assert read[1:] == ["one.safetensors", "two.safetensors"]


def replaced(models, name: str = "one.safetensors") -> None:
    """Another model of the same name and size, last written to before the targets were, as `mv` leaves it."""
    before = (models / name).stat()
    save_file(random_unet(seed=9), models / "new")
    assert (models / "new").stat().st_size == before.st_size
    os.utime(models / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(models / "new", models / name)


def replaced_now(models) -> None:
    """The same, but written to at another time."""
    replaced(models)
    os.utime(models / "one.safetensors", (1, 1))


def test_a_source_that_was_replaced_by_an_older_file_of_its_size(models, out):
    convert_folders([models], out)
    old = (out / f"one{TAGGED}").read_bytes()
    replaced(models)
    report = convert_folders([models], out)
    assert results(report) == {"one.safetensors": "failed", "two.safetensors": "done", "lora.safetensors": "skipped"}
    wanted = f"{out / 'one'}{TAGGED} exists already, made from another file; overwrite=True replaces it"
    assert reasons(report)["one.safetensors"] == wanted
    assert (out / f"one{TAGGED}").read_bytes() == old
    report = convert_folders([models], out, overwrite=True)
    assert results(report)["one.safetensors"] == "converted"
    assert results(report)["two.safetensors"] == "done"
    assert (out / f"one{TAGGED}").read_bytes() != old


def test_other_settings_under_the_same_name(models, out):
    convert_folders([models], out)
    report = convert_folders([models], out, Settings(quantize_first_last=True))
    assert reasons(report)["one.safetensors"].endswith("made with other settings; overwrite=True replaces it")
    report = convert_folders([models], out, Settings(Formats.of(12)))
    assert results(report)["one.safetensors"] == "converted"
    assert results(convert_folders([models], out))["one.safetensors"] == "done"


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(BitsPerWeight(3.4)), Settings(Formats.of(format="t2w8_b64"))],
)
def test_a_calibration_is_among_the_settings(tmp_path, out, settings):
    save_file(SMALL_MODEL, tmp_path / "a.safetensors")
    inputs = {"linear.weight": LayerInputs(torch.ones(100), 99), "conv.weight": LayerInputs(torch.ones(16), 99)}
    Calibration(inputs, prompts=2).save(tmp_path / "calibration")
    options = {"calibration": Calibration.load(tmp_path / "calibration"), "any_kind": True}
    source = tmp_path / "a.safetensors"
    assert results(convert_folders([source], out, settings, **options)) == {"a.safetensors": "converted"}
    assert results(convert_folders([source], out, settings, **options)) == {"a.safetensors": "done"}


@pytest.mark.parametrize("damage", ["a foreign file", "a cut file", "a damaged header"])
def test_a_target_that_is_not_sound(models, out, damage):
    convert_folders([models], out)
    target = out / f"one{TAGGED}"
    whole = target.read_bytes()
    data = {
        "a foreign file": b"hello, I am no model",
        "a cut file": whole[:-9],
        "a damaged header": whole.replace(b"unknown", b"unknows"),
    }
    target.write_bytes(data[damage])
    report = convert_folders([models], out)
    assert "exists already and is not a valid NFQ file; overwrite=True" in reasons(report)["one.safetensors"]
    assert results(convert_folders([models], out, overwrite=True))["one.safetensors"] == "converted"
    assert target.read_bytes() == whole


def test_one_broken_file_does_not_stop_the_rest(models, out):
    whole = (models / "one.safetensors").read_bytes()
    (models / "a-cut.safetensors").write_bytes(whole[:-1])
    (models / "a-pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(99))
    (models / "a-pickle.ckpt").write_bytes(b"\x80\x04N.")
    report = convert_folders([models], out)
    assert results(report) == {
        "a-cut.safetensors": "failed",
        "a-pickle.ckpt": "skipped",
        "a-pickle.safetensors": "failed",
        "lora.safetensors": "skipped",
        "one.safetensors": "converted",
        "two.safetensors": "converted",
    }
    assert reasons(report)["a-cut.safetensors"].startswith("is cut short")
    assert "a PyTorch pickle, which can run code" in reasons(report)["a-pickle.ckpt"]
    assert report["totals"]["failed"] == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NFQError("bad"), "bad"),
        (OSError(errno.EIO, "bad"), "bad"),
        (
            KeyError("bad"),
            f"this is a bug in the program (test_batch.py, line N); set the environment variable {DEBUG} to 1",
        ),
        (MemoryError("bad"), "not enough memory"),
    ],
)
def test_an_error_in_the_middle_does_not_stop_the_rest(models, out, monkeypatch, caplog, error, told):
    real = batch.quantize_file

    def fail_once(source, *arguments, **options):
        if source.name == "one.safetensors":
            raise error
        return real(source, *arguments, **options)

    monkeypatch.setattr(batch, "quantize_file", fail_once)
    report = convert_folders([models], out)
    assert results(report)["one.safetensors"] == "failed"
    assert re.sub("line [0-9]+", "line N", reasons(report)["one.safetensors"]).startswith(told)
    assert "one.safetensors" not in caplog.text
    assert results(report)["two.safetensors"] == "converted"


def test_a_full_disk_stops_it(models, out, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        report = convert_folders([models], out)
    wanted = {"lora.safetensors": "skipped", "one.safetensors": "failed", "two.safetensors": "not_tried"}
    assert results(report) == wanted
    assert os.strerror(errno.ENOSPC) in report["stopped"]
    assert files(out) == {}
    assert results(convert_folders([models], out))["two.safetensors"] == "converted"


def test_an_interrupt_leaves_what_is_finished(models, out):
    def interrupt(done: int, total: int, name: str) -> None:
        if name == "two.safetensors":
            raise KeyboardInterrupt

    report = convert_folders([models], out, progress=interrupt)
    wanted = {"lora.safetensors": "skipped", "one.safetensors": "converted", "two.safetensors": "not_tried"}
    assert results(report) == wanted
    assert report["stopped"] == "interrupted"
    assert files(out).keys() == {f"one{TAGGED}"}
    report = convert_folders([models], out)
    assert results(report) == wanted | {"one.safetensors": "done", "two.safetensors": "converted"}


def test_two_sources_for_one_name(models, out):
    other = models.parent / "other"
    other.mkdir()
    shutil.copy(models / "one.safetensors", other / "ONE.safetensors")
    report = convert_folders([models, other], out)
    assert results(report)["one.safetensors"] == "converted"
    assert results(report)["ONE.safetensors"] == "failed"
    wanted = f"{models / 'one.safetensors'} has the same target {out / 'ONE'}{TAGGED}; rename one of them"
    assert reasons(report)["ONE.safetensors"] == wanted


def test_the_same_file_under_two_names(models, out):
    link(models / "z.safetensors", models / "one.safetensors")
    report = convert_folders([models], out)
    assert reasons(report)["z.safetensors"] == f"it is the same file as {models / 'one.safetensors'}"


@pytest.mark.parametrize("inside", [".", "results"])
def test_results_among_the_sources(models, inside):
    """The results of this run are not told of; those of another are, as what they are."""
    convert_folders([models], models / inside)
    report = convert_folders([models], models / inside)
    assert results(report) == {"one.safetensors": "done", "two.safetensors": "done", "lora.safetensors": "skipped"}
    report = convert_folders([models], models / inside, Settings(Formats.of(12)))
    found = results(report)
    assert found["one.safetensors"] == "converted"
    assert found.get(f"one{TAGGED}") == ("skipped" if inside == "." else None)


def test_a_target_that_another_process_is_writing(models, out):
    out.mkdir()
    with AtomicFile(out / f"one{TAGGED}"):
        report = convert_folders([models], out)
    assert results(report)["one.safetensors"] == "skipped"
    assert reasons(report)["one.safetensors"] == "another process is writing its target"
    assert results(report)["two.safetensors"] == "converted"


@pytest.mark.parametrize("same", [True, False])
def test_a_target_that_another_process_finished_first(models, out, monkeypatch, same):
    real = batch.quantize_file

    def late(source, target, settings, **options):
        real(source, target, settings if same else Settings(Formats.of(7)), **options)
        return real(source, target, settings, **options)

    monkeypatch.setattr(batch, "quantize_file", late)
    report = convert_folders([models / "one.safetensors"], out)
    assert results(report) == {"one.safetensors": "done" if same else "failed"}


def test_leftovers_of_a_killed_run_are_removed_even_where_the_target_is_done(models, out):
    convert_folders([models], out)
    leftover = out / f".one{TAGGED}.0123abcd.tmp"
    leftover.write_bytes(b"half")
    os.utime(leftover, (1, 1))
    convert_folders([models], out, dry_run=True)
    assert leftover.exists()
    convert_folders([models], out)
    assert not leftover.exists()


def test_a_dry_run_writes_nothing(models, out):
    report = convert_folders([models], out, dry_run=True)
    assert results(report)["one.safetensors"] == "to_convert"
    assert report["files"][1]["target"] == str(out / f"one{TAGGED}")
    assert report["totals"]["to_convert"] == 2
    assert not out.exists()
    convert_folders([models / "one.safetensors"], out)
    report = convert_folders([models], out, dry_run=True)
    assert results(report)["one.safetensors"] == "done"
    assert results(report)["two.safetensors"] == "to_convert"


def test_progress_over_all_files(models, out):
    calls = []
    convert_folders([models], out, progress=lambda *call: calls.append(call))
    total = sum((models / name).stat().st_size for name in ("one.safetensors", "sub/two.safetensors"))
    assert {call[1] for call in calls} == {total}
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1] == (total, total, "two.safetensors")
    assert len(calls) > 20


def test_a_file_where_the_results_should_go(models, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NFQError, match="is a file; name a folder"):
        convert_folders([models], tmp_path / "file")


def test_a_results_folder_that_cannot_be_made(models, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" / "out"
    report = convert_folders([models], out)
    reason = words(lambda: out.mkdir(parents=True))
    assert reasons(report)["one.safetensors"].endswith(f"could not be written: {reason}; nothing was changed")
    assert report["totals"]["failed"] == 2


def test_a_source_that_changes_while_it_is_read(models, out):
    """Its numbers may be a mixture, so that no result is better than this one."""

    def append(done: int, total: int, name: str) -> None:
        with open(models / "one.safetensors", "ab") as file:
            file.write(b"!")

    report = convert_folders([models / "one.safetensors"], out, progress=append)
    assert reasons(report) == {"one.safetensors": "changed while it was read; nothing was written, try again"}
    assert files(out) == {}


@replaces_open_files
def test_a_source_that_is_replaced_while_it_is_read(models, out):
    done = []
    report = convert_folders(
        [models / "one.safetensors"], out, progress=lambda *_: done or done.append(replaced_now(models))
    )
    assert reasons(report) == {"one.safetensors": "changed while it was read; nothing was written, try again"}
    assert files(out) == {}


def test_the_command(capsys, models, out):
    code, text, error = run(capsys, "batch", models, "--out", out, "--levels", 24, "--any")
    assert code == 0
    assert all("ComfyUI and the web UIs load no model of its sizes" in line for line in error.splitlines())
    lines = text.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(f"converted   {models / 'one.safetensors'}")
    assert re.search(r"UNet, [\d.]+ [KM]B, \d+% of [\d.]+ [KM]B, in [\d.]+ s$", lines[1])
    assert lines[-2].startswith("2 converted, 1 skipped; ")
    assert lines[-1].startswith("next: copy the new files to the folders of their originals; the nodes are ")
    with NFQFile(out / "one-NF24.nfq.safetensors") as file:
        assert file.facts.settings["levels"] == 24

    code, text, error = run(capsys, "batch", models, "--out", out, "--levels", 24, "--json")
    assert (code, error) == (0, "")
    assert json.loads(text)["totals"]["done"] == 2


def test_the_command_with_faults(capsys, models, out):
    (models / "broken.safetensors").write_bytes(b"?")
    code, text, error = run(capsys, "batch", models, "--out", out, "--dry-run")
    assert code == 1
    assert error == "nfq: 1 of 4 files failed, see above\n"
    assert f"to convert  {models / 'one.safetensors'}" in text
    assert "2 to convert, 1 skipped, 1 failed" in text
    code, text, error = run(capsys, "batch", models / "absent", "--out", out)
    assert (code, text) == (1, "")
    assert "absent: no such folder" in error


def test_an_empty_folder(capsys, tmp_path, out):
    (tmp_path / "empty").mkdir()
    assert run(capsys, "batch", tmp_path / "empty", "--out", out) == (0, "no model file found\n", "")


def test_two_runs_at_once(models, out):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: convert_folders([models], out), range(2))
    for name in ("one.safetensors", "two.safetensors"):
        outcomes = {results(first)[name], results(second)[name]}
        assert "converted" in outcomes
        assert outcomes <= {"converted", "done", "skipped"}
    assert files(out).keys() == {f"one{TAGGED}", os.path.join("sub", f"two{TAGGED}")}
    assert set(results(convert_folders([models], out, rehash=True)).values()) == {"done", "skipped"}


PROCESS = [sys.executable, "-m", "nfq_core", "batch"]


def started(models, out, *options) -> subprocess.Popen:
    """`nfq batch` in a process of its own, as on another machine that shares the folders."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nfq_core.__file__).parents[1])}
    command = [*PROCESS, str(models), "--out", str(out), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_several_processes_share_the_work(tmp_path, out):
    models = tmp_path / "many"
    models.mkdir()
    names = {f"{number}.safetensors" for number in range(9)}
    for number, name in enumerate(sorted(names)):
        save_file(random_unet(seed=number), models / name)
    processes = [started(models, out) for _ in range(3)]
    outputs = [process.communicate(timeout=300) for process in processes]
    reports = [json.loads(text) for text, _ in outputs]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    # Each file is converted once, and no process ends before all are.
    converted = [name for report in reports for name, result in results(report).items() if result == "converted"]
    assert sorted(converted) == sorted(names)
    assert all(set(results(report).values()) <= {"converted", "done"} for report in reports)
    assert files(out).keys() == {name.replace(".safetensors", TAGGED) for name in names}


@pytest.mark.skipif(WINDOWS, reason="a killed process leaves its file open for a while there")
def test_the_file_of_a_killed_process_is_converted_by_another(tmp_path, out):
    models = tmp_path / "large"
    models.mkdir()
    weight = random_half(1024, 1024)
    save_file({f"{number}.weight": weight + number / 64 for number in range(12)}, models / "m.safetensors")
    killed = started(models, out, "--any")
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 300_000 for path in out.glob(".m*.tmp")):
            assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
            time.sleep(0.005)
        # It holds its claim, and can neither finish nor renew it.
        killed.send_signal(signal.SIGSTOP)
        other = started(models, out, "--any")
        time.sleep(1)
    finally:
        killed.kill()
        killed.communicate()
    text, error = other.communicate(timeout=300)
    assert (other.returncode, results(json.loads(text))) == (0, {"m.safetensors": "converted"}), error
    assert files(out).keys() == {f"m{TAGGED}"}


def test_a_file_that_another_machine_works_on_is_waited_for(models, out, monkeypatch):
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECONDS", 600)
    out.mkdir()
    claim = out / f".one{TAGGED}.1.claim"
    claim.write_text('{"machine": "elsewhere", "process": 7}')
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(convert_folders, [models], out)
        while not (out / "sub" / f"two{TAGGED}").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        assert not run.done()
        quantize_file(models / "one.safetensors", out / f"one{TAGGED}")
        claim.unlink()
        report = run.result(timeout=60)
    assert results(report) == {"one.safetensors": "done", "two.safetensors": "converted", "lora.safetensors": "skipped"}


def test_a_file_of_a_dead_machine_is_taken_over(models, out, monkeypatch):
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.2)
    out.mkdir()
    (out / f".one{TAGGED}.1.claim").write_text('{"machine": "elsewhere", "process": 7}')
    assert results(convert_folders([models], out))["one.safetensors"] == "converted"
    assert files(out).keys() == {f"one{TAGGED}", os.path.join("sub", f"two{TAGGED}")}


def test_an_interrupt_while_waiting_names_the_other_process(models, out, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    out.mkdir()
    (out / f".one{TAGGED}.1.claim").write_text('{"machine": "elsewhere", "process": 7}')
    monkeypatch.setattr(batch.time, "sleep", interrupt)
    report = convert_folders([models], out)
    assert report["stopped"] == "interrupted"
    assert results(report)["one.safetensors"] == "not_tried"
    assert reasons(report)["one.safetensors"] == "process 7 on elsewhere is converting it"


def test_a_preset_instead_of_settings(models, out):
    convert_folders([models / "one.safetensors"], out, preset="small")
    assert files(out).keys() == {"one-small.nfq.safetensors"}
    with pytest.raises(ValueError, match=r"Settings\.of\(preset='small', …\)"):
        convert_folders([models], out, Settings(), preset="small")


def test_ctrl_c(capsys, models, out, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "quantize_file", interrupt)
    code, text, error = run(capsys, "batch", models, "--out", out, "--json")
    assert code == 1
    assert error == "nfq: interrupted; run the same command again to continue\n"
    assert json.loads(text)["totals"]["not_tried"] == 2
