// The loaders: describes the chosen file, or how to make a missing one. Stores the file's recipe in the node, so a
// shared workflow carries it.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addPanel, after, element, isLinked, whenPlaced } from "./dom.js";
import { percent, size, text } from "./text.js";

const SUFFIX = ".nfq.safetensors";

function parseJson(json) {
  try {
    return JSON.parse(json);
  } catch {
    return null;
  }
}

function settingsInWords(settings) {
  return Object.entries(settings ?? {})
    .filter(([key, value]) => key !== "baked" && typeof value !== "object")
    .map(([key, value]) => `${key}=${value}`)
    .join(" ");
}

function sourceInWords({ source, settings }) {
  const applied = Array.isArray(settings?.baked) ? settings.baked.filter((item) => typeof item === "string") : [];
  const baked = applied.length ? ` + ${applied.join(", ")}` : "";
  return `${source || text("unrecorded")}${baked}`;
}

function paragraph(content, className = "") {
  return element("p", { className }, content);
}

// Whether a size was requested, so that each layer has its own format.
function sized({ settings }) {
  return settings?.target_bpw != null || settings?.target_bytes != null;
}

function formatsInWords(facts) {
  const [main] = facts.formats;
  const bits = facts.packed_bits_per_weight.toFixed(2);
  if (sized(facts)) return text("sizedAndBits", { bits });
  if (main.trellis_bits) return text("trellisAndBits", { code: main.trellis_bits, bits });
  return text("levelsAndBits", { levels: main.levels, bits });
}

function factLines({ facts, recipe }) {
  const [main] = facts.formats;
  const settings = settingsInWords(facts.settings);
  const source = sourceInWords(recipe);
  const from = paragraph(settings ? text("fromWith", { source, settings }) : text("from", { source }), "nfq-faint");
  const bytes = size(facts.file_bytes);
  if (!main) return [paragraph(text("nothingQuantised"), "nfq-strong"), paragraph(bytes), from];
  const share = percent(facts.file_bytes, facts.fp16_bytes);
  return [
    paragraph(formatsInWords(facts), "nfq-strong"),
    paragraph(text("sizeOf", { size: bytes, whole: size(facts.fp16_bytes), percent: share })),
    ...(sized(facts) ? [] : [paragraph(text(`goodFor.${main.trellis_bits ? `t${main.trellis_bits}` : main.levels}`))]),
    from,
  ];
}

function noFiles(folder) {
  return folder === "text_encoders" ? text("noTextEncoders", { folder }) : text("noFiles", { folder });
}

function list(steps) {
  return element("ol", {}, ...steps.map((step) => element("li", {}, step)));
}

function saveStep(folder, prefix, bits) {
  if (folder !== "checkpoints") return text("stepSave", { prefix });
  return bits ? text("stepSaveWholeWith", { prefix, bits }) : text("stepSaveWhole", { prefix });
}

// Options of a recipe, which may be a stranger's, meant for a terminal: nothing but names and plain values.
const PLAIN = /^(--[a-z-]+( [\w.+-]+)?( |$))*$/;

// Explains how to make a missing file, as far as the workflow records it; `program` is the command line's start.
function missingLines(folder, name, recipe, program) {
  const head = paragraph(text("missing", { name }), "nfq-warning");
  if (!recipe?.settings) return [head, paragraph(text("putItThere"))];
  const source = sourceInWords(recipe) + (recipe.source_sha256 ? ` (SHA-256 ${recipe.source_sha256})` : "");
  if (recipe.settings.imported) return [head, paragraph(text("importIt", { source, program }))];
  const prefix = name.endsWith(SUFFIX) ? name.slice(0, -SUFFIX.length) : name;
  const bits = recipe.settings.text_encoders;
  if (folder === "text_encoders" && bits) {
    const steps = [text("stepLoad", { source }), text("stepQuantiseClip", { bits }), text("stepSaveClip", { prefix })];
    return [head, paragraph(text("makeIt")), list(steps)];
  }
  // null: the node does not offer these settings. Recipes of old workflows have no node_inputs.
  if (recipe.node_inputs === null || folder === "text_encoders") {
    const options = PLAIN.test(recipe.command_options) ? recipe.command_options : "";
    const run = text("runIt", { source, program, options });
    return [head, paragraph(text("makeIt")), paragraph(run)];
  }
  const settings = settingsInWords(recipe.node_inputs ?? recipe.settings);
  const steps = [
    text("stepLoad", { source }),
    settings ? text("stepQuantiseWith", { settings }) : text("stepQuantise"),
    saveStep(folder, prefix, bits),
  ];
  return [head, paragraph(text("makeIt")), list(steps)];
}

function warn(detail) {
  const toast = app.extensionManager?.toast;
  if (toast) toast.add({ severity: "warn", summary: "NFQ", detail, life: 20000 });
  else console.warn("NFQ:", detail);
}

// Warns if the file of this name is not the one that the workflow was saved with.
function warnIfOther(name, before, now) {
  if (!before || before.header_sha256 === now.header_sha256) return;
  const describe = (recipe) => `${sourceInWords(recipe)}, ${settingsInWords(recipe.settings)}`;
  warn(text("otherFile", { name, then: describe(before), now: describe(now) }));
}

export function addFileFacts(node, folder, input) {
  const panel = addPanel(node, "facts");
  const find = (name) => node.widgets.find((widget) => widget.name === name);
  const nameWidget = find(input);
  const recipeWidget = find("recipe");
  // The panel shows the recipe as text.
  recipeWidget.hidden = true;
  recipeWidget.options.hidden = true;
  let shownName = null;

  const linked = () => isLinked(node, input);

  async function ask(name) {
    const answer = await api.fetchApi(`/nfq/file?${new URLSearchParams({ folder, name })}`);
    return { status: answer.status, ...(await answer.json()) };
  }

  // A missing file keeps the recipe that came with the workflow.
  async function show(opened = false) {
    const name = linked() ? null : nameWidget.value;
    // A recipe belongs to one file and must not be shown for another.
    if (!opened && name !== shownName) recipeWidget.value = "";
    shownName = name;
    if (!name) return panel.replaceChildren(paragraph(linked() ? text("linked") : noFiles(folder)));
    let reply;
    try {
      reply = await ask(name);
    } catch (error) {
      reply = { status: 0, error: String(error) };
    }
    if (shownName !== name) return;
    const before = parseJson(recipeWidget.value);
    if (reply.status === 404) return panel.replaceChildren(...missingLines(folder, name, before, reply.program));
    if (!reply.recipe) return panel.replaceChildren(paragraph(reply.error, "nfq-warning"));
    recipeWidget.value = JSON.stringify(reply.recipe);
    panel.replaceChildren(...factLines(reply));
    if (opened) warnIfOther(name, before, reply.recipe);
  }

  after(nameWidget, "callback", () => show());
  after(node, "refreshComboInNode", () => show());
  after(node, "onConnectionsChange", () => whenPlaced(node, () => linked() === (shownName !== null) && show()));
  whenPlaced(node, () => show(true));
}
