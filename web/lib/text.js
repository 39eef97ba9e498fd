// Texts in the user's language, from locales/*/main.json, and readable numbers.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const FALLBACK = "en";
let languages = {};

export async function loadText() {
  const answer = await api.fetchApi("/i18n");
  const all = answer.ok ? await answer.json() : {};
  languages = Object.fromEntries(Object.entries(all).map(([language, texts]) => [language, texts.nfq ?? {}]));
}

// The text named `key`, with each {name} replaced by values.name.
export function text(key, values = {}) {
  const locale = app.ui.settings.getSettingValue("Comfy.Locale") ?? FALLBACK;
  const template = languages[locale]?.[key] ?? languages[FALLBACK]?.[key] ?? key;
  return template.replace(/\{(\w+)\}/g, (placeholder, name) => values[name] ?? placeholder);
}

// A size to about three digits, as `size_in_words` of nfq_core/sizes.py.
export function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(2)} GB`;
  if (bytes < 1e3) return `${bytes} byte${bytes === 1 ? "" : "s"}`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(bytes >= 1e5 ? 0 : 1)} KB`;
  return `${(bytes / 1e6).toFixed(bytes >= 1e8 ? 0 : bytes >= 1e7 ? 1 : 2)} MB`;
}

// A ratio in dB; null if both sides are equal, undefined if nothing was measured.
export function decibels(value) {
  if (value === undefined) return "–";
  return value === null ? text("equal") : `${value.toFixed(2)} dB`;
}

// part / whole, from 0 to 1; 1 if whole is 0.
export function share(part, whole) {
  return whole ? part / whole : 1;
}

export function percent(part, whole) {
  return `${Math.round(100 * share(part, whole))} %`;
}

export function duration(seconds) {
  const whole = Math.ceil(seconds);
  const minutes = Math.floor(whole / 60);
  const twoDigits = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (minutes < 10) return `${minutes} min ${twoDigits(whole % 60)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${twoDigits(minutes % 60)} min`;
}
