// Shows one turn: what the user said, or an answer with its tint, facts, actions and comparison.
// It draws what it is told; it sends nothing, stores nothing and knows no conversation.

import { button, fill, h, icon } from "./dom.js";
import { compareTexts, speedOf } from "./speed.js";
import { TextView } from "./textview.js";

export function userTurn(content, mode) {
  const name = mode === "completion" ? "Prompt" : "You";
  return h(
    "li",
    { class: "turn user" },
    h("h3", { class: "who", text: name }),
    h("div", { class: "said", text: content }),
  );
}

export class AnswerView {
  /** @param actions {onCopy(text), onRegenerate(), onTwin(), onRetry(), onRound(number), onKey(key)} */
  constructor(mode, actions) {
    this.actions = actions;
    this.body = h("div", { class: "answer-text" });
    this.text = new TextView(this.body, { onCopy: actions.onCopy });
    this.notice = h("div", { class: "notice", hidden: true });
    this.facts = h("p", { class: "facts" });
    this.buttons = h("div", { class: "actions" });
    this.twin = h("section", { class: "twin", hidden: true, "aria-label": "The same request again" });
    const name = mode === "completion" ? "Completion" : "Answer";
    const foot = h("div", { class: "foot" }, this.facts, this.buttons);
    const heading = h("h3", { class: "who", text: name });
    this.element = h("li", { class: "turn answer" }, heading, this.body, this.notice, foot, this.twin);
    this.body.addEventListener("click", (event) => {
      const round = event.target.closest("[data-round]")?.dataset.round;
      if (round !== undefined && String(getSelection()) === "") actions.onRound(Number(round));
    });
  }

  setRunning(running) {
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    if (running) this.buttons.replaceChildren();
  }

  showResume(numTry) {
    this.note("The connection broke. Going on where it was", `, try ${numTry}.`);
  }

  note(...texts) {
    this.notice.className = "notice";
    this.notice.hidden = false;
    fill(this.notice, icon("link"), h("p", {}, ...texts));
  }

  clearNotice() {
    this.notice.hidden = true;
  }

  /** Show what failed, in place: {title, text, retry, needsKey}. */
  showError(problem) {
    this.notice.className = "notice error";
    this.notice.hidden = false;
    const retry = problem.retry ? button(problem.retry, "again", this.actions.onRetry, { kind: "solid" }) : null;
    const form = problem.needsKey ? keyForm(this.actions.onKey) : null;
    fill(
      this.notice,
      icon("alert"),
      h("div", { role: "alert" }, h("strong", { text: problem.title }), h("p", { text: problem.text })),
      retry ?? form,
    );
  }

  /** Facts of the ended run, and what can be done with the answer. */
  showFacts(facts, { last }) {
    fill(this.facts, ...factItems(facts));
    const { onCopy, onRegenerate, onTwin } = this.actions;
    const copy = button("Copy", "copy", () => onCopy(null), { visible: false });
    const again = last ? button("Regenerate", "again", onRegenerate, { visible: false }) : null;
    const label = facts.speculated ? "Run again without speculation" : "Run again with speculation";
    const repeatable = facts.numTokens > 0;
    fill(this.buttons, copy, again, repeatable ? button(label, "compare", onTwin) : null);
  }

  /** Make room for the second run; returns the view of its text. */
  openTwin(speculated) {
    const title = speculated ? "The same request with speculation" : "The same request without speculation";
    this.twinText = h("div", { class: "answer-text" });
    this.verdict = h("div", { class: "verdict", role: "status" });
    const details = h("details", { open: true }, h("summary", { text: title }), this.twinText);
    fill(this.twin, details, this.verdict);
    this.twin.hidden = false;
    return new TextView(this.twinText, { onCopy: this.actions.onCopy });
  }

  /** Say whether both texts are the same and how the speeds compare. */
  showVerdict(first, second) {
    fill(this.verdict, ...verdict(first, second));
    this.verdict.dataset.same = String(compareTexts(first.content, second.content).identical);
  }

  showTwinError(problem) {
    fill(this.verdict, icon("alert"), h("p", { text: `${problem.title}. ${problem.text}` }));
    this.verdict.dataset.same = "unknown";
  }
}

function verdict(first, second) {
  const { identical, prefix, at } = compareTexts(first.content, second.content);
  const stopped = [first, second].some((side) => side.facts.state !== "done");
  const [fast, plain] = first.facts.speculated ? [first, second] : [second, first];
  const speeds = [speedOf(fast.facts), speedOf(plain.facts)];
  let text = `Different from character ${at + 1} on.`;
  if (identical) text = `Identical: all ${at} characters are the same.`;
  else if (prefix && stopped) text = `Identical as far as both go: ${at} characters.`;
  const lines = [h("strong", { text })];
  if (speeds[0] && speeds[1]) {
    const ratio = speeds[0] / speeds[1];
    const [fastest, without] = speeds.map((speed) => speed.toFixed(1));
    const pace = ratio >= 1 ? `${ratio.toFixed(2)}× as fast` : `${ratio.toFixed(2)}× the speed`;
    lines.push(h("span", { text: `${fastest} tokens/s with speculation, ${without} without: ${pace}.` }));
  }
  return [icon(identical || (prefix && stopped) ? "check" : "alert"), h("p", {}, ...lines)];
}

function factItems(facts) {
  const speed = speedOf(facts);
  const { numRounds, numTokens } = facts.rounds ?? {};
  const items = [
    [`${facts.numTokens}`, facts.numTokens === 1 ? "token" : "tokens"],
    speed ? [speed.toFixed(1), "tokens/s"] : null,
    numRounds ? [(numTokens / numRounds).toFixed(2), "a round"] : null,
    ["seed", String(facts.seed)],
    facts.speculated ? null : ["speculation", "off"],
    facts.state === "stopped" ? ["stopped", ""] : null,
    facts.finish === "length" ? ["cut at the most tokens", ""] : null,
  ];
  return items.filter(Boolean).map(([first, second]) => h("span", { text: `${first} ${second}`.trim() }));
}

function keyForm(onKey) {
  const name = "API key, kept until this tab closes";
  const field = h("input", { type: "password", autocomplete: "off", required: true, "aria-label": name });
  const label = h("span", { "aria-hidden": "true", text: name });
  const send = h("button", { class: "button solid", type: "submit", text: "Use this key" });
  const submit = (event) => {
    event.preventDefault();
    onKey(field.value.trim());
  };
  return h("form", { class: "key-form", on: { submit } }, label, h("div", { class: "row" }, field, send));
}
