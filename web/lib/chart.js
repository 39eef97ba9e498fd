// A chart of every layer's size and error that users can hover, sort and save, with totals above it.

import { addPanel, element, onOutput } from "./dom.js";
import { decibels, percent, size, text } from "./text.js";

const COLOURS = {
  32: "#4fb0ae",
  24: "#6aa84f",
  16: "#4a90d9",
  12: "#c9a227",
  7: "#d9603f",
  256: "#8e7cc3",
  "5 bit": "#2f8f8d",
  "4 bit": "#2f6fb5",
  "3 bit": "#b08600",
  "2 bit": "#b8431f",
};
const OTHER_COLOUR = "#999999";
const EXPORT = { width: 1400, height: 700 };
const PAPER = { text: "#222222", grid: "#bbbbbb", ground: "#ffffff" };

const ORDERS = {
  model: null,
  size: (a, b) => b.bytes - a.bytes,
  // Worst first; layers that are equal or were not measured last.
  error: (a, b) => (a.sqnr_db ?? Infinity) - (b.sqnr_db ?? Infinity),
};

const product = (shape) => shape.reduce((all, side) => all * side, 1);

// A format's label, its levels or its trellis bits (formats with other windows share it), and its rank by precision.
function kindOf(format) {
  const [, family, number] = /^(nf|t)(\d+)/.exec(format) ?? [];
  if (family === "t") return { label: `${number} bit`, precision: Number(number) };
  return family ? { label: number, precision: Math.log2(Number(number)) } : { label: format, precision: 0 };
}

const colourOf = (format) => COLOURS[kindOf(format).label] ?? OTHER_COLOUR;

function withBytes(layers) {
  return layers.map((layer) => {
    const weights = product(layer.shape);
    return { ...layer, weights, bytes: Math.round((weights * layer.bits_per_weight) / 8) };
  });
}

// Positions of the plots below the legend: errors above, sizes below, with the layers in the same columns.
function places(width, height, measured) {
  const left = 58;
  const top = 32;
  const split = measured ? Math.round(height * 0.57) : top;
  return { left, right: width - 4, top, split, bottom: height - 4, gap: measured ? 18 : 0 };
}

// Draws the chart; `inFile`: sizes are sizes in a file, not in memory.
function draw(context, width, height, layers, colours, { inFile, title = "" }) {
  const measured = layers.filter((layer) => layer.sqnr_db != null);
  const place = places(width, height, measured.length > 0);
  const step = (place.right - place.left) / layers.length;
  context.clearRect(0, 0, width, height);
  context.font = "11px sans-serif";
  context.textBaseline = "middle";
  const write = (label, x, y, align = "right") => {
    context.fillStyle = colours.text;
    context.textAlign = align;
    context.fillText(label, x, y);
  };
  const line = (y) => {
    context.fillStyle = colours.grid;
    context.fillRect(place.left, Math.round(y), place.right - place.left, 1);
  };
  if (measured.length) {
    const values = measured.map((layer) => layer.sqnr_db);
    const low = Math.floor(Math.min(...values) - 0.5);
    const high = Math.ceil(Math.max(...values) + 0.5);
    const y = (value) => place.split - ((value - low) / (high - low)) * (place.split - place.top);
    for (const value of [low, high]) {
      line(y(value));
      write(`${value} dB`, place.left - 4, y(value));
    }
    write(text("chartError"), place.left, place.top - 9, "left");
    layers.forEach((layer, index) => {
      if (layer.sqnr_db == null) return;
      context.fillStyle = colourOf(layer.format);
      const x = place.left + (index + 0.5) * step;
      context.fillRect(x - 1, y(layer.sqnr_db) - 1, 2.5, 2.5);
    });
  }
  const largest = Math.max(...layers.map((layer) => layer.bytes));
  const top = place.split + place.gap;
  write(inFile ? text("chartFileSize") : text("chartSize"), place.left, top - 9, "left");
  line(top);
  write(size(largest), place.left - 4, top + 4);
  line(place.bottom);
  layers.forEach((layer, index) => {
    context.fillStyle = colourOf(layer.format);
    const tall = (layer.bytes / largest) * (place.bottom - top);
    context.fillRect(place.left + index * step, place.bottom - tall, Math.max(step, 0.75), tall);
  });
  const kinds = new Map(layers.map((layer) => [kindOf(layer.format).label, layer.format]));
  let x = place.right;
  for (const [label, format] of [...kinds].sort(([, a], [, b]) => kindOf(a).precision - kindOf(b).precision)) {
    write(label, x, 7);
    x -= context.measureText(label).width + 11;
    context.fillStyle = colourOf(format);
    context.fillRect(x, 3, 8, 8);
    x -= 6;
  }
  context.fillStyle = colours.text;
  if (title) context.fillText(title, x - 12, 7, (place.right - place.left) / 2);
}

// Draws a line through a layer, across both plots.
function drawMarker(context, width, height, index, count) {
  const { left, right, top, bottom } = places(width, height, true);
  context.fillStyle = "#ffffff66";
  context.fillRect(left + ((index + 0.5) * (right - left)) / count, top, 1, bottom - top);
}

