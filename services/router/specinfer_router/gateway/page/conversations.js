// The user's conversations, newest first, bounded and kept in the browser.
// It knows what a conversation holds and nothing of how it is shown or made.

const MAX_CONVERSATIONS = 50;
const MAX_MESSAGES = 200;
const MAX_CHARACTERS = 2_000_000;
const MAX_TITLE = 60;

export class Conversations {
  constructor(storage) {
    this.storage = storage;
    this.removed = new Set();
    this.list = sound(storage.read("conversations", []));
    this.current = this.find(storage.read("current", "")) ?? null;
  }

  find(id) {
    return this.list.find((conversation) => conversation.id === id);
  }

  open(id) {
    this.current = this.find(id) ?? null;
    this.storage.write("current", this.current?.id ?? "");
  }

  /** Leave the open conversation; the next message begins another one. */
  close() {
    this.open("");
  }

  /** The open conversation, begun now when there is none. */
  begin(mode, firstText) {
    if (!this.current) {
      const title = titleOf(firstText);
      this.current = { id: crypto.randomUUID?.() ?? String(Date.now()), title, mode, messages: [], at: 0 };
      this.list.unshift(this.current);
      this.storage.write("current", this.current.id);
    }
    return this.current;
  }

  rename(id, title) {
    const conversation = this.find(id);
    if (conversation && title.trim()) conversation.title = titleOf(title);
    this.save();
  }

  remove(id) {
    this.removed.add(id);
    this.list = this.list.filter((conversation) => conversation.id !== id);
    if (this.current?.id === id) this.close();
    this.save();
  }

  removeAll() {
    for (const { id } of this.list) this.removed.add(id);
    this.list = [];
    this.close();
    this.save();
  }

  /** A conversation was changed: it is now the newest. One that was deleted stays so. */
  touch(changed) {
    if (!this.list.includes(changed)) return;
    changed.at = Date.now();
    changed.messages.splice(0, changed.messages.length - MAX_MESSAGES);
    this.list = [changed, ...this.list.filter((conversation) => conversation !== changed)];
    this.save();
  }

  /** Another tab wrote its list: take it over, but for the conversation that is open here. */
  reload() {
    const { current } = this;
    this.list = sound(this.storage.read("conversations", []));
    if (!current) return;
    const at = this.list.findIndex((conversation) => conversation.id === current.id);
    if (at >= 0) this.list[at] = current;
    else this.list.unshift(current);
  }

  /** Keep what fits; the oldest conversations go first. What another tab has begun stays. */
  save() {
    const isNew = ({ id }) => !this.removed.has(id) && !this.find(id);
    this.list.push(...sound(this.storage.read("conversations", [])).filter(isNew));
    this.list.sort((a, b) => b.at - a.at);
    this.list.splice(MAX_CONVERSATIONS);
    let total = this.list.reduce((sum, conversation) => sum + sizeOf(conversation), 0);
    while (this.list.length > 1 && total > MAX_CHARACTERS) total -= sizeOf(this.list.pop());
    while (!this.storage.write("conversations", this.list) && this.list.length > 1) this.list.pop();
  }
}

/** What was said before `message`; questions that never got an answer are left out. */
export function turnsBefore(messages, message) {
  const before = messages.slice(0, messages.indexOf(message));
  const unanswered = (turn, index) => before[index + 1]?.role === "assistant" && !before[index + 1].content;
  return before.filter((turn, index) => turn.content !== "" && !unanswered(turn, index));
}

function sizeOf(conversation) {
  return JSON.stringify(conversation).length;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1)}…` : line || "Untitled";
}

/** Only what has the shape of a conversation; anything may stand in a browser's storage. */
function sound(list) {
  if (!Array.isArray(list)) return [];
  const isMessage = (message) =>
    ["user", "assistant"].includes(message?.role) && typeof message.content === "string";
  return list
    .filter((item) => typeof item?.id === "string" && Array.isArray(item.messages))
    .slice(0, MAX_CONVERSATIONS)
    .map((item) => ({
      id: item.id,
      title: String(item.title ?? "Untitled"),
      mode: item.mode === "completion" ? "completion" : "chat",
      at: Number(item.at) || 0,
      messages: item.messages.filter(isMessage).slice(-MAX_MESSAGES).map(soundMessage),
    }));
}

function soundMessage(message) {
  const { role, content, spans, facts } = message;
  if (role === "user") return { role, content };
  const counts = ["numTokens", "seed", "decodeTokens", "decodeSeconds"];
  const known = counts.every((name) => Number.isFinite(facts?.[name]));
  const plan = Array.isArray(facts?.plan?.settings?.stop) ? facts.plan : undefined;
  return { role, content, spans: String(spans ?? ""), facts: known ? { ...facts, plan } : null };
}
