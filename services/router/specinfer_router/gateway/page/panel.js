// The speculation panel: speeds side by side, one round's tree with a scrubber through the rounds,
// where a round's time went, and acceptance by depth. It draws what `Rounds` counted and knows
// nothing of streams or conversations.

import { byId, fill, h, s } from "./dom.js";
import { drawTree } from "./tree.js";

const STRIP_ROUNDS = 160;
const REDRAW_MS = 60;
const CALM_REDRAW_MS = 500;
const MIN_COLUMNS = 8;
const MAX_BARS = 12;
const PARTS = [
  ["draft_seconds", "drafting"],
  ["verify_seconds", "verifying"],
  ["queue_seconds", "waiting"],
  ["network_seconds", "network"],
  ["router_seconds", "router"],
];

export class Panel {
  /** @param plain a PlainSpeed */
  constructor(plain) {
    this.plain = plain;
    this.shown = null;
    this.selected = -1;
    this.live = true;
    this.timer = 0;
    const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
    this.pause = () => (calm.matches ? CALM_REDRAW_MS : REDRAW_MS);
    this.slider = byId("scrubber");
    this.slider.addEventListener("input", () => this.select(Number(this.slider.value)));
    byId("round-live").addEventListener("click", () => this.goLive());
    byId("round-strip").addEventListener("click", (event) => this.clickStrip(event));
    byId("round-previous").addEventListener("click", () => this.step(-1));
    byId("round-next").addEventListener("click", () => this.step(1));
    this.draw();
  }

  /** Show an answer: {rounds, speed(): tokens per second, running(): boolean, speculated}. */
  show(shown) {
    this.shown = shown;
    this.goLive();
  }

  /** Something changed; draws soon, a few times a second at most. */
  changed() {
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.draw();
    }, this.pause());
  }

  select(number) {
    this.selected = number;
    this.live = false;
    this.draw();
  }

  step(by) {
    const { rounds } = this.shown ?? {};
    if (!rounds?.kept.length) return;
    const [first, last] = [rounds.kept[0].number, rounds.kept.at(-1).number];
    this.select(Math.min(last, Math.max(first, this.current() + by)));
  }

  /** The answer is complete: stay where the user looks, or else show the round that kept most. */
  settle() {
    const { kept } = this.shown?.rounds ?? { kept: [] };
    if (this.live && kept.length) {
      const best = kept.reduce((a, b) => (b.tree.accepted.length > a.tree.accepted.length ? b : a));
      this.selected = best.tree.accepted.length ? best.number : kept.at(-1).number;
      this.live = false;
    }
    this.changed();
  }

  goLive() {
    this.live = true;
    this.draw();
  }

  current() {
    const { kept } = this.shown.rounds;
    if (!kept.length) return -1;
    const last = kept.at(-1).number;
    return this.live ? last : Math.min(last, Math.max(kept[0].number, this.selected));
  }

  draw() {
    const rounds = this.shown?.rounds;
    byId("panel-empty").hidden = Boolean(rounds?.numRounds);
    byId("panel-body").hidden = !rounds?.numRounds;
    if (!rounds?.numRounds) return;
    this.drawNumbers(rounds);
    this.drawSpeeds();
    this.drawRound(rounds);
    drawDepths(rounds);
  }

  drawNumbers(rounds) {
    byId("per-round").textContent = rounds.tokensPerRound.toFixed(2);
    const rate = rounds.numDraftTokens ? rounds.numAcceptedTokens / rounds.numDraftTokens : 0;
    byId("kept-rate").textContent = rounds.numDraftTokens ? `${Math.round(100 * rate)} %` : "–";
    byId("num-rounds").textContent = String(rounds.numRounds);
    byId("num-tokens").textContent = String(rounds.numTokens);
  }

  drawSpeeds() {
    const { speculated, speed, other } = this.shown;
    const measured = this.plain.now;
    const fast = speculated ? speed() : (other?.() ?? 0);
    const plain = speculated ? measured.tokensPerSecond : speed();
    const source = speculated ? measured.source : "this answer";
    const most = Math.max(fast, plain, 1e-9);
    const bars = [["with speculation", fast, "accepted"], ["plain decoding", plain, "own"]];
    const shown = bars.filter(([, value], index) => value || index === Number(!speculated));
    fill(byId("speeds"), ...shown.map(([label, value, kind]) => bar(label, value, most, kind)));
    byId("plain-source").textContent = source ? `Plain decoding: ${source}.` : PLAIN_UNKNOWN;
    drawRatio(plain && fast ? fast / plain : 0);
  }

  drawRound(rounds) {
    const number = this.current();
    const round = rounds.round(number);
    byId("rounds").hidden = !round;
    byId("rounds-gone").hidden = Boolean(round);
    if (!round) return;
    const [first, last] = [rounds.kept[0].number, rounds.kept.at(-1).number];
    Object.assign(this.slider, { min: first, max: last, value: number, disabled: first === last });
    this.slider.setAttribute("aria-valuetext", `Round ${number + 1} of ${rounds.numRounds}`);
    byId("round-title").textContent = `Round ${number + 1} of ${rounds.numRounds}`;
    byId("round-live").hidden = this.live || !this.shown.running();
    // Not `disabled`, which would take the focus away from whoever steps to the end.
    byId("round-previous").setAttribute("aria-disabled", String(number <= first));
    byId("round-next").setAttribute("aria-disabled", String(number >= last));
    byId("round-story").textContent = story(round);
    fill(byId("tree"), drawTree(round));
    drawStrip(rounds, number);
    drawTimes(round.facts);
  }

  clickStrip(event) {
    const round = event.target.closest("[data-round]")?.dataset.round;
    if (round !== undefined) this.select(Number(round));
  }
}

