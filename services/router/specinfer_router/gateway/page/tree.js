// Draws one round's token tree as SVG: the root on top, a level for each depth, the accepted path
// in full strokes, rejected guesses dashed, and the target's own token as the tail.
// It knows {texts, parents, accepted} and the tail's text, and nothing of streams or panels.

import { s } from "./dom.js";
import { depthsOf } from "./rounds.js";

const MAX_DRAWN_NODES = 160;
const MAX_LABEL = 12;
const ROW = 52;
const PILL = 28;
const GAP = 8;
const CHARACTER = 7.4;
const MIN_SCALE = 0.72;

/** A token's text as one can see it: blanks, breaks and nothing at all included. */
export function visibleText(text) {
  if (text === "") return "∅";
  const shown = text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "·");
  return shown.length > MAX_LABEL ? `${shown.slice(0, MAX_LABEL - 1)}…` : shown;
}

/** Nodes to draw, the target's own tokens last: {text, parent, depth, kind}, parents before children. */
export function nodesOf(round) {
  const { texts, parents, accepted } = round.tree;
  const kept = new Set(accepted);
  const depths = depthsOf(parents);
  const nodes = parents.slice(0, MAX_DRAWN_NODES).map((parent, index) => ({
    text: texts[index] ?? "",
    parent,
    depth: depths[index],
    kind: index === 0 ? "root" : kept.has(index) ? "accepted" : "rejected",
  }));
  let last = accepted.length ? Math.min(accepted.at(-1), nodes.length - 1) : 0;
  // Without guesses several may come at a time, one below the other.
  for (const own of round.tokens.filter((token) => !token.accepted)) {
    nodes.push({ text: own.text, parent: last, depth: nodes[last].depth + 1, kind: "tail" });
    last = nodes.length - 1;
  }
  return nodes;
}

/** An SVG element for a round ({tree, tokens}). */
export function drawTree(round) {
  const nodes = nodesOf(round);
  const width = place(nodes);
  const height = Math.max(...nodes.map((node) => node.depth)) * ROW + PILL + 4;
  const edges = nodes.filter((node) => node.parent >= 0).map((node) => edge(nodes[node.parent], node));
  const view = { viewBox: `0 0 ${width} ${height}`, width, height, class: "tree", role: "img" };
  view["aria-label"] = describe(nodes);
  const drawing = s("svg", view, ...edges, ...nodes.map(pill));
  // It shrinks to fit as far as its text stays readable, and scrolls beyond that.
  drawing.style.minWidth = `${width * MIN_SCALE}px`;
  return drawing;
}

/** Set x of every node: leaves side by side, the accepted path first, parents above its middle. */
function place(nodes) {
  const children = nodes.map(() => []);
  nodes.forEach((node, index) => node.parent >= 0 && children[node.parent].push(index));
  const rank = { accepted: 0, tail: 1, rejected: 2 };
  for (const list of children) list.sort((a, b) => rank[nodes[a].kind] - rank[nodes[b].kind]);
  nodes.forEach((node) => (node.width = visibleText(node.text).length * CHARACTER + 18));
  // Children stand after their parents, so walking back sees every subtree before its root.
  for (let index = nodes.length - 1; index >= 0; index--) {
    const below = children[index].map((child) => nodes[child].span + GAP);
    nodes[index].span = Math.max(nodes[index].width, below.reduce((a, b) => a + b, -GAP));
  }
  nodes[0].left = 2;
  nodes.forEach((node, index) => {
    const below = children[index].reduce((sum, child) => sum + nodes[child].span + GAP, -GAP);
    let left = node.left + Math.max(0, (node.span - below) / 2);
    for (const child of children[index]) {
      nodes[child].left = left;
      left += nodes[child].span + GAP;
    }
    node.x = node.left + node.span / 2;
    node.y = 2 + node.depth * ROW + PILL / 2;
  });
  return nodes[0].span + 4;
}

function edge(from, to) {
  const [top, bottom] = [from.y + PILL / 2, to.y - PILL / 2];
  const middle = (top + bottom) / 2;
  const path = `M${from.x} ${top}C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${bottom}`;
  return s("path", { d: path, class: `edge ${to.kind}` });
}

function pill(node) {
  const { x, y, width, kind } = node;
  const box = { x: x - width / 2, y: y - PILL / 2, width, height: PILL, rx: kind === "tail" ? 3 : PILL / 2 };
  return s(
    "g",
    { class: `node ${kind}` },
    s("title", { text: `${JSON.stringify(node.text)}: ${NAMES[kind]}` }),
    s("rect", box),
    s("text", { x, y: y + 4.5, "text-anchor": "middle", text: visibleText(node.text) }),
  );
}

const NAMES = {
  root: "the root, the last token before this round",
  accepted: "guessed and confirmed",
  rejected: "guessed and rejected",
  tail: "the target's own token",
};

function describe(nodes) {
  const count = (kind) => nodes.filter((node) => node.kind === kind);
  const path = count("accepted").map((node) => visibleText(node.text)).join(" ");
  const tail = count("tail").map((node) => visibleText(node.text)).join("");
  const guesses = nodes.length - 1 - count("tail").length;
  return (
    `Token tree: ${guesses} guessed, ${count("accepted").length} confirmed` +
    `${path ? ` (${path})` : ""}${tail ? `, then the target's own ${tail}` : ""}.`
  );
}
