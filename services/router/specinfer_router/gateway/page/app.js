// Wires the page: builds its parts, binds the composer, the history, the switches and the keys.
// What the parts do is theirs to know.

import { Chat } from "./chat.js";
import { ModelState, announce, bindDrawer, bindTheme } from "./chrome.js";
import { Conversations } from "./conversations.js";
import { button, byId, fill, h } from "./dom.js";
import { Panel } from "./panel.js";
import { loadSettings, settingsDialog } from "./settings.js";
import { PlainSpeed } from "./speed.js";
import { Storage } from "./storage.js";

const MAX_COMPOSER_PIXELS = 240;
const TOAST_MS = 2500;

function start() {
  const storage = new Storage();
  const settings = loadSettings(storage);
  const save = () => storage.write("settings", settings);
  const plain = new PlainSpeed();
  const panel = new Panel(plain);
  const model = new ModelState((facts) => {
    plain.setRoundSeconds(facts.specinfer?.plain_round_seconds);
    if (facts.specinfer?.chat === false) offerCompletionAlone(settings);
    panel.changed();
  });
  const conversations = new Conversations(storage);
  const drawers = bindDrawers(storage);
  const chat = new Chat({
    conversations,
    settings,
    panel,
    plain,
    modelName: () => model.name,
    onChange: () => refresh(chat, conversations, drawers),
    onKey: () => model.check(),
    onCopy: copier(),
  });
  byId("history-note").hidden = storage.lasting;
  bindTheme(storage);
  bindSwitches(settings, save);
  const dialog = settingsDialog(settings, save);
  byId("open-settings").addEventListener("click", dialog.show);
  bindComposer(chat, settings);
  bindHistory(chat, conversations, drawers);
  bindKeys(chat, drawers);
  window.addEventListener("storage", (event) => {
    if (event.key !== "specinfer.conversations") return;
    conversations.reload();
    refresh(chat, conversations, drawers);
  });
  refresh(chat, conversations, drawers);
  model.check();
}

function bindDrawers(storage) {
  const cover = () => {
    const covered = Object.values(drawers).some((drawer) => drawer.covers());
    byId("scrim").hidden = !covered;
    byId("chat").inert = covered;
  };
  const drawers = {};
  const narrow = "(max-width: 860px)";
  const middling = "(max-width: 1180px)";
  const onChange = () => queueMicrotask(cover);
  drawers.history = bindDrawer({ id: "history", toggles: ["open-history"], query: narrow, storage, onChange });
  drawers.panel = bindDrawer({ id: "panel", toggles: ["open-panel"], query: middling, storage, onChange });
  byId("scrim").addEventListener("click", () => closeDrawers(drawers));
  return drawers;
}

function closeDrawers(drawers) {
  const covering = Object.values(drawers).filter((drawer) => drawer.covers());
  for (const drawer of covering) drawer.close();
  return covering.length > 0;
}

function bindSwitches(settings, save) {
  const speculate = byId("speculate");
  const tint = byId("tint");
  const showTint = () => (document.body.dataset.tint = settings.tint ? "on" : "off");
  const showSpeculation = () => {
    byId("speculate-state").textContent = settings.speculate ? "on" : "off";
    document.body.dataset.speculate = settings.speculate ? "on" : "off";
  };
  speculate.checked = settings.speculate;
  tint.checked = settings.tint;
  speculate.addEventListener("change", () => {
    settings.speculate = speculate.checked;
    showSpeculation();
  });
  tint.addEventListener("change", () => {
    settings.tint = tint.checked;
    showTint();
    save();
  });
  for (const choice of document.querySelectorAll("input[name=mode]")) {
    choice.checked = choice.value === settings.mode;
    choice.addEventListener("change", () => {
      settings.mode = choice.value;
      showMode(settings);
      save();
    });
  }
  showTint();
  showSpeculation();
  showMode(settings);
}

/** A model without a chat template can only continue texts. */
function offerCompletionAlone(settings) {
  const [chat, completion] = document.querySelectorAll("input[name=mode]");
  chat.disabled = true;
  chat.parentElement.title = "This model has no chat template";
  completion.checked = true;
  settings.mode = "completion";
  showMode(settings);
}

function showMode({ mode }) {
  const isChat = mode === "chat";
  byId("text").placeholder = isChat ? "Ask something" : "Begin a text to be continued";
  byId("text-label").textContent = isChat ? "Message" : "Text to continue";
}

