// NFSaveCheckpoint and NFSaveCalibration: says where the file went, and has other nodes list it once it is there.

import { app } from "../../../scripts/app.js";
import { addPanel, after, element, onOutput } from "./dom.js";

export function addSaved(node) {
  const panel = addPanel(node, "saved");
  onOutput(node, ({ text }) => panel.replaceChildren(element("p", {}, text?.[0] ?? "")));
  after(node, "onExecuted", (output) => output?.text && app.refreshComboInNodes());
}
