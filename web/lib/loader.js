// The loaders: what the chosen file is, or how to make one that is missing. Writes the file's recipe into the node, so
// that a shared workflow carries it.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addPanel, after, element, whenPlaced } from "./dom.js";
import { percent, size, text } from "./text.js";

const SUFFIX = ".nfq.safetensors";

function parsed(words) {
  try {
    return JSON.parse(words);
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

function paragraph(words, className = "") {
  return element("p", { className }, words);
}

// Whether each layer got a format of its own, for a size that was asked for.
function sized({ settings }) {
  return settings?.target_bpw != null || settings?.target_bytes != null;
}

function formatsInWords(facts) {
  const [main] = facts.formats;
  const bits = facts.bits_per_weight.toFixed(2);
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

// What to do about a file that is not here, as far as the workflow tells.
function missingLines(folder, name, recipe) {
  const head = paragraph(text("missing", { name }), "nfq-warning");
  if (!recipe?.settings) return [head, paragraph(text("putItThere"))];
  const source = sourceInWords(recipe) + (recipe.source_sha256 ? ` (SHA-256 ${recipe.source_sha256})` : "");
  if (recipe.settings.imported) return [head, paragraph(text("importIt", { source }))];
  const prefix = name.endsWith(SUFFIX) ? name.slice(0, -SUFFIX.length) : name;
  // Recipes of old workflows lack what the node wants to be given; null: it does not offer what the file needs.
  if (recipe.node_inputs === null) {
    return [head, paragraph(text("makeIt")), paragraph(text("runIt", { source, options: recipe.command_options }))];
  }
  const settings = settingsInWords(recipe.node_inputs ?? recipe.settings);
  const steps = [
    text("stepLoad", { source }),
    settings ? text("stepQuantiseWith", { settings }) : text("stepQuantise"),
    folder === "checkpoints" ? text("stepSaveWhole", { prefix }) : text("stepSave", { prefix }),
  ];
  return [head, paragraph(text("makeIt")), element("ol", {}, ...steps.map((step) => element("li", {}, step)))];
}

function warn(detail) {
  const toast = app.extensionManager?.toast;
  if (toast) toast.add({ severity: "warn", summary: "NFQ", detail, life: 20000 });
  else console.warn("NFQ:", detail);
}

// A workflow's own recipe against the file of that name here.
function warnIfOther(name, before, now) {
  if (!before || before.header_sha256 === now.header_sha256) return;
  const made = (recipe) => `${sourceInWords(recipe)}, ${settingsInWords(recipe.settings)}`;
  warn(text("otherFile", { name, then: made(before), now: made(now) }));
}

export function addFileFacts(node, folder, input) {
  const panel = addPanel(node, "facts");
  const find = (name) => node.widgets.find((widget) => widget.name === name);
  const nameWidget = find(input);
  const recipeWidget = find("recipe");
  // The panel says it in words.
  recipeWidget.hidden = true;
  recipeWidget.options.hidden = true;
  let described = null;

  const linked = () => node.inputs?.some((slot) => slot.widget?.name === input && slot.link != null);

  async function ask(name) {
    const answer = await api.fetchApi(`/nfq/file?${new URLSearchParams({ folder, name })}`);
    return { status: answer.status, ...(await answer.json()) };
  }

  // A file that is not here keeps the recipe that came with the workflow.
  async function show(opened = false) {
    const name = linked() ? null : nameWidget.value;
    // A recipe is that of one file; it must not be told of another.
    if (!opened && name !== described) recipeWidget.value = "";
    described = name;
    if (!name) return panel.replaceChildren(paragraph(linked() ? text("linked") : text("noFiles", { folder })));
    let told;
    try {
      told = await ask(name);
    } catch (error) {
      told = { status: 0, error: String(error) };
    }
    if (described !== name) return;
    const before = parsed(recipeWidget.value);
    if (told.status === 404) return panel.replaceChildren(...missingLines(folder, name, before));
    if (!told.recipe) return panel.replaceChildren(paragraph(told.error, "nfq-warning"));
    recipeWidget.value = JSON.stringify(told.recipe);
    panel.replaceChildren(...factLines(told));
    if (opened) warnIfOther(name, before, told.recipe);
  }

  after(nameWidget, "callback", () => show());
  after(node, "refreshComboInNode", () => show());
  after(node, "onConnectionsChange", () => whenPlaced(node, () => linked() === (described !== null) && show()));
  whenPlaced(node, () => show(true));
}
