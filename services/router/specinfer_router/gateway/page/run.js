// One generation: makes the request, follows its stream, and holds what came of it.
// It knows the API's chunks; it draws nothing and stores nothing.

import { streamChunks } from "./api.js";
import { Rounds } from "./rounds.js";
import { TintedText } from "./tint.js";

/** A seed that JSON carries exactly; the page always sends one, so that a run can be repeated. */
export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

/**
 * The request's path and body.
 *
 * @param plan {mode: "chat" | "completion", turns: [{role, content}], settings, seed, speculate, model}
 */
export function requestOf(plan) {
  const { settings, mode } = plan;
  const body = {
    model: plan.model,
    temperature: settings.temperature,
    top_p: settings.topP,
    max_tokens: settings.maxTokens,
    seed: plan.seed,
    speculation: { enabled: plan.speculate, detail: true },
  };
  if (settings.stop.length) body.stop = settings.stop;
  if (plan.speculate && settings.maxNodes) body.speculation.max_nodes = settings.maxNodes;
  if (plan.speculate && settings.widths?.length) body.speculation.widths = settings.widths;
  if (mode === "completion") {
    return { path: "v1/completions", body: { ...body, prompt: plan.turns.at(-1).content } };
  }
  const system = settings.system.trim();
  const messages = plan.turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  return { path: "v1/chat/completions", body: { ...body, messages } };
}

export class Run {
  /** @param listeners {onSpans(spans), onRound(number), onResume(try), onEnd()} */
  constructor(plan, listeners) {
    this.plan = plan;
    this.listeners = listeners;
    this.content = "";
    this.spans = [];
    this.rounds = new Rounds();
    this.tinted = new TintedText();
    this.state = "waiting";
    this.finish = "";
    this.error = null;
    this.cursor = "";
    this.numTokens = 0;
    this.abort = new AbortController();
    this.time = { start: 0, first: 0, last: 0, firstTokens: 0 };
  }

  /** Follow the stream to its end; never throws: `state` is then done, stopped or failed. */
  async start() {
    this.state = "running";
    this.error = null;
    this.abort = new AbortController();
    this.time.start ||= performance.now();
    const { path, body } = requestOf(this.plan);
    const { onResume } = this.listeners;
    const options = { signal: this.abort.signal, cursor: this.cursor, onResume };
    try {
      for await (const chunk of streamChunks(path, body, options)) this.take(chunk);
      this.state = this.abort.signal.aborted ? "stopped" : "done";
    } catch (error) {
      this.state = "failed";
      this.error = error;
      this.cursor = error.cursor ?? "";
    }
    this.listeners.onEnd();
  }

  stop() {
    this.abort.abort();
  }

  take(chunk) {
    const choice = chunk.choices?.[0];
    if (chunk.metrics) this.metrics = chunk.metrics;
    if (chunk.usage) this.usage = chunk.usage;
    if (!choice) return;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const text = choice.delta?.content ?? choice.text ?? "";
    const speculation = choice.speculation ?? chunk.speculation;
    const number = speculation?.tokens ? this.takeRound(speculation) : this.rounds.numRounds - 1;
    if (!text && !speculation?.tokens) return;
    this.clock(speculation?.tokens?.length ?? 1);
    if (!text) return;
    const spans = this.tinted.push(text, speculation?.tokens, number);
    this.content += text;
    this.spans.push(...spans);
    this.listeners.onSpans(spans);
  }

  takeRound(speculation) {
    const number = this.rounds.push(speculation);
    this.listeners.onRound(number);
    return number;
  }

  clock(numTokens) {
    const now = performance.now();
    if (!this.time.first) Object.assign(this.time, { first: now, firstTokens: numTokens });
    this.time.last = now;
    this.numTokens += numTokens;
  }

  /** What is worth keeping beside the text; times in seconds. */
  facts() {
    const { start, first, last, firstTokens } = this.time;
    const after = this.numTokens - firstTokens;
    const seconds = (last - first) / 1000;
    return {
      seed: this.plan.seed,
      speculated: this.plan.speculate,
      state: this.state,
      finish: this.finish,
      numTokens: this.numTokens,
      // From the first tokens on: the wait for them is the prompt's, not decoding's.
      decodeTokens: after > 0 && seconds > 0 ? after : 0,
      decodeSeconds: after > 0 ? seconds : 0,
      firstSeconds: first ? (first - start) / 1000 : 0,
      rounds: this.rounds.summary(),
    };
  }
}