function bindComposer(chat, settings) {
  const field = byId("text");
  const grow = () => {
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, MAX_COMPOSER_PIXELS)}px`;
  };
  const send = () => {
    if (chat.running || field.value.trim() === "") return;
    const text = settings.mode === "chat" ? field.value.trim() : field.value;
    field.value = "";
    grow();
    chat.send(text);
  };
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    chat.stop();
    field.focus();
  });
  for (const example of document.querySelectorAll("[data-example]")) {
    example.addEventListener("click", () => {
      field.value = example.textContent.trim();
      grow();
      field.focus();
    });
  }
  field.focus();
}

function bindHistory(chat, conversations, drawers) {
  byId("new-chat").addEventListener("click", () => {
    conversations.close();
    chat.open();
    refresh(chat, conversations, drawers);
    closeDrawers(drawers);
    byId("text").focus();
  });
  byId("clear-history").addEventListener("click", () => {
    confirmed(`Delete all ${conversations.list.length} conversations?`, "Delete all", () => {
      conversations.removeAll();
      chat.open();
      refresh(chat, conversations, drawers);
    });
  });
}

/** Show what depends on the running state and on the list of conversations. */
function refresh(chat, conversations, drawers) {
  const running = chat?.running ?? false;
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  byId("clear-history").hidden = conversations.list.length === 0;
  byId("history-empty").hidden = conversations.list.length > 0;
  const redo = () => refresh(chat, conversations, drawers);
  const items = conversations.list.map((item) => historyItem(item, chat, conversations, drawers, redo));
  fill(byId("history-list"), ...items);
}

function historyItem(item, chat, conversations, drawers, redo) {
  const isCurrent = item === conversations.current;
  const open = () => {
    conversations.open(item.id);
    chat.open();
    redo();
    closeDrawers(drawers);
  };
  const rename = () => {
    asked("Rename this conversation", item.title, (title) => {
      conversations.rename(item.id, title);
      redo();
    });
  };
  const remove = () => {
    confirmed(`Delete “${item.title}”?`, "Delete", () => {
      conversations.remove(item.id);
      if (isCurrent) chat.open();
      redo();
    });
  };
  const title = h("button", { type: "button", class: "title", "aria-current": isCurrent ? "true" : null });
  title.append(h("span", { text: item.title }));
  title.addEventListener("click", open);
  return h(
    "li",
    { class: isCurrent ? "current" : null },
    title,
    button(`Rename ${item.title}`, "pen", rename, { visible: false }),
    button(`Delete ${item.title}`, "bin", remove, { visible: false }),
  );
}

function confirmed(question, label, then) {
  ask({ question, label, value: null, then });
}

function asked(question, value, then) {
  ask({ question, label: "Save", value, then });
}

function ask({ question, label, value, then }) {
  const field = byId("ask-field");
  const dialog = byId("ask");
  byId("ask-question").textContent = question;
  byId("ask-yes").textContent = label;
  field.hidden = value === null;
  field.value = value ?? "";
  dialog.returnValue = "";
  dialog.onclose = () => dialog.returnValue === "yes" && then(field.value);
  byId("ask-form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close("yes");
  };
  byId("ask-no").onclick = () => dialog.close("no");
  dialog.showModal();
}

function bindKeys(chat, drawers) {
  const toggleSwitch = (id) => byId(id).click();
  const keys = {
    KeyN: () => byId("new-chat").click(),
    KeyS: () => toggleSwitch("speculate"),
    KeyT: () => toggleSwitch("tint"),
    KeyP: () => drawers.panel.toggle(),
    KeyH: () => drawers.history.toggle(),
    KeyM: () => byId("text").focus(),
    Slash: () => byId("keys").showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && !closeDrawers(drawers)) chat.stop();
    const action = event.altKey && !event.ctrlKey && !event.metaKey ? keys[event.code] : undefined;
    if (!action) return;
    event.preventDefault();
    action();
  });
  byId("open-keys").addEventListener("click", () => byId("keys").showModal());
  byId("keys-close").addEventListener("click", () => byId("keys").close());
}

/** A function that copies a text and says so for a moment. */
function copier() {
  const element = byId("toast");
  let timer = 0;
  const toast = (text) => {
    element.textContent = text;
    element.dataset.shown = "true";
    announce(text);
    clearTimeout(timer);
    timer = setTimeout(() => delete element.dataset.shown, TOAST_MS);
  };
  return async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      toast("Copied.");
    } catch {
      toast("The browser did not allow copying.");
    }
  };
}

start();
