// The frame around the conversation: theme, drawers, dialogs, announcements, the model's state.
// It knows nothing of messages, runs or rounds.

import { fetchModel, fetchReadiness } from "./api.js";
import { byId } from "./dom.js";

const THEMES = ["system", "light", "dark"];
const READY_PAUSE_MS = 20_000;
const NOT_READY_PAUSE_MS = 2_500;
const MAX_ANNOUNCED = 2000;

/** Bind the theme button; the choice is remembered. */
export function bindTheme(storage) {
  const button = byId("theme");
  let theme = THEMES.includes(storage.read("theme", "system")) ? storage.read("theme", "system") : "system";
  const apply = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-label", `Theme: ${theme}. Change it`);
    button.title = `Theme: ${theme}`;
    button.dataset.theme = theme;
  };
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    storage.write("theme", theme);
    apply();
  });
  apply();
}

/**
 * A side part that stands beside the chat on wide screens and slides over it on narrow ones.
 * Closed parts take no focus. Returns {toggle, close, narrow()}.
 */
export function bindDrawer({ id, toggles, query, storage, onChange = () => {} }) {
  const part = byId(id);
  const narrow = window.matchMedia(query);
  let open = narrow.matches ? false : storage.read(id, true);
  const apply = () => {
    part.inert = !open;
    document.body.dataset[id] = open ? "open" : "closed";
    for (const toggle of toggles) byId(toggle).setAttribute("aria-expanded", String(open));
    onChange(open);
  };
  const set = (value) => {
    const wasInside = part.contains(document.activeElement);
    open = value;
    if (!narrow.matches) storage.write(id, open);
    apply();
    if (open && narrow.matches) part.querySelector("[data-close]").focus();
    if (!open && wasInside) byId(toggles[0]).focus();
  };
  for (const toggle of toggles) byId(toggle).addEventListener("click", () => set(!open));
  part.querySelector("[data-close]").addEventListener("click", () => set(false));
  narrow.addEventListener("change", () => {
    open = narrow.matches ? false : storage.read(id, true);
    apply();
  });
  apply();
  return {
    toggle: () => set(!open),
    close: () => open && set(false),
    covers: () => open && narrow.matches,
  };
}

/** Say something to screen readers, once, when they have time. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = text.length > MAX_ANNOUNCED ? `${text.slice(0, MAX_ANNOUNCED)} …` : text;
}

/** Follow the model's name and state for as long as the page lives; `onModel` gets its facts. */
export class ModelState {
  constructor(onModel) {
    this.onModel = onModel;
    this.name = "";
    this.timer = 0;
    document.addEventListener("visibilitychange", () => document.hidden || this.check());
  }

  async check() {
    clearTimeout(this.timer);
    let pause = NOT_READY_PAUSE_MS;
    try {
      const { ready, reason } = await fetchReadiness();
      if (ready) await this.learn();
      this.show(ready ? "ready" : "waiting", ready ? "ready" : reason || "not ready yet");
      if (ready) pause = READY_PAUSE_MS;
    } catch (error) {
      const needsKey = error.status === 401;
      this.show(needsKey ? "waiting" : "down", needsKey ? "needs an API key" : error.message);
    }
    if (!document.hidden) this.timer = setTimeout(() => this.check(), pause);
  }

  async learn() {
    const model = await fetchModel();
    if (!model) return;
    this.name = model.id;
    byId("model-name").textContent = model.id;
    this.onModel(model);
  }

  show(state, text) {
    const element = byId("model-state");
    if (element.dataset.state === state && element.textContent === text) return;
    element.dataset.state = state;
    element.textContent = text;
    element.title = text;
  }
}
