// Nodes that write a file: shows where it was saved, and refreshes the lists of other nodes.

import { app } from "../../../scripts/app.js";
import { addPanel, after, element, onOutput } from "./dom.js";

export function addSaved(node) {
  const panel = addPanel(node, "saved");
  onOutput(node, ({ text }) => panel.replaceChildren(element("p", {}, text?.[0] ?? "")));
  after(node, "onExecuted", (output) => output?.text && app.refreshComboInNodes());
}
