// Two replies beside each other, and the vote on them. Which model said which, nobody here knows.

import { ServerError } from "./api.js";
import { MarkdownView } from "./markdown.js";
import { noteOn } from "./transcript.js";

/** @typedef {import("./api.js").Pair} Pair */
/** @typedef {import("./api.js").Piece} Piece */
/** @typedef {import("./api.js").Vote} Vote */

export class Ballot {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
    this.title = element.querySelector("h2");
    this.trouble = /** @type {HTMLElement} */ (element.querySelector("[role=alert]"));
    this.buttons = [...element.querySelectorAll("button")];
    const [left, right] = element.querySelectorAll("article");
    this.sides = { left: new SideView(left), right: new SideView(right) };
    /** @type {(vote: Vote) => void} */
    this.choose = () => {};
    /** @type {Vote | null} the first of which nobody knows whether it was stored */
    this.unanswered = null;
    for (const button of this.buttons) button.onclick = () => this.choose(/** @type {Vote} */ (button.value));
    element.addEventListener("keydown", (event) => this.#takeKey(event));
  }

  /**
   * Shows a pair until there is a vote on it that the server has taken.
   * @param {Pair} pair
   * @param {(vote: Vote) => Promise<void>} cast  tells the server
   * @param {AbortSignal} signal  ends it without a vote
   * @returns {Promise<Vote>}
   * @throws {ServerError} if the pair is gone
   */
  async vote(pair, cast, signal) {
    this.sides.left.show(pair.left);
    this.sides.right.show(pair.right);
    this.trouble.hidden = true;
    this.unanswered = null;
    this.element.hidden = false;
    this.title.focus({ preventScroll: true }); // not on a button: who types on must not vote
    this.title.scrollIntoView(); // to be read from the beginning
    try {
      for (;;) {
        const stored = await this.#stored(await this.#choice(signal), cast);
        if (stored) return stored;
      }
    } finally {
      this.choose = () => {};
      this.element.hidden = true;
    }
  }

  /** What is to be heard of it. */
  get said() {
    return `Reply 1: ${this.sides.left.said} Reply 2: ${this.sides.right.said} Which is better?`;
  }

  /** @param {AbortSignal} signal @returns {Promise<Vote>} */
  #choice(signal) {
    return new Promise((resolve, reject) => {
      this.choose = resolve;
      signal.addEventListener("abort", () => reject(signal.reason), { once: true });
      if (signal.aborted) reject(signal.reason);
    });
  }

  /**
   * The vote that the server has stored; null if there is none yet, and it says why not.
   * @param {Vote} vote @param {(vote: Vote) => Promise<void>} cast @returns {Promise<Vote | null>}
   */
  async #stored(vote, cast) {
    this.choose = () => {};
    this.trouble.hidden = true;
    try {
      await cast(vote);
      return vote;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      if (error.status === 409) return this.unanswered ?? vote; // its answer was lost on the way
      if (!error.isPassing) throw error;
      if (error.status === 0) this.unanswered ??= vote;
      this.trouble.textContent = error.message;
      this.trouble.hidden = false;
      return null;
    }
  }

  /** Votes by a digit, wherever the focus is in here. @param {KeyboardEvent} event */
  #takeKey({ key, altKey, ctrlKey, metaKey, repeat }) {
    if (altKey || ctrlKey || metaKey || repeat) return;
    this.buttons.find((button) => button.getAttribute("aria-keyshortcuts") === key)?.click();
  }
}

class SideView {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.note = /** @type {HTMLElement} */ (element.querySelector(".note"));
    this.text = /** @type {HTMLElement} */ (element.querySelector(".text"));
    this.view = new MarkdownView(this.text);
  }

  /** @param {Piece} piece */
  show({ text, finish, tokens = 0, droppedTurns = 0 }) {
    this.view.show(text);
    const note = noteOn({ text, outcome: { finish, tokens, tokensPerSecond: 0, droppedTurns } });
    this.note.textContent = note;
    this.note.hidden = !note;
  }

  get said() {
    return this.text.innerText || this.note.textContent;
  }
}
