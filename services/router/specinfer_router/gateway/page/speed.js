// Speeds to compare: of an answer, and of plain decoding as it was measured.
// It knows facts of runs and the model's facts; it draws nothing.

const MIN_SECONDS = 0.02;

/** Tokens per second of a run's facts after its first tokens, or 0 when too short to say. */
export function speedOf(facts) {
  return facts?.decodeSeconds >= MIN_SECONDS ? facts.decodeTokens / facts.decodeSeconds : 0;
}

/** Adds up the user's own messages without speculation, and falls back on the router's measure. */
export class PlainSpeed {
  constructor() {
    this.tokens = 0;
    this.seconds = 0;
    this.roundSeconds = 0;
  }

  /** `plain_round_seconds` of /v1/models, 0 while unmeasured. */
  setRoundSeconds(seconds) {
    this.roundSeconds = Number.isFinite(seconds) ? seconds : 0;
  }

  /** Count a finished run in when it was decoded plainly. */
  count(facts) {
    if (facts.speculated || facts.decodeTokens < 2) return;
    this.tokens += facts.decodeTokens;
    this.seconds += facts.decodeSeconds;
  }

  /** {tokensPerSecond, source}; 0 and "" while nothing is known. */
  get now() {
    if (this.seconds > 0) {
      const source = "measured on your messages without speculation";
      return { tokensPerSecond: this.tokens / this.seconds, source };
    }
    if (this.roundSeconds > 0) {
      const source = "measured by the router on rounds without a guess";
      return { tokensPerSecond: 1 / this.roundSeconds, source };
    }
    return { tokensPerSecond: 0, source: "" };
  }
}

/** How two texts compare: {identical, prefix, at}; `prefix` when one begins with the other. */
export function compareTexts(first, second) {
  if (first === second) return { identical: true, prefix: true, at: first.length };
  let at = 0;
  while (at < first.length && at < second.length && first[at] === second[at]) at++;
  return { identical: false, prefix: at === Math.min(first.length, second.length), at };
}
