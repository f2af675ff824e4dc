// The settings of the next message: their bounds, their form, and where they are kept.
// It knows the form's fields and nothing of requests or conversations.

import { byId } from "./dom.js";

export const DEFAULTS = Object.freeze({
  mode: "chat",
  speculate: true,
  tint: true,
  temperature: 0.7,
  topP: 1,
  maxTokens: 256,
  seed: null,
  system: "",
  stop: [],
  maxNodes: null,
  widths: [],
});

const NUMBERS = {
  temperature: { min: 0, max: 2, name: "Temperature" },
  topP: { min: 0.01, max: 1, name: "Top p" },
  maxTokens: { min: 1, max: 32768, whole: true, name: "Most tokens" },
  seed: { min: 0, max: Number.MAX_SAFE_INTEGER, whole: true, optional: true, name: "Seed" },
  maxNodes: { min: 1, max: 255, whole: true, optional: true, name: "Guesses a round" },
};
const MAX_STOPS = 4;
const MAX_WIDTHS = 16;
const MAX_WIDTH = 64;
const MAX_SYSTEM = 20_000;

/** Settings as kept, with the default for each that is missing or out of bounds. */
export function loadSettings(storage) {
  const kept = storage.read("settings", {}) ?? {};
  const settings = { ...DEFAULTS };
  for (const [name, bounds] of Object.entries(NUMBERS)) {
    if (name in kept && !complaint(kept[name], bounds)) settings[name] = kept[name];
  }
  if (kept.mode === "completion") settings.mode = "completion";
  if (typeof kept.tint === "boolean") settings.tint = kept.tint;
  if (typeof kept.system === "string") settings.system = kept.system.slice(0, MAX_SYSTEM);
  if (Array.isArray(kept.widths) && areWidths(kept.widths)) settings.widths = kept.widths;
  if (Array.isArray(kept.stop)) settings.stop = kept.stop.map(String).slice(0, MAX_STOPS);
  return settings;
}

/** Bind the dialog to settings; `onChange` is called after each save. Returns {show}. */
export function settingsDialog(settings, onChange) {
  const dialog = byId("settings");
  const form = byId("settings-form");
  const problem = byId("settings-problem");
  const show = () => {
    write(form, settings);
    problem.textContent = "";
    dialog.showModal();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { values, problems } = readForm(form);
    problem.textContent = problems.map((one) => one.text).join(" ");
    for (const field of form.elements) field.removeAttribute("aria-invalid");
    if (problems.length) {
      for (const { name } of problems) form.elements[name].setAttribute("aria-invalid", "true");
      form.elements[problems[0].name].focus();
      return;
    }
    Object.assign(settings, values);
    onChange();
    dialog.close();
  });
  byId("settings-reset").addEventListener("click", () => write(form, { ...DEFAULTS }));
  byId("settings-cancel").addEventListener("click", () => dialog.close());
  return { show };
}

function write(form, settings) {
  for (const name of [...Object.keys(NUMBERS), "system"]) form.elements[name].value = settings[name] ?? "";
  form.elements.stop.value = settings.stop.join("\n");
  form.elements.widths.value = settings.widths.join(" ");
}

function readForm(form) {
  const problems = [];
  const values = { system: form.elements.system.value.slice(0, MAX_SYSTEM) };
  for (const [name, bounds] of Object.entries(NUMBERS)) {
    const text = form.elements[name].value.trim();
    values[name] = text === "" ? null : Number(text);
    const fault = complaint(values[name], bounds);
    if (fault) problems.push({ name, text: fault });
  }
  values.stop = form.elements.stop.value.split("\n").filter((line) => line !== "");
  if (values.stop.length > MAX_STOPS) {
    problems.push({ name: "stop", text: `At most ${MAX_STOPS} stop strings.` });
  }
  values.widths = form.elements.widths.value.split(/[\s,]+/).filter(Boolean).map(Number);
  if (!areWidths(values.widths)) {
    const text = `Tree widths are at most ${MAX_WIDTHS} whole numbers from 1 to ${MAX_WIDTH}.`;
    problems.push({ name: "widths", text });
  }
  return { values, problems };
}

function areWidths(widths) {
  const isWidth = (width) => Number.isSafeInteger(width) && width >= 1 && width <= MAX_WIDTH;
  return widths.length <= MAX_WIDTHS && widths.every(isWidth);
}

function complaint(value, { min, max, whole, optional, name }) {
  if (value === null) return optional ? "" : `${name} is missing.`;
  const valid = typeof value === "number" && value >= min && value <= max;
  if (valid && (!whole || Number.isSafeInteger(value))) return "";
  return `${name} is ${whole ? "a whole number" : "a number"} from ${min} to ${max}.`;
}
