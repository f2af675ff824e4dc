// Shows tinted text as it grows, with light Markdown: code fences, inline code, bold, headings and
// lists. The text in the page is the text given, to the character: marks are dimmed by the style
// sheet and never removed. It knows spans {text, kind, token, round} and nothing of where they come
// from. A line is drawn again while it grows and never after that.

import { h, icon } from "./dom.js";
import { mergeSpans } from "./tint.js";

const MAX_TOKEN_ELEMENTS = 6000;
const MAX_OPEN_CHARACTERS = 400;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*/g;

export class TextView {
  constructor(root, { onCopy = () => {} } = {}) {
    this.root = root;
    this.onCopy = onCopy;
    this.clear();
  }

  clear() {
    this.root.replaceChildren();
    this.fence = null;
    this.line = null;
    this.numElements = 0;
  }

  /** Take spans; `draw` shows them. */
  push(spans) {
    for (const span of spans) {
      const parts = span.text.split("\n");
      for (const [index, part] of parts.entries()) {
        const text = index < parts.length - 1 ? `${part}\n` : part;
        if (text) this.extend({ ...span, text });
        if (text.endsWith("\n")) this.endLine();
      }
    }
  }

  /** Bring the page up to date; call once a frame. */
  draw() {
    if (this.line?.changed) this.drawLine();
  }

  extend(span) {
    if (!this.line) {
      const element = h("span", { class: "line" });
      (this.fence ?? this.root).append(element);
      this.line = { element, text: "", open: [], openText: "", piece: null, changed: false };
    }
    this.line.text += span.text;
    this.line.openText += span.text;
    this.line.open.push(span);
    this.line.changed = true;
    if (this.line.openText.length > MAX_OPEN_CHARACTERS) this.freeze();
  }

  endLine() {
    if (!this.line) return;
    this.drawLine();
    const isFence = this.line.element.classList.contains("fence");
    if (isFence && this.fence && !this.line.opensFence) this.fence = null;
    this.numElements += this.line.open.length;
    this.line = null;
  }

  /** A long line is cut where no mark is open, so that a frame never draws it all again. */
  freeze() {
    const { openText, open } = this.line;
    const isOpen = (mark) => openText.split(mark).length % 2 === 0;
    if ((isOpen("`") || isOpen("**")) && openText.length < 8 * MAX_OPEN_CHARACTERS) return;
    this.drawLine();
    this.numElements += open.length;
    Object.assign(this.line, { open: [], openText: "", piece: null, changed: false });
  }

  drawLine() {
    const { line } = this;
    const kind = this.kindOf(line.text);
    if (kind === "fence" && !this.fence) this.openFence();
    line.element.className = `line ${kind}`;
    if (!line.piece) {
      line.piece = h("span");
      line.element.append(line.piece);
    }
    const spans = this.numElements > MAX_TOKEN_ELEMENTS ? mergeSpans(line.open) : line.open;
    const ranges = this.fence ? [] : inlineRanges(line.openText);
    line.piece.replaceChildren(...pieces(spans, ranges, line.openText.length));
    line.changed = false;
  }

  kindOf(text) {
    if (/^\s*```/.test(text)) return "fence";
    if (this.fence) return "code";
    if (/^\s*$/.test(text)) return "gap";
    if (/^#{1,6} /.test(text)) return "heading";
    return /^\s*([-*]|\d+[.)]) /.test(text) ? "item" : "paragraph";
  }

  openFence() {
    const code = h("code");
    const text = () => code.textContent.replace(/^.*\n/, "").replace(/\n?\s*```\s*$/, "");
    const copy = { type: "button", class: "button quiet copy-code", "aria-label": "Copy this code" };
    copy.title = "Copy this code";
    copy.on = { click: () => this.onCopy(text()) };
    const frame = h("div", { class: "codeframe" }, h("button", copy, icon("copy")), h("pre", {}, code));
    this.line.element.replaceWith(frame);
    code.append(this.line.element);
    this.fence = code;
    this.line.opensFence = true;
  }
}

/** Ranges {start, end, tag, class} of marks and of what they enclose, in order. */
function inlineRanges(text) {
  const ranges = [];
  const heading = /^#{1,6} /.exec(text);
  if (heading) ranges.push({ start: 0, end: heading[0].length, tag: "span", class: "mark" });
  for (const match of text.matchAll(INLINE)) {
    const size = match[1] ? match[1].length : 2;
    const [start, end] = [match.index, match.index + match[0].length];
    const tag = match[1] ? "code" : "strong";
    ranges.push({ start, end: start + size, tag: "span", class: "mark" });
    ranges.push({ start: start + size, end: end - size, tag, class: null });
    ranges.push({ start: end - size, end, tag: "span", class: "mark" });
  }
  return ranges;
}

/** Elements for all of a line's text: spans, cut at the ranges and wrapped in their tags. */
function pieces(spans, ranges, length) {
  const elements = [];
  const cursor = { index: 0, offset: 0 };
  let at = 0;
  for (const range of ranges) {
    elements.push(...tokens(spans, cursor, range.start - at));
    const inside = tokens(spans, cursor, range.end - range.start);
    elements.push(h(range.tag, { class: range.class }, ...inside));
    at = range.end;
  }
  elements.push(...tokens(spans, cursor, length - at));
  return elements;
}

/** Elements for the next `length` characters at the cursor, which moves on. */
function tokens(spans, cursor, length) {
  const elements = [];
  for (let left = length; left > 0; ) {
    const span = spans[cursor.index];
    const text = span.text.slice(cursor.offset, cursor.offset + left);
    left -= text.length;
    elements.push(token(span, text));
    cursor.offset += text.length;
    if (cursor.offset === span.text.length) Object.assign(cursor, { index: cursor.index + 1, offset: 0 });
  }
  return elements;
}

function token(span, text) {
  const element = document.createElement("span");
  element.className = `token ${span.kind}`;
  element.textContent = text;
  if (span.round >= 0) element.dataset.round = span.round;
  if (span.token >= 0) element.dataset.token = span.token;
  return element;
}
