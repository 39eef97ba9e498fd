"""A real ComfyUI as a process: COMFYUI_PATH is its folder, COMFYUI_PYTHON its Python.

NFQ_HOST_DEVICE=cuda lets it use its GPU; NFQ_HOST_LOGS names a folder for its logs.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600
RUN_SECONDS = 1800
"""Limits that only a hang reaches, because a busy machine is many times slower than an idle one."""

_runs = itertools.count()


def host_python() -> str:
    """The Python that runs the host: COMFYUI_PYTHON, that of a virtual environment in its folder, or this one."""
    named = os.environ.get("COMFYUI_PYTHON")
    own = (Path(os.environ["COMFYUI_PATH"]) / place for place in (".venv/bin/python", "venv/bin/python"))
    return named or next((str(python) for python in own if python.exists()), sys.executable)


class HostError(Exception):
    """A prompt failed; the text is the one that the page would show."""


def _limit_files(limit: int) -> None:
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


class Host:
    """A running ComfyUI, used through the same requests as its page sends."""

    def __init__(self, base: Path, *flags: str, file_limit: int | None = None) -> None:
        """Start the host; with `file_limit`, writing a file beyond this many bytes fails, as on a full disk."""
        self.base = base
        self.output = base / "output"
        self.log = Path(os.environ.get("NFQ_HOST_LOGS", base)) / f"host-{uuid.uuid4().hex[:6]}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        path = Path(os.environ["COMFYUI_PATH"])
        command = [host_python(), "main.py", "--listen", "127.0.0.1"]
        command += ["--cpu"] if os.environ.get("NFQ_HOST_DEVICE", "cpu") == "cpu" else []
        command += ["--port", str(self.port), "--base-directory", str(base)]
        command += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=path,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_limit_files, file_limit) if file_limit else None,
            )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        self.close()
        raise RuntimeError("the host did not start:\n" + self.log.read_text(errors="replace")[-4000:])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def get(self, path: str):
        return json.loads(self.get_text(path))

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def queue(self, prompt: dict, workflow: dict | None = None) -> str:
        """Queue a prompt; returns its id. HostError when the host refuses it.

        Nodes that sample or save run again even if the graph ran before; loaders do not.
        """
        fresh = {}
        for name, node in prompt.items():
            again = {"run": next(_runs)} if node["class_type"] == "NFQTestConditioning" else {}
            if node["class_type"] == "SaveLatent":
                again = {"filename_prefix": f"{name}-{next(_runs)}"}
            fresh[name] = {**node, "inputs": {**node["inputs"], **again}}
        prompt = fresh
        body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}} if workflow else {}}
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = json.load(error)
            details = [e["details"] for node in answer["node_errors"].values() for e in node["errors"]]
            raise HostError(" | ".join(details) or answer["error"]["message"]) from None

    def wait(self, prompt_id: str) -> dict:
        """The outputs of a queued prompt by node; HostError when it failed."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            history = self.get(f"/history/{prompt_id}").get(prompt_id)
            if history:
                for kind, message in history["status"]["messages"]:
                    if kind == "execution_error":
                        raise HostError(f"{message['exception_type']}: {message['exception_message'].strip()}")
                    if kind == "execution_interrupted":
                        raise HostError(f"interrupted in {message['node_type']}")
                return history["outputs"]
            time.sleep(0.1)
        raise AssertionError("the prompt took too long")

    def run(self, prompt: dict, workflow: dict | None = None) -> dict:
        return self.wait(self.queue(prompt, workflow))

    def latent(self, prompt: dict, node: str = "latent") -> torch.Tensor:
        """Run a prompt that ends in SaveLatent; returns the saved latent."""
        saved = self.run(prompt)[node]["latents"][0]
        path = self.output / saved["subfolder"] / saved["filename"]
        latent = load_file(path)["latent_tensor"]
        path.unlink()
        return latent

    def check(self, name: str, prompt: dict, **inputs: list | str) -> dict:
        """Run a function of the probe's `checks` in the host's process."""
        node = {"class_type": "NFQTestCheck", "inputs": {"check": name, "run": next(_runs), **inputs}}
        return json.loads(self.run(prompt | {"check": node})["check"]["text"][0])

    def options(self, node: str, name: str) -> list:
        inputs = self.get(f"/object_info/{node}")[node]["input"]
        kind, *rest = {**inputs.get("required", {}), **inputs.get("optional", {})}[name]
        return kind if isinstance(kind, list) else rest[0]["options"]

    def leftovers(self) -> list[Path]:
        """Temporary files below the output folder."""
        return [path for path in self.output.rglob("*.tmp") if path.is_file()]

    def resident_bytes(self) -> int:
        """The process's own memory, without mapped files."""
        return self._status("RssAnon")

    def peak_bytes(self) -> int:
        return self._status("VmHWM")

    def _status(self, field: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024

    def free(self) -> None:
        """Make the host unload all models and forget all results; returns when it is done."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        # The host misses the request while it ends a prompt, and then sleeps for minutes; another prompt wakes it.
        self.check("nothing", {})
        self.wait_until(lambda state: not state["freeing"], "it did not free memory")
        # The host starts the next prompt only after it has freed memory.
        self.check("nothing", {})

    def wait_until(self, reached: Callable[[dict], bool], failure: str) -> None:
        """Wait for a state of the host as the probe sees it: whether it is `freeing`, and `progress` by node.

        Args:
            reached: whether the state is the wanted one.
            failure: what to report after RUN_SECONDS.
        """
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            if reached(self.get("/nfq_test/state")):
                return
            time.sleep(0.1)
        raise AssertionError(f"the host did not reach the expected state: {failure}")


def make_base(base: Path) -> Path:
    """A base directory for the host: our plugin and the probe as custom nodes, empty model folders."""
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / "ComfyUI-NFQ").symlink_to(ROOT)
    (base / "custom_nodes" / "nfq_probe").symlink_to(ROOT / "tests" / "host" / "probe")
    for folder in ("diffusion_models", "checkpoints", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    for folder in ("input", "output", "temp", "user"):
        (base / folder).mkdir()
    return base
