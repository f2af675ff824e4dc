// The conversation on the page: sends, follows, stops, repeats and compares. It owns the running
// run and the views of the open conversation; the frame around it is wired in app.js.

import { apiKey } from "./api.js";
import { announce } from "./chrome.js";
import { turnsBefore } from "./conversations.js";
import { button, byId, fill, h } from "./dom.js";
import { explain } from "./errors.js";
import { AnswerView, userTurn } from "./message.js";
import { Rounds } from "./rounds.js";
import { Run, randomSeed } from "./run.js";
import { speedOf } from "./speed.js";
import { packSpans, unpackSpans } from "./tint.js";

const TURNS_SHOWN = 40;
const NEAR_END_PIXELS = 120;

export class Chat {
  /** @param parts {conversations, settings, panel, plain, modelName(), onChange(), onKey(), onCopy(text)} */
  constructor(parts) {
    Object.assign(this, parts);
    this.log = byId("turns");
    this.scroller = byId("scroller");
    this.run = null;
    this.frame = 0;
    this.drawing = new Set();
    this.open();
  }

  get running() {
    return this.run !== null;
  }

  /** Show the open conversation, or the welcome when there is none. */
  open(numShown = TURNS_SHOWN) {
    this.stop();
    const messages = this.conversations.current?.messages ?? [];
    byId("welcome").hidden = messages.length > 0;
    const first = Math.max(0, messages.length - numShown);
    const earlier = button("Show earlier messages", "up", () => this.open(messages.length));
    fill(this.log, first > 0 ? h("li", { class: "earlier" }, earlier) : null);
    let view = null;
    for (let index = first; index < messages.length; index++) view = this.add(messages, index) ?? view;
    this.panel.show(view?.shown ?? null);
    if (messages.length) this.toEnd(true);
  }

  /** Send a text as the next message. */
  send(text) {
    if (this.running || text.trim() === "") return;
    const { mode, seed } = this.settings;
    const conversation = this.conversations.begin(mode, text);
    conversation.mode = mode;
    conversation.messages.push({ role: "user", content: text });
    conversation.messages.push({ role: "assistant", content: "", spans: "", facts: null });
    this.conversations.touch(conversation);
    byId("welcome").hidden = true;
    const { messages } = conversation;
    this.add(messages, messages.length - 2);
    const view = this.add(messages, messages.length - 1);
    this.toEnd(true);
    this.generate(view, messages, { seed: seed ?? randomSeed(), speculate: this.settings.speculate });
  }

  stop() {
    this.run?.stop();
  }

  /** Put one message at the end of the log; returns its view when it is an answer. */
  add(messages, index) {
    const message = messages[index];
    const { mode } = this.conversations.current;
    if (message.role === "user") {
      this.log.append(userTurn(message.content, mode));
      return null;
    }
    const view = new AnswerView(mode, {
      onCopy: (text) => this.onCopy(text ?? message.content),
      onRegenerate: () => this.regenerate(view, messages),
      onTwin: () => this.compare(view, messages),
      onRetry: () => this.retry(view, messages),
      onRound: (number) => this.showRound(view, number),
      onKey: (key) => this.useKey(key, view, messages),
    });
    view.message = message;
    this.log.append(view.element);
    view.text.push(unpackSpans(message.content, message.spans));
    view.text.draw();
    view.shown = shownFacts(message.facts);
    if (message.facts) view.showFacts(message.facts, { last: index === messages.length - 1 });
    return view;
  }

  /** Run the request that leads to `view`'s message, from its cursor when it has one. */
  async generate(view, messages, { seed, speculate, run = null }) {
    const { message } = view;
    const conversation = this.conversations.current;
    const plan = { ...this.plan(messages, message), seed, speculate };
    const current = run ?? new Run(plan, {});
    current.listeners = {
      onSpans: (spans) => this.received(view, view.text, spans),
      onRound: () => this.panel.changed(),
      onResume: (numTry) => view.showResume(numTry),
      onEnd: () => this.ended(view, conversation, current),
    };
    this.begin(view, current);
    view.shown = shownRun(current);
    this.panel.show(view.shown);
    await current.start();
  }

