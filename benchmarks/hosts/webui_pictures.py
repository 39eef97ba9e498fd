"""Pictures of the NFQ tab for the docs: `python -m benchmarks.hosts.webui_pictures --dir DIR`.

NEO_PATH names Forge Neo and NEO_PYTHON its Python. Needs Chromium and the extra `browser`. The program estimates and
quantises a synthetic checkpoint of SDXL's shapes (6.94 GB, written to DIR if there is none), so that the tab shows
SDXL's sizes.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from nfq_core.files.container import SUFFIX

from ..checkpoint_shapes import sdxl_checkpoint
from ..shared import IMAGES, ROOT, argument_parser, write_synthetic

NAME = "my-checkpoint"

WINDOW = {"width": 1200, "height": 1500}

PROGRAM_FLAGS = ("--cpu", "--skip-torch-cuda-test", "--skip-install", "--server-name", "127.0.0.1")
"""The program runs on a CPU, installs nothing, and serves this machine only."""

START_SECONDS = 600

WORK_MS = 600_000
"""Limit for an estimate or a conversion."""

ESTIMATED, QUANTISED = re.compile("takes about"), re.compile("→")
"""What the last line says after an estimate and after a conversion."""

MARGIN = 16
"""Pixels below the last element in a picture."""


def make_data(folder: Path) -> None:
    """The program's data folder with the extension and the checkpoint, and without earlier results."""
    models, extensions = folder / "models" / "Stable-diffusion", folder / "extensions"
    models.mkdir(parents=True, exist_ok=True)
    extensions.mkdir(exist_ok=True)
    if not (extensions / "ComfyUI-NFQ").exists():
        (extensions / "ComfyUI-NFQ").symlink_to(ROOT)
    if not (models / f"{NAME}.safetensors").exists():
        write_synthetic(models / f"{NAME}.safetensors", sdxl_checkpoint())
    for written in models.glob(f"*{SUFFIX}"):
        written.unlink()


@contextmanager
def program(data: Path) -> Iterator[str]:
    """The running program; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    python = os.environ.get("NEO_PYTHON", sys.executable)
    command = [python, "launch.py", *PROGRAM_FLAGS, "--port", str(port), "--data-dir", str(data)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with (data / "program.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=os.environ["NEO_PATH"], env=environment, stdout=log, stderr=log)
    try:
        deadline = monotonic() + START_SECONDS
        while not answers(address):
            if process.poll() is not None or monotonic() > deadline:
                raise SystemExit(f"the program did not start, see {log.name}")
            sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def answers(address: str) -> bool:
    """Whether the program serves its page."""
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except (urllib.error.URLError, TimeoutError):
        return False
    return True


def choose(page, name: str) -> None:
    """Choose a checkpoint in the tab."""
    page.locator("#nfq_checkpoint input").click()
    page.get_by_role("option", name=re.compile(f"^{re.escape(name)}")).first.click()


def shot(page, name: str, last: str) -> None:
    """Save a picture of the tab down to the element `last`."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    tabs, end = page.locator("#tabs").bounding_box(), page.locator(last).bounding_box()
    height = end["y"] + end["height"] + MARGIN - tabs["y"]
    page.screenshot(path=IMAGES / name, clip={**tabs, "height": height})


def take(directory: Path) -> None:
    """Both pictures, into the docs."""
    sys.path.append(str(ROOT / "tests" / "host" / "browser"))
    from page import CHROMIUM, FLAGS
    from playwright.sync_api import expect, sync_playwright

    data = directory / "neo"
    make_data(data)
    with (
        program(data) as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser,
    ):
        page = browser.new_page(viewport=WINDOW)
        page.goto(f"{address}?__theme=light")
        page.locator("#tabs button", has_text="NFQ").first.click(timeout=WORK_MS)
        status = page.locator("#nfq_status textarea")

        choose(page, f"{NAME}.safetensors")
        page.locator("#nfq_estimate").click()
        expect(status).to_have_value(ESTIMATED, timeout=WORK_MS)
        shot(page, "webui-estimate.png", last="#nfq_status")

        page.locator("#nfq_quantise").click()
        expect(status).to_have_value(QUANTISED, timeout=WORK_MS)
        page.locator("#nfq_refresh").click()
        choose(page, f"{NAME}-balanced{SUFFIX}")
        expect(page.locator("#nfq_facts")).to_contain_text("bits/weight", timeout=WORK_MS)
        shot(page, "webui-facts.png", last="#nfq_facts")


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the program's data")
    take(parser.parse_args().dir.resolve())
