// Adds panels to our nodes on the page.

import { app } from "../../scripts/app.js";
import { addChart } from "./lib/chart.js";
import { addComparison } from "./lib/compare.js";
import { addStyle, showOutputs } from "./lib/dom.js";
import { addFileFacts } from "./lib/loader.js";
import { addProgress, addSamplingProgress, listen } from "./lib/progress.js";
import { addSaved } from "./lib/save.js";
import { loadText } from "./lib/text.js";

const PARTS = {
  NFQuantizedUNetLoader: [(node) => addFileFacts(node, "diffusion_models", "unet_name")],
  NFQuantizedCheckpointLoader: [(node) => addFileFacts(node, "checkpoints", "ckpt_name")],
  NFQuantizedCLIPLoader: [(node) => addFileFacts(node, "text_encoders", "clip_name")],
  NFQuantizeUNet: [addProgress, addChart],
  NFSaveCheckpoint: [addSaved],
  NFSaveCLIP: [addSaved],
  NFCalibrate: [addSamplingProgress, addSaved],
  NFSaveCalibration: [addSaved],
  NFInspect: [addChart],
  NFCompare: [addComparison],
};

app.registerExtension({
  name: "nfq",
  async init() {
    addStyle();
    listen();
    await loadText();
  },
  onNodeOutputsUpdated: showOutputs,
  nodeCreated(node) {
    for (const add of PARTS[node.comfyClass] ?? []) add(node);
  },
});