  /** Repeat an answer's request with the same seed and speculation the other way. */
  async compare(view, messages) {
    if (this.running) return;
    const { facts, content } = view.message;
    const speculate = !facts.speculated;
    const plan = { ...this.plan(messages, view.message), ...(facts.plan ?? {}), seed: facts.seed, speculate };
    const text = view.openTwin(speculate);
    const run = new Run(plan, {
      onSpans: (spans) => this.received(view, text, spans),
      onRound: () => this.panel.changed(),
      onResume: () => {},
      onEnd: () => {
        this.finish(view, text);
        this.plain.count(run.facts());
        if (!view.element.isConnected) return;
        view.showFacts(facts, { last: messages.at(-1) === view.message });
        if (run.state === "failed") view.showTwinError(explain(run.error));
        else view.showVerdict({ content, facts }, { content: run.content, facts: run.facts() });
        this.panel.show(view.shown);
        this.panel.settle();
        this.toEnd();
      },
    });
    this.begin(view, run);
    this.panel.show({ ...shownRun(run), other: () => speedOf(facts) });
    view.twin.scrollIntoView({ block: "nearest" });
    await run.start();
  }

  plan(messages, message) {
    const turns = turnsBefore(messages, message);
    return { mode: this.conversations.current.mode, turns, settings: { ...this.settings }, model: this.modelName() };
  }

  regenerate(view, messages) {
    if (this.running) return;
    this.restart(view, messages, { seed: this.settings.seed ?? randomSeed(), speculate: this.settings.speculate });
  }

  retry(view, messages) {
    if (this.running) return;
    const { failed } = view;
    const { seed, speculate } = failed.plan;
    if (failed.cursor) this.generate(view, messages, { seed, speculate, run: failed });
    else this.restart(view, messages, { seed, speculate });
  }

  restart(view, messages, how) {
    view.text.clear();
    view.twin.hidden = true;
    Object.assign(view.message, { content: "", spans: "", facts: null });
    this.generate(view, messages, how);
  }

  useKey(key, view, messages) {
    if (!key) return;
    apiKey.set(key);
    this.onKey();
    this.retry(view, messages);
  }

  begin(view, run) {
    this.run = run;
    view.clearNotice();
    view.facts.replaceChildren();
    view.setRunning(true);
    this.onChange();
  }

  received(view, text, spans) {
    view.clearNotice();
    text.push(spans);
    this.drawing.add(text);
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const near = this.isNearEnd();
    for (const text of this.drawing) text.draw();
    this.drawing.clear();
    if (near) this.toEnd(true);
  }

  finish(view, text) {
    text.draw();
    view.setRunning(false);
    this.run = null;
    this.onChange();
  }

  ended(view, conversation, run) {
    const near = this.isNearEnd();
    const facts = { ...run.facts(), plan: { settings: run.plan.settings, mode: run.plan.mode } };
    this.plain.count(facts);
    view.failed = run;
    Object.assign(view.message, { content: run.content, spans: packSpans(run.spans), facts });
    this.conversations.touch(conversation);
    this.finish(view, view.text);
    // The user may have gone to another conversation meanwhile.
    if (!view.element.isConnected) return;
    this.showEnd(view, conversation.messages, run, facts);
    this.panel.settle();
    if (near) this.toEnd(true);
  }

  showEnd(view, messages, run, facts) {
    view.clearNotice();
    for (const other of this.log.querySelectorAll(".turn.answer .button[aria-label=Regenerate]")) other.remove();
    if (run.state !== "failed" || run.content) view.showFacts(facts, { last: messages.at(-1) === view.message });
    if (run.state === "failed") view.showError(explain(run.error));
    else if (run.state === "stopped") announce("Stopped.");
    else announce(`Answer: ${run.content}`);
  }

  showRound(view, number) {
    if (!view.shown?.rounds.round(number)) return;
    if (this.panel.shown !== view.shown) this.panel.show(view.shown);
    this.panel.select(number);
  }

  isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END_PIXELS;
  }

  toEnd(force = false) {
    if (!force && !this.isNearEnd()) return;
    const { scroller } = this;
    scroller.scrollTop = scroller.scrollHeight;
    // Once more when the browser knows the heights of what was just added.
    requestAnimationFrame(() => (scroller.scrollTop = scroller.scrollHeight));
  }
}

function shownRun(run) {
  return {
    rounds: run.rounds,
    speculated: run.plan.speculate,
    speed: () => speedOf(run.facts()),
    running: () => run.state === "running",
  };
}

function shownFacts(facts) {
  if (!facts) return null;
  return {
    rounds: Rounds.fromSummary(facts.rounds),
    speculated: facts.speculated,
    speed: () => speedOf(facts),
    running: () => false,
  };
}
