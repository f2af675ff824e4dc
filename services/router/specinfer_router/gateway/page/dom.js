// Makes elements. Text becomes text nodes and never markup; this module knows nothing of the page.

const SVG = "http://www.w3.org/2000/svg";

/** Make an HTML element; `props` are attributes, `on` listeners, `class` and `text` what they say. */
export function h(tag, props = {}, ...children) {
  return furnish(document.createElement(tag), props, children);
}

/** Make an SVG element in the same way. */
export function s(tag, props = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), props, children);
}

/** A drawing from the sprite in index.html, hidden from screen readers. */
export function icon(name) {
  return s("svg", { class: "icon", "aria-hidden": "true" }, s("use", { href: `#icon-${name}` }));
}

/** A button with a drawing and a name; `label` is shown beside it when `visible`. */
export function button(label, drawing, onClick, { visible = true, kind = "quiet" } = {}) {
  const props = { type: "button", class: `button ${kind}`, on: { click: onClick } };
  if (!visible) Object.assign(props, { "aria-label": label, title: label });
  return h("button", props, icon(drawing), visible ? h("span", { text: label }) : null);
}

/** Replace the children of `parent`. */
export function fill(parent, ...children) {
  parent.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** The element with this id; a missing one is a fault of ours. */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`the page has no element #${id}`);
  return element;
}

function furnish(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
