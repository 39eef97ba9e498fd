// Progress of a node while it works; NFQuantizeUNet also shows what its settings give and how long they take.

import { api } from "../../../scripts/api.js";
import { addPanel, after, element, findNode, isLinked, whenPlaced } from "./dom.js";
import { decibels, duration, share, text } from "./text.js";

const FOLDERS = { unet_name: "diffusion_models", ckpt_name: "checkpoints" };
const FORM = ["preset", "effort", "levels", "conv_levels", "device"];

// By node: the functions to call for each layer, and with the name of the text for an early end.
const reporters = new WeakMap();
const running = new Set();

export function listen() {
  api.addEventListener("nfq.layer", ({ detail }) => {
    reporters.get(findNode(detail.node))?.layer(detail);
  });
  for (const [event, key] of [
    ["execution_interrupted", "interrupted"],
    ["execution_error", "failed"],
  ])
    api.addEventListener(event, () => {
      for (const reporter of running) reporter.end(key);
      running.clear();
    });
}

export function addProgress(node) {
  const panel = addPanel(node, "progress");
  const time = element("p", { className: "nfq-faint" });
  const setting = (name) => node.widgets.find((widget) => widget.name === name);
  const followed = new WeakSet();
  let asking = null;

  async function showTime(calibrated) {
    const source = fileOf(node);
    if (source && !followed.has(source.widget)) after(source.widget, "callback", advice);
    if (source) followed.add(source.widget);
    const known = source && !FORM.some((name) => isLinked(node, name));
    const form = Object.fromEntries(FORM.map((name) => [name, setting(name).value]));
    // Only the last question counts.
    const question = known ? new URLSearchParams({ ...form, calibrated, ...source.file }) : null;
    asking = question;
    const seconds = question ? await expectedSeconds(question) : null;
    if (asking !== question) return;
    const name = source?.file.name.split(/[\\/]/).pop();
    time.textContent = seconds == null ? text("timeUnknown") : text("time", { time: duration(seconds), name });
  }

  let timer = null;
  function advice() {
    const preset = setting("preset").value;
    // The value of a linked preset is not known here.
    const unused = preset !== "levels" && !isLinked(node, "preset");
    for (const name of ["levels", "conv_levels"]) setting(name).disabled = unused;
    const linked = node.inputs?.some((input) => input.name === "calibration" && input.link != null);
    panel.replaceChildren(
      element("p", {}, preset === "levels" ? text(`goodFor.${setting("levels").value}`) : text(`preset.${preset}`)),
      time,
      element("p", { className: "nfq-faint" }, text("bakedIn")),
    );
    // A workflow that is opened connects many links at once.
    clearTimeout(timer);
    timer = setTimeout(() => node.graph && showTime(linked || setting("calibration").value !== "(none)"), 200);
  }
  for (const name of [...FORM, "calibration"]) after(setting(name), "callback", advice);

  report(node, panel, advice);
  after(node, "onConnectionsChange", advice);
  whenPlaced(node, advice);
}

export function addSamplingProgress(node) {
  const panel = addPanel(node, "progress");
  report(node, panel, () => panel.replaceChildren());
}

// The file of the loader that a node's MODEL comes from, of a merge the first, with the widget that names it.
function fileOf(node) {
  for (const seen = new Set(); node && !seen.has(node); ) {
    seen.add(node);
    const widget = node.widgets?.find((each) => each.name in FOLDERS);
    if (widget && isLinked(node, widget.name)) return null;
    if (widget) return { widget, file: { folder: FOLDERS[widget.name], name: String(widget.value) } };
    const slot = node.inputs?.findIndex((input) => input.link != null && ["MODEL", "*"].includes(input.type)) ?? -1;
    node = slot < 0 ? null : node.getInputNode(slot);
  }
  return null;
}

// How long quantising takes on the server's machine, in seconds; null if that is not known.
async function expectedSeconds(query) {
  try {
    const answer = await api.fetchApi(`/nfq/time?${query}`);
    return answer.ok ? (await answer.json()).seconds : null;
  } catch {
    return null;
  }
}

// Shows a node's events in its panel while it works; `done` fills the panel afterwards.
function report(node, panel, done) {
  const fill = element("div");
  const name = element("p", { className: "nfq-layer" });
  const facts = element("p", { className: "nfq-faint" });
  const bar = [element("div", { className: "nfq-track" }, fill), name, facts];
  const reporter = {
    layer(detail) {
      // A changed setting replaces the bar.
      if (bar[0].parentElement !== panel) panel.replaceChildren(...bar);
      running.add(reporter);
      fill.style.width = `${100 * share(detail.done, detail.total)}%`;
      name.textContent = detail.name;
      const parts = detail.format ? [detail.format, decibels(detail.sqnr_db)] : [];
      if (detail.seconds_left != null) parts.push(text("left", { time: duration(detail.seconds_left) }));
      facts.textContent = parts.join(" · ");
    },
    end(key) {
      panel.replaceChildren(element("p", { className: "nfq-warning" }, text(key)));
    },
  };
  reporters.set(node, reporter);
  after(node, "onExecuted", () => {
    running.delete(reporter);
    done();
  });
}
