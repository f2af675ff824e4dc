// Counts what the rounds of one answer did, and keeps the last of them to look at.
// It knows the chunks' `speculation` object and nothing of how it is drawn.

const MAX_ROUNDS_KEPT = 512;
const MAX_DEPTHS = 64;

/** Depth of each node of a tree given as parents, the root's being 0. */
export function depthsOf(parents) {
  const depths = [];
  for (const [node, parent] of parents.entries()) depths.push(node === 0 ? 0 : depths[parent] + 1);
  return depths;
}

export class Rounds {
  constructor() {
    this.kept = [];
    this.numRounds = 0;
    this.numTokens = 0;
    this.numDraftTokens = 0;
    this.numAcceptedTokens = 0;
    this.numDrafts = 0;
    // By depth, depth 1 first: rounds whose tree went that deep, and rounds that kept a guess there.
    this.offered = [];
    this.accepted = [];
  }

  /** Take the `speculation` object of one chunk; returns the number of its round. */
  push(speculation) {
    const tree = speculation.tree ?? { texts: [""], parents: [-1], accepted: [] };
    const depth = Math.min(MAX_DEPTHS, Math.max(...depthsOf(tree.parents)));
    const number = this.numRounds++;
    this.numTokens += speculation.tokens.length;
    this.numDraftTokens += tree.parents.length - 1;
    this.numAcceptedTokens += tree.accepted.length;
    this.numDrafts += tree.parents.length > 1 ? 1 : 0;
    for (let level = 0; level < depth; level++) {
      this.offered[level] = (this.offered[level] ?? 0) + 1;
      this.accepted[level] = (this.accepted[level] ?? 0) + (tree.accepted.length > level ? 1 : 0);
    }
    this.kept.push({ number, tree, tokens: speculation.tokens, facts: speculation.round ?? {} });
    if (this.kept.length > MAX_ROUNDS_KEPT) this.kept.shift();
    return number;
  }

  /** The kept round with this number, or undefined. */
  round(number) {
    return this.kept[number - (this.kept[0]?.number ?? 0)];
  }

  get tokensPerRound() {
    return this.numRounds ? this.numTokens / this.numRounds : 0;
  }

  /** What is kept of an answer when its rounds are gone. */
  summary() {
    const { numRounds, numTokens, numDraftTokens, numAcceptedTokens, offered, accepted } = this;
    return { numRounds, numTokens, numDraftTokens, numAcceptedTokens, offered, accepted };
  }

  /** Rounds with the counts of a summary and none to look at; odd summaries give zeros. */
  static fromSummary(summary) {
    const rounds = new Rounds();
    for (const name of ["numRounds", "numTokens", "numDraftTokens", "numAcceptedTokens"]) {
      if (Number.isFinite(summary?.[name])) rounds[name] = summary[name];
    }
    for (const name of ["offered", "accepted"]) {
      if (Array.isArray(summary?.[name])) {
        rounds[name] = summary[name].slice(0, MAX_DEPTHS).map((count) => Number(count) || 0);
      }
    }
    return rounds;
  }
}
