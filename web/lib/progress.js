// Progress of a node while it works; NFQuantizeUNet also shows advice on its settings.

import { api } from "../../../scripts/api.js";
import { addPanel, after, element, findNode, whenPlaced } from "./dom.js";
import { decibels, duration, share, text } from "./text.js";

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
  const setting = (name) => node.widgets.find((widget) => widget.name === name);
  const advice = () => {
    const preset = setting("preset").value;
    const fixed = preset === "levels";
    const linked = node.inputs?.some((input) => input.name === "calibration" && input.link != null);
    const calibrated = linked || setting("calibration").value !== "(none)";
    panel.replaceChildren(
      element("p", {}, fixed ? text(`goodFor.${setting("levels").value}`) : text(`preset.${preset}`)),
      element("p", { className: "nfq-faint" }, text(`takes.${fixed ? "" : "preset."}${setting("effort").value}`)),
      ...(calibrated ? [element("p", { className: "nfq-faint" }, text("withCalibration"))] : []),
    );
  };
  for (const name of ["levels", "effort", "preset", "calibration"]) after(setting(name), "callback", advice);

  report(node, panel, advice);
  after(node, "onConnectionsChange", advice);
  whenPlaced(node, advice);
}

export function addSamplingProgress(node) {
  const panel = addPanel(node, "progress");
  report(node, panel, () => panel.replaceChildren());
}

// Shows a node's events in its panel while it works; `done` fills the panel afterwards.
function report(node, panel, done) {
  const fill = element("div");
  const name = element("p", { className: "nfq-layer" });
  const facts = element("p", { className: "nfq-faint" });
  const bar = [element("div", { className: "nfq-track" }, fill), name, facts];
  const reporter = {
    layer(detail) {
      if (!running.has(reporter)) panel.replaceChildren(...bar);
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
