// Writes into a loader node what its file was made from and how, so that a shared workflow carries it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LOADERS = {
  NFQuantizedUNetLoader: { folder: "diffusion_models", input: "unet_name" },
  NFQuantizedCheckpointLoader: { folder: "checkpoints", input: "ckpt_name" },
};

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function warn(detail) {
  const toast = app.extensionManager?.toast;
  if (toast) toast.add({ severity: "warn", summary: "NFQ", detail, life: 20000 });
  else console.warn("NFQ:", detail);
}

// A file that is not here keeps the recipe that came with the workflow.
async function fillRecipe(folder, nameWidget, recipeWidget) {
  const name = nameWidget.value;
  if (!name) return;
  const query = new URLSearchParams({ folder, name });
  const answer = await api.fetchApi(`/nfq/recipe?${query}`);
  if (!answer.ok) return;
  const recipe = await answer.json();
  if (nameWidget.value !== name) return;
  const before = parsed(recipeWidget.value);
  recipeWidget.value = JSON.stringify(recipe);
  return before && { before, recipe };
}

// A workflow's own recipe against the file of that name here.
function compare(name, found) {
  if (!found || found.before.header_sha256 === found.recipe.header_sha256) return;
  const made = ({ source, settings }) => `${source || "an unrecorded model"}, ${JSON.stringify(settings)}`;
  warn(`${name} is not the file this workflow was saved with. Then: ${made(found.before)}. Now: ${made(found.recipe)}.`);
}

app.registerExtension({
  name: "nfq.recipe",
  nodeCreated(node) {
    const loader = LOADERS[node.comfyClass];
    if (!loader) return;
    const find = (name) => node.widgets?.find((widget) => widget.name === name);
    const nameWidget = find(loader.input);
    const recipeWidget = find("recipe");
    if (!nameWidget || !recipeWidget) return;
    const fill = () => fillRecipe(loader.folder, nameWidget, recipeWidget);
    const previous = nameWidget.callback;
    nameWidget.callback = function (...values) {
      const result = previous?.apply(this, values);
      fill();
      return result;
    };
    // A node that belongs to a workflow gets its values after this hook.
    setTimeout(async () => compare(nameWidget.value, await fill()), 0);
  },
});
