"""The host's page in a headless browser, driven like a user if possible, and through its graph if not."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

from driver import Host
from playwright.sync_api import Browser, Locator, expect

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
]
OPEN_MS = 600_000
SHOW_MS = 180_000

HOSTILE = '<img src=x onerror="window.hacked=1">'
"""Text that must never become an element."""

APP = "const app = window.app ?? window.comfyAPI.app.app;"
READY = """() => {
  const app = window.app ?? window.comfyAPI?.app?.app;
  const known = app?.graph && window.LiteGraph?.registered_node_types.NFQuantizeUNet;
  return known && app.extensionManager?.workflow?.activeWorkflow;
}"""
"""The page opens its first workflow last; it would replace one that was opened before."""

NEW_WORKFLOW = """
const before = app.extensionManager.workflow.activeWorkflow?.path;
await app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
return before ?? null;
"""

IS_NEW = """(before) => {
  const app = window.app ?? window.comfyAPI.app.app;
  const now = app.extensionManager.workflow.activeWorkflow?.path;
  const shown = document.querySelector("[data-node-id], .nfq-content");
  return now && now !== before && app.graph._nodes.length === 0 && !shown;
}"""

FRAMES = """() => new Promise((next) => {
  requestAnimationFrame(() => requestAnimationFrame(next));
  setTimeout(next, 3000);
})"""
"""Two frames, or three seconds: a browser that regards a tab as hidden draws none."""

BUILD = """
const made = {};
for (const [name, spec] of Object.entries(argument)) {
  const node = LiteGraph.createNode(spec.type);
  if (!node) throw new Error(`the page knows no ${spec.type}`);
  node.pos = spec.at;
  for (const [widget, value] of Object.entries(spec.values ?? {}))
    node.widgets.find((each) => each.name === widget).value = value;
  app.graph.add(node);
  made[name] = node;
}
for (const [name, spec] of Object.entries(argument))
  for (const [input, [from, output]] of Object.entries(spec.links ?? {})) {
    const slot = made[name].inputs.findIndex((each) => each.name === input);
    if (slot < 0) throw new Error(`${spec.type} has no input ${input}`);
    made[from].connect(output, made[name], slot);
  }
app.canvas.ds.offset = [60, 60];
app.canvas.ds.scale = 0.8;
app.canvas.setDirty(true, true);
"""

SET_ALL = """
for (const node of app.graph._nodes) for (const widget of node.widgets ?? []) {
  const value = argument[`${node.type}.${widget.name}`] ?? argument[widget.name];
  if (value !== undefined) {
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
}
"""

DROP = """
const bytes = Uint8Array.from(atob(argument.data), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], argument.name));
const at = { clientX: 700, clientY: 600, bubbles: true, cancelable: true, dataTransfer: transfer };
document.querySelector("#graph-canvas").dispatchEvent(new DragEvent("drop", at));
"""


class Page:
    """A page of a running host, in the classic canvas or in Nodes 2.0."""

    def __init__(self, browser: Browser, host: Host, *, nodes2: bool = False, locale: str = "en") -> None:
        self.host, self.name = host, "nodes2" if nodes2 else "classic"
        self.tab = browser.new_page(viewport={"width": 1600, "height": 1000}, accept_downloads=True)
        self.errors: list[str] = []
        self.tab.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        # The host catches an extension's exceptions and logs them to the console.
        self.tab.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        settings = {
            "Comfy.VueNodes.Enabled": nodes2,
            "Comfy.TutorialCompleted": True,
            "Comfy.Locale": locale,
            # The host's own toast would cover the tested elements.
            "Comfy.Workflow.ShowMissingModelsWarning": False,
            # Without a GPU, drawing the graph would take a processor from the sampling model.
            "LiteGraph.Canvas.MaximumFps": 10,
        }
        host.post("/settings", settings)
        self.tab.goto(f"http://127.0.0.1:{host.port}/", timeout=OPEN_MS)
        self.tab.wait_for_function(READY, timeout=OPEN_MS)
        self.tab.wait_for_load_state("networkidle")
        self.tab.keyboard.press("Escape")

    def close(self) -> None:
        self.tab.close()

    def script(self, body: str, argument: Any = None) -> Any:
        """Run JavaScript with the host's `app`, and `argument`; it must end within SHOW_MS."""
        late = f"new Promise((_, fail) => setTimeout(() => fail(new Error('the script did not end')), {SHOW_MS}))"
        return self.tab.evaluate(f"(argument) => Promise.race([{late}, (async () => {{ {APP} {body} }})()])", argument)

    def new_workflow(self) -> None:
        """Open an empty workflow in a new tab.

        Clearing the graph is not enough: newer front ends reuse its widgets' values for the next node with the same id.
        """
        before = self.script(NEW_WORKFLOW)
        self.tab.wait_for_function(IS_NEW, arg=before, timeout=SHOW_MS)
        self.settle()

    def settle(self) -> None:
        """Wait until pending changes are drawn."""
        self.tab.evaluate(FRAMES)

    def build(self, **nodes: dict) -> None:
        """Make a graph in a new workflow; per node `type`, `at`, optional `values` by widget and `links` by input."""
        self.new_workflow()
        self.script(BUILD, nodes)

    def set(self, type: str, widget: str, value: Any) -> None:
        """Change a widget of the first node of a type, as the widget's control does."""
        self.script(
            """const node = app.graph._nodes.find((each) => each.type === argument[0]);
            const widget = node.widgets.find((each) => each.name === argument[1]);
            widget.value = argument[2];
            widget.callback?.(argument[2], app.canvas, node);""",
            [type, widget, value],
        )

    def set_all(self, values: dict) -> None:
        """Change widgets of all nodes, as their controls do; values by `widget`, or by `type.widget`."""
        self.script(SET_ALL, values)

    def open(self, workflow: dict) -> None:
        self.script("await app.loadGraphData(argument);", workflow)

    def workflow(self) -> dict:
        return json.loads(self.script("return JSON.stringify(app.graph.serialize());"))

    def types(self) -> list[str]:
        return sorted(node["type"] for node in self.workflow()["nodes"])

    def queue(self) -> str:
        """Press the page's queue button; returns the prompt's id."""
        with self.tab.expect_response(lambda answer: answer.url.endswith("/api/prompt")) as got:
            self.tab.get_by_test_id("queue-button").first.click()
        return got.value.json()["prompt_id"]

    def run(self) -> dict:
        return self.host.wait(self.queue())

    def drop(self, path: Path, bytes_read: int = 4 << 20) -> None:
        """Drop a file on the canvas; the page reads only its first four mebibytes."""
        with path.open("rb") as file:
            data = base64.b64encode(file.read(bytes_read)).decode()
        self.script(DROP, {"name": path.name, "data": data})

    def panel(self, name: str) -> Locator:
        """A panel that we add to a node: `facts`, `progress`, `chart`, `compare`, `saved`."""
        return self.tab.locator(f".nfq-{name} .nfq-content")

    def shows(self, panel: str, *words: str) -> None:
        for word in words:
            expect(self.panel(panel)).to_contain_text(word, timeout=SHOW_MS)

    def shot(self, name: str) -> None:
        """Save a screenshot if NFQ_SCREENSHOTS names a folder."""
        folder = os.environ.get("NFQ_SCREENSHOTS")
        if folder:
            self.tab.wait_for_timeout(500)
            self.tab.screenshot(path=Path(folder) / f"{self.name}-{name}.png")
