// Says how each piece of an answer's text came: "accepted" (guessed and confirmed), "own" (the
// target's own token) or "plain" (nobody told). It knows neither the page nor the network.
//
// Chunks carry certain text beside the tokens of the round, and the two need not line up: a
// character may be split over tokens, and text is held back where a stop string may be forming. So
// tokens wait in a queue, and text takes its kind from the queue as it arrives. The text alone
// decides what is shown; a token that cannot be found in it is passed over.

const MAX_WAITING = 512;
const SEARCH_TOKENS = 8;

export class TintedText {
  constructor() {
    this.waiting = [];
    this.numTokens = 0;
  }

  /** Take one round's tokens ([{text, accepted}]) and the text that became certain; return spans
   * {text, kind, token, round}, whose texts join to exactly `text`. */
  push(text, tokens, round) {
    for (const token of tokens ?? []) {
      this.waiting.push({
        text: token.text,
        kind: token.accepted ? "accepted" : "own",
        token: this.numTokens++,
        round,
      });
    }
    const spans = [];
    for (let rest = text; rest !== ""; ) {
      const span = this.take(rest, round);
      spans.push(span);
      rest = rest.slice(span.text.length);
    }
    this.waiting.splice(0, this.waiting.length - MAX_WAITING);
    return spans;
  }

  take(rest, round) {
    while (this.waiting.length && this.waiting[0].text === "") this.waiting.shift();
    const next = this.waiting[0];
    if (next === undefined) return { text: rest, kind: "plain", token: -1, round };
    if (rest.startsWith(next.text)) {
      this.waiting.shift();
      return next;
    }
    if (next.text.startsWith(rest)) {
      this.waiting[0] = { ...next, text: next.text.slice(rest.length) };
      return { ...next, text: rest };
    }
    return this.takeUnmatched(rest, next);
  }

  /** The next token's text does not stand here, as with half a character: give it the text up to
   * the next waiting token that does. */
  takeUnmatched(rest, next) {
    this.waiting.shift();
    for (const [index, candidate] of this.waiting.slice(0, SEARCH_TOKENS).entries()) {
      const at = isWhole(candidate.text) ? rest.indexOf(candidate.text) : -1;
      if (at === 0) {
        this.waiting.splice(0, index);
        return this.take(rest, next.round);
      }
      if (at > 0) {
        this.waiting.splice(0, index);
        return { ...next, text: rest.slice(0, at) };
      }
    }
    return { ...next, text: rest };
  }
}

function isWhole(text) {
  return text !== "" && !text.includes("\uFFFD");
}

/** Spans as a short string, "a3o1": kind and number of UTF-16 units of each run. */
export function packSpans(spans) {
  return mergeSpans(spans).map((span) => span.kind[0] + span.text.length).join("");
}

/** Spans of `content` from what `packSpans` made; never loses text, whatever `packed` says. */
export function unpackSpans(content, packed) {
  const kinds = { a: "accepted", o: "own", p: "plain" };
  const spans = [];
  let at = 0;
  for (const [, kind, length] of String(packed ?? "").matchAll(/([aop])(\d+)/g)) {
    const text = content.slice(at, at + Number(length));
    at += text.length;
    if (text) spans.push({ text, kind: kinds[kind], token: -1, round: -1 });
  }
  if (at < content.length) spans.push({ text: content.slice(at), kind: "plain", token: -1, round: -1 });
  return spans;
}

/** Neighbours of one kind as one span. */
export function mergeSpans(spans) {
  const merged = [];
  for (const span of spans) {
    const last = merged.at(-1);
    if (last?.kind === span.kind) last.text += span.text;
    else merged.push({ ...span, token: -1, round: -1 });
  }
  return merged;
}
