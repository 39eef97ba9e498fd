// NFCompare: the pictures side by side with their scores; hold a picture to see the reference in its place.

import { api } from "../../../scripts/api.js";
import { addPanel, element, onOutput } from "./dom.js";
import { decibels, text } from "./text.js";

const address = (picture) => api.apiURL(`/view?${new URLSearchParams(picture)}`);

function figure(entry, reference) {
  const pictures = entry.pictures.map((picture, index) => {
    const own = address(picture);
    const image = element("img", { src: own, alt: entry.label, draggable: false });
    if (entry !== reference) {
      image.title = text("hold");
      image.addEventListener("pointerdown", () => (image.src = address(reference.pictures[index])));
      for (const end of ["pointerup", "pointerleave", "pointercancel"]) image.addEventListener(end, () => (image.src = own));
    }
    return image;
  });
  const scores =
    entry.ssim == null
      ? text("reference")
      : `${decibels(entry.psnr_db)} · SSIM ${entry.ssim.toFixed(4)}`;
  const caption = element(
    "figcaption",
    {},
    element("p", { className: "nfq-strong" }, entry.label),
    element("p", { className: "nfq-faint" }, scores),
  );
  return element("figure", {}, ...pictures, caption);
}

export function addComparison(node) {
  const panel = addPanel(node, "compare");
  onOutput(node, ({ nfq_compare: entries }) => {
    if (!entries?.length) return;
    const grid = element("div", { className: "nfq-figures" }, ...entries.map((entry) => figure(entry, entries[0])));
    panel.replaceChildren(grid);
  });
}
