// Writes into a loader node what its file was made from and how, so that a shared workflow carries it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const LOADERS = {
  NFQuantizedUNetLoader: { folder: "diffusion_models", input: "unet_name" },
  NFQuantizedCheckpointLoader: { folder: "checkpoints", input: "ckpt_name" },
};

// A file that is not here keeps the recipe that came with the workflow.
async function fillRecipe(folder, nameWidget, recipeWidget) {
  const name = nameWidget.value;
  if (!name) return;
  const query = new URLSearchParams({ folder, name });
  const answer = await api.fetchApi(`/nfq/recipe?${query}`);
  if (answer.ok && nameWidget.value === name) recipeWidget.value = JSON.stringify(await answer.json());
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
    setTimeout(fill, 0);
  },
});