// The index of the layer at a position on the chart; -1 outside.
function layerAt(x, width, count) {
  const { left, right } = places(width, 0, true);
  const index = Math.floor(((x - left) / (right - left)) * count);
  return index >= 0 && index < count ? index : -1;
}

// A CSV cell that no spreadsheet treats as a formula.
function cell(value) {
  const raw = value == null ? "" : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(raw) ? `'${raw}` : raw;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function asCsv(layers) {
  const columns = ["name", "format", "shape", "weights", "bytes", "bits_per_weight", "sqnr_db"];
  const rows = layers.map((layer) =>
    columns.map((column) => (column === "shape" ? layer.shape.join("x") : layer[column])),
  );
  return [columns, ...rows].map((row) => row.map(cell).join(",") + "\r\n").join("");
}

function download(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// The chart's title: the file, or the source with its preset or levels if it was quantised in this workflow.
function chartTitle(facts) {
  const [name] = (facts.name || facts.source?.name || "").split("/").slice(-1);
  const base = name.replace(/(\.nfq)?\.safetensors$/, "");
  const { preset, levels } = facts.settings ?? {};
  const settings = preset ?? `NF${typeof levels === "number" ? levels : ""}`;
  return facts.name ? base : `${base} ${settings}`.trim();
}

function fileName(facts, ending) {
  return `${chartTitle(facts).replace(/[^\w.-]+/g, "-")}-layers.${ending}`;
}

function savePng(layers, facts) {
  const canvas = element("canvas", EXPORT);
  const context = canvas.getContext("2d");
  const scale = 2;
  context.scale(scale, scale);
  draw(context, EXPORT.width / scale, EXPORT.height / scale, layers, PAPER, {
    inFile: inFile(facts),
    title: chartTitle(facts),
  });
  // draw() leaves the background transparent; a saved picture needs one.
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = PAPER.ground;
  context.fillRect(0, 0, EXPORT.width, EXPORT.height);
  canvas.toBlob((blob) => download(blob, fileName(facts, "png")), "image/png");
}

// A file's facts give sizes in the file; a MODEL's facts give sizes in memory.
const inFile = (facts) => facts.file_bytes != null;

function totals(facts) {
  const bytes = facts.model_bytes ?? facts.file_bytes;
  const whole = facts.fp16_bytes;
  const parts = [
    text("sizeOf", { size: size(bytes), whole: size(whole), percent: percent(bytes, whole) }),
    text("packedBits", { bits: facts.packed_bits_per_weight.toFixed(2) }),
  ];
  if (facts.sqnr_db !== undefined) parts.push(text("totalError", { error: decibels(facts.sqnr_db) }));
  if (facts.expected?.calibration_db !== undefined)
    parts.push(text("byCalibration", { error: decibels(facts.expected.calibration_db) }));
  return parts.join(" · ");
}

function layerInWords(layer) {
  return `${layer.name} · ${layer.format} · ${layer.shape.join(" × ")} · ${size(layer.bytes)} · ${decibels(layer.sqnr_db)}`;
}

// Fills a panel with the chart of a MODEL's or file's facts from the server.
function showChart(panel, facts) {
  const original = withBytes(facts.layers);
  if (!original.length) return panel.replaceChildren(element("p", {}, text("nothingQuantised")));
  let layers = original;
  const canvas = element("canvas");
  const hover = element("p", { className: "nfq-hover nfq-faint" });
  const redraw = (marked = -1) => {
    const { offsetWidth: width, offsetHeight: height } = canvas;
    if (!width || !height) return;
    const ratio = 2;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const colours = { text: style.color, grid: "#88888866" };
    draw(context, width, height, layers, colours, { inFile: inFile(facts) });
    if (marked >= 0) drawMarker(context, width, height, marked, layers.length);
    hover.textContent = marked >= 0 ? layerInWords(layers[marked]) : text("hoverHint");
  };
  const orders = Object.keys(ORDERS).map((order) => element("option", { value: order }, text(`order.${order}`)));
  const sort = element("select", { title: text("sortBy") }, ...orders);
  sort.addEventListener("change", () => {
    const order = ORDERS[sort.value];
    layers = order ? [...original].sort(order) : original;
    redraw();
  });
  const csv = element("button", { type: "button", title: text("saveCsv") }, "CSV");
  csv.addEventListener("click", () => download(new Blob([asCsv(layers)], { type: "text/csv" }), fileName(facts, "csv")));
  const png = element("button", { type: "button", title: text("savePng") }, "PNG");
  png.addEventListener("click", () => savePng(layers, facts));
  canvas.addEventListener("pointermove", (event) =>
    redraw(layerAt(event.offsetX, canvas.offsetWidth, layers.length)),
  );
  canvas.addEventListener("pointerleave", () => redraw());
  panel.replaceChildren(
    element("p", { className: "nfq-strong" }, totals(facts)),
    element("div", { className: "nfq-controls" }, sort, csv, png),
    canvas,
    hover,
  );
  new ResizeObserver(() => redraw()).observe(canvas);
}

export function addChart(node) {
  const panel = addPanel(node, "chart");
  onOutput(node, ({ nfq }) => nfq?.[0] && showChart(panel, nfq[0]));
}
