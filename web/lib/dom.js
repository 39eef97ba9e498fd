// Elements, panels, and nodes' outputs. Text is added only as text nodes, so nothing from a file can become markup.

import { app } from "../../../scripts/app.js";

export function element(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

// Runs a function after a node's or widget's own hook.
export function after(owner, hook, run) {
  const previous = owner[hook];
  owner[hook] = function (...values) {
    const result = previous?.apply(this, values);
    run(...values);
    return result;
  };
}

// Whether a widget's value comes from another node.
export function isLinked(node, name) {
  return Boolean(node.inputs?.some((slot) => slot.widget?.name === name && slot.link != null));
}

// Runs once a new node is in its graph with the values of its workflow; never for a node outside any graph.
export function whenPlaced(node, run) {
  setTimeout(() => node.graph && run(), 0);
}

// Finds a node by its id in a run: "3:7" is node 7 in the subgraph of node 3.
export function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

const shown = new WeakMap();

// Shows the output of each run in a node, and again when its workflow is reopened while the page still has the output.
export function onOutput(node, show) {
  const showSome = (output) => output && show(output);
  after(node, "onExecuted", showSome);
  shown.set(node, [...(shown.get(node) ?? []), showSome]);
  whenPlaced(node, () => {
    const inner = node.graph !== (app.rootGraph ?? app.graph);
    showSome(app.nodeOutputs?.[inner ? `${node.graph.id}:${node.id}` : node.id]);
  });
}

export function showOutputs(outputs) {
  for (const [id, output] of Object.entries(outputs ?? {}))
    for (const show of shown.get(findNode(id)) ?? []) show(output);
}

const MARGIN = 4;
const WIDTH = 320;

// Adds an element below a node's widgets, as high as its content. It is not saved with the workflow.
export function addPanel(node, name) {
  const content = element("div", { className: "nfq-content" });
  const root = element("div", { className: `nfq-panel nfq-${name}` }, content);
  let height = 0;
  const widget = node.addDOMWidget(`nfq_${name}`, "nfq", root, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  new ResizeObserver(() => {
    const filled = content.childElementCount > 0;
    // Content without height means that the node is scrolled out of view.
    if (filled && !content.offsetHeight) return;
    const needed = filled ? content.offsetHeight + 2 * MARGIN : 0;
    if (needed === height) return;
    // Keep the extra height of a node that the user enlarged.
    const wanted = node.size[1] + Math.min(0, needed - height);
    height = needed;
    const [width, least] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(wanted, least)]);
    node.setDirtyCanvas?.(true, true);
  }).observe(content);
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  return content;
}

const STYLE = `
.nfq-panel { overflow: hidden; pointer-events: auto; }
.nfq-content { box-sizing: border-box; padding: 2px 8px 6px; font: 12px/1.45 sans-serif;
  color: var(--input-text, #ddd); overflow-wrap: anywhere; }
.nfq-content:empty { padding: 0; }
.nfq-content p { margin: 0 0 2px; }
.nfq-content .nfq-strong { font-weight: 600; }
.nfq-content .nfq-faint { color: var(--descrip-text, #999); }
.nfq-content .nfq-warning { color: var(--error-text, #ff7a7a); }
.nfq-content ol { margin: 2px 0; padding-left: 18px; list-style: decimal; }
.nfq-track { height: 8px; margin: 3px 0; border-radius: 4px; background: var(--comfy-input-bg, #222); overflow: hidden; }
.nfq-track > div { height: 100%; width: 0; background: #3f8fd2; }
.nfq-controls { display: flex; gap: 4px; align-items: center; margin: 3px 0; }
.nfq-controls select, .nfq-controls button { font: inherit; color: inherit; background: var(--comfy-input-bg, #222);
  border: 1px solid var(--border-color, #444); border-radius: 4px; padding: 1px 6px; cursor: pointer; }
.nfq-controls select { flex: 1; min-width: 0; }
.nfq-content canvas { display: block; width: 100%; height: 190px; }
.nfq-hover { min-height: 3em; }
.nfq-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 6px; }
.nfq-figures figure { margin: 0; }
.nfq-figures img { display: block; width: 100%; border-radius: 3px; cursor: pointer; }
`;

export function addStyle() {
  document.head.append(element("style", { textContent: STYLE }));
}
