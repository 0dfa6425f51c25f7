// Markdown as elements: what a reply says becomes paragraphs, lists, tables, code and links, and nothing else.
//
// markdown-it only reads it, with HTML off, and never writes any. Its tokens become elements here, one by one and from a
// fixed list, so no text is ever taken as markup. Nothing is loaded either: a picture is shown as a link to it.

import MarkdownIt from "./markdown-it/markdown-it.js";

/** @typedef {{ type: string, tag: string, nesting: number, level: number, hidden: boolean, content: string,
 *              map: [number, number] | null, children: Token[] | null, attrGet: (name: string) => string | null }} Token */

const LINK = /^(https?:\/\/|mailto:)/i; // no javascript:, no data:, no path on this server
const DEEPEST = 20; // elements within each other; nobody means what is nested deeper
const TAGS = new Set(
  "p h1 h2 h3 h4 h5 h6 blockquote ul ol li hr table thead tbody tr th td em strong s".split(" "),
);

// Definitions of links would change what stands above them, long after it was shown.
const reader = new MarkdownIt({ html: false, breaks: true }).disable("reference");
reader.validateLink = (/** @type {string} */ address) => LINK.test(address);

/** A text in an element. As it grows, blocks that are complete stay as they are. */
export class MarkdownView {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
    /** @type {{ source: string, node: ChildNode }[]} */
    this.blocks = [];
  }

  /** @param {string} text */
  show(text) {
    const blocks = blocksOf(text);
    const changed = blocks.findIndex(({ source }, place) => source !== this.blocks[place]?.source);
    const kept = changed < 0 ? blocks.length : changed;
    this.blocks.splice(kept).forEach(({ node }) => node.remove());
    for (const { source, tokens } of blocks.slice(kept)) {
      build(tokens, this.element);
      this.blocks.push({ source, node: this.element.lastChild });
    }
  }
}

/**
 * The outermost blocks of a text, each with the lines that it is made of.
 * @param {string} text
 * @returns {{ source: string, tokens: Token[] }[]}
 */
function blocksOf(text) {
  /** @type {Token[]} */
  const tokens = reader.parse(text, {});
  if (tokens.some(({ level }) => level >= DEEPEST)) return [{ source: text, tokens: [asCode(text)] }];
  const lines = text.split(/\r\n?|\n/);
  const blocks = [];
  for (const token of tokens) {
    const isFirst = token.level === 0 && token.nesting >= 0;
    if (isFirst) blocks.push({ source: lines.slice(...token.map).join("\n"), tokens: [] });
    blocks.at(-1).tokens.push(token);
  }
  return blocks;
}

/** @param {string} content @returns {Token} */
const asCode = (content) => /** @type {Token} */ ({ type: "code_block", nesting: 0, content });

/** Appends what tokens stand for. @param {Token[]} tokens @param {Element} parent @param {number} [depth]  of the parent */
function build(tokens, parent, depth = 0) {
  const open = [parent];
  for (const token of tokens) {
    const within = open.at(-1);
    if (token.nesting < 0) {
      open.pop();
    } else if (token.type === "inline") {
      build(token.children, within, depth + open.length);
    } else {
      const isLeftOut = token.hidden || (token.nesting > 0 && depth + open.length > DEEPEST);
      const node = isLeftOut ? null : nodeOf(token, within);
      if (node) within.append(node);
      if (token.nesting > 0) open.push(/** @type {Element} */ (node ?? within));
    }
  }
}

/** @param {Token} token @param {Element} within @returns {Node | null} null if only what is in it counts */
function nodeOf(token, within) {
  switch (token.type) {
    case "link_open":
      return link(token.attrGet("href"));
    case "image":
      return (!within.closest("a") && link(token.attrGet("src"), token.content)) || textNode(token.content);
    case "code_inline":
      return withText("code", token.content);
    case "fence":
    case "code_block":
      return codeBlock(token.content);
    case "softbreak":
    case "hardbreak":
      return textNode("\n");
  }
  if (!TAGS.has(token.tag)) return textNode(token.content);
  const element = document.createElement(token.tag.replace(/^h[1-6]$/, belowOurs));
  const start = token.attrGet("start");
  if (start) element.setAttribute("start", start);
  const side = /^text-align:(\w+)$/.exec(token.attrGet("style") ?? "")?.[1];
  if (side) element.style.textAlign = side;
  return element;
}

/** The page has headings of its own above. @param {string} heading */
const belowOurs = (heading) => `h${Math.min(6, Number(heading[1]) + 2)}`;

/** @param {string} address @param {string} [text] */
function link(address, text) {
  if (!LINK.test(address)) return null; // an empty one, for which the reader does not ask
  const element = document.createElement("a");
  element.href = element.title = address;
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  if (text !== undefined) element.textContent = text || address;
  return element;
}

/** @param {string} code */
function codeBlock(code) {
  const element = document.createElement("pre");
  element.tabIndex = 0; // long lines can be scrolled by keyboard
  element.append(withText("code", code.replace(/\n$/, "")));
  return element;
}

/** @param {string} tag @param {string} text */
function withText(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

const textNode = (/** @type {string} */ text) => document.createTextNode(text);