// Why the cluster guessed nothing in a round; other reasons are shown as they are.
const REASONS = {
  disabled: ", for speculation is off",
  budget: ", for they would not have paid here (tree widths in the settings insist on some)",
};
const PLAIN_UNKNOWN = "Plain decoding was not measured yet: switch speculation off for one message.";

function story({ tree, tokens, facts }) {
  const guesses = tree.parents.length - 1;
  const own = tokens.length ? " from the target itself" : "";
  const count = `${tokens.length} token${tokens.length === 1 ? "" : "s"}`;
  if (guesses === 0) {
    const reason = facts.root_only_reason;
    const why = REASONS[reason] ?? (reason ? `: ${reason.replaceAll("_", " ")}` : "");
    return `No guesses${why}; ${count}${own}.`;
  }
  return `${tree.accepted.length} of ${guesses} guesses kept, ${count} from one pass of the target.`;
}

function bar(label, value, most, kind) {
  const row = s("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  row.append(s("rect", { width: 100, height: 8, class: "bar-ground" }));
  row.append(s("rect", { width: (100 * value) / most, height: 8, class: `bar-fill ${kind}` }));
  const figure = value ? value.toFixed(1) : "–";
  return h(
    "div",
    { class: "speed" },
    h("span", { class: "speed-label", text: label }),
    h("span", { class: "speed-value" }, h("b", { text: figure }), " tokens/s"),
    row,
  );
}

function drawRatio(ratio) {
  const element = byId("speed-ratio");
  element.textContent = ratio ? `${ratio.toFixed(2)}×` : "";
  element.hidden = !ratio;
  element.classList.toggle("slower", ratio < 1);
}

/** One column a round: what was kept below, the target's own token on top, guesses as the ground. */
function drawStrip(rounds, selected) {
  const kept = rounds.kept;
  const end = Math.min(kept.length, Math.max(STRIP_ROUNDS, selected - kept[0].number + 1));
  const shown = kept.slice(Math.max(0, end - STRIP_ROUNDS), end);
  const most = Math.max(4, ...shown.map((round) => round.tokens.length));
  const columns = Math.max(shown.length, MIN_COLUMNS);
  const elements = shown.map((round, index) => column(round, index, most, round.number === selected));
  const view = { viewBox: `0 0 ${columns * 6} 40`, preserveAspectRatio: "none", "aria-hidden": "true" };
  fill(byId("round-strip"), s("svg", view, ...elements));
}

function column(round, index, most, isSelected) {
  const unit = 36 / most;
  const [kept, all] = [round.tree.accepted.length * unit, round.tokens.length * unit];
  const at = { x: index * 6 + 1, width: 4 };
  return s(
    "g",
    { "data-round": round.number, class: isSelected ? "column selected" : "column" },
    s("rect", { x: index * 6, y: 0, width: 6, height: 40, class: "column-ground" }),
    s("rect", { ...at, y: 40 - kept, height: kept, class: "column-accepted" }),
    s("rect", { ...at, y: 40 - all, height: Math.max(0, all - kept), class: "column-own" }),
  );
}

function drawTimes(facts) {
  const parts = PARTS.map(([name, label]) => ({ label, seconds: Number(facts[name]) || 0 }));
  const total = parts.reduce((sum, part) => sum + part.seconds, 0);
  byId("times").hidden = total === 0;
  if (total === 0) return;
  let x = 0;
  const rects = parts.map(({ seconds }, index) => {
    const width = (100 * seconds) / total;
    x += width;
    return s("rect", { x: x - width, width, height: 8, class: `part part-${index}` });
  });
  const view = { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" };
  const names = parts.map(({ label, seconds }, index) =>
    h("li", { class: `part-${index}` }, `${label} `, h("b", { text: (1000 * seconds).toFixed(1) })),
  );
  fill(byId("times"), h("h4", { text: `Where ${(1000 * total).toFixed(1)} ms went` }),
    s("svg", view, ...rects), h("ul", { class: "parts" }, ...names));
}

function drawDepths(rounds) {
  byId("depths-part").hidden = rounds.offered.length === 0;
  const rows = rounds.offered.slice(0, MAX_BARS).map((offered, level) => {
    const rate = offered ? rounds.accepted[level] / offered : 0;
    const row = s("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
    row.append(s("rect", { width: 100, height: 8, class: "bar-ground" }));
    row.append(s("rect", { width: 100 * rate, height: 8, class: "bar-fill accepted" }));
    const name = h("th", { scope: "row", text: String(level + 1) });
    const share = h("td", { class: "number", text: `${Math.round(100 * rate)} %` });
    const count = h("td", { class: "number faint", text: `${rounds.accepted[level]}/${offered}` });
    return h("tr", {}, name, h("td", { class: "bar-cell" }, row), share, count);
  });
  fill(byId("depths"), ...rows);
}
