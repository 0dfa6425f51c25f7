// The turns on the screen. A reply under way only ever touches the end of its own text, so a long conversation costs
// no more per token than a short one.

import { MarkdownView } from "./markdown.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Turn} Turn */
/** @typedef {import("./conversation.js").Outcome} Outcome */

/**
 * What the buttons of a turn do.
 * @typedef {object} Actions
 * @property {(place: number, text: string) => void} edit  another version of a message, to be sent
 * @property {(place: number) => void} retry  another version of a reply
 * @property {(place: number) => void} choose  show another version that is there
 * @property {(text: string) => void} copy
 */

export class Transcript {
  /** @param {HTMLElement} list @param {Actions} actions */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    /** @type {TurnView[]} */
    this.views = [];
  }

  /**
   * Shows the path of a conversation; what it shares with what is shown already stays as it is.
   * @param {Conversation} conversation
   */
  show(conversation) {
    const path = conversation.path();
    const branches = conversation.branches();
    const views = path.map((place, depth) => {
      const shown = this.views[depth];
      return shown?.place === place ? shown : new TurnView(place, conversation.turns[place].role, this.actions);
    });
    views.forEach((view) => {
      const turn = conversation.turns[view.place];
      view.show(turn, branches.get(turn.parent));
    });
    const kept = new Set(views);
    this.views.filter((view) => !kept.has(view)).forEach((view) => view.element.remove());
    this.list.append(...views.filter((view) => !view.element.isConnected).map((view) => view.element));
    this.views = views;
  }

  /** The last turn that is shown. @returns {TurnView | undefined} */
  get last() {
    return this.views.at(-1);
  }

  /** Forgets what is shown, for the places of another conversation mean other turns. */
  clear() {
    this.views = [];
    this.list.replaceChildren();
  }
}

class TurnView {
  /** @param {number} place @param {Turn["role"]} role @param {Actions} actions */
  constructor(place, role, actions) {
    this.place = place;
    this.element = copyOf("turn-template");
    this.element.classList.add(role);
    this.find("h2").textContent = role === "user" ? "You" : "Reply";
    this.text = ""; // as it was written
    this.view = role === "user" ? new PlainView(this.find(".text")) : new MarkdownView(this.find(".text"));
    this.isGrowing = false;
    this.versions = [place];
    this.#connect(role, actions);
  }

  /** @param {string} selector @returns {HTMLElement} */
  find(selector) {
    return this.element.querySelector(selector);
  }

  /** @param {Turn["role"]} role @param {Actions} actions */
  #connect(role, { edit, retry, choose, copy }) {
    this.find(role === "user" ? ".retry" : ".edit").remove();
    this.find(".edit")?.addEventListener("click", () => this.#edit((text) => edit(this.place, text)));
    this.find(".retry")?.addEventListener("click", () => retry(this.place));
    this.find(".previous").addEventListener("click", () => choose(this.#beside(-1)));
    this.find(".next").addEventListener("click", () => choose(this.#beside(1)));
    this.find(".copy").addEventListener("click", () => copy(this.text));
    this.find(".copy").hidden = !navigator.clipboard; // plain HTTP to another machine has none
  }

  /** The version that lies so many steps from this one. @param {number} steps @returns {number} */
  #beside(steps) {
    return this.versions[this.versions.indexOf(this.place) + steps];
  }

  /** Touches only what has changed. @param {Turn} turn @param {number[]} versions  the places of all of this turn */
  show(turn, versions) {
    this.versions = versions;
    this.#showText(turn.text);
    this.showNote(turn.role === "assistant" ? noteOn(turn) : "");
    const number = versions.indexOf(this.place) + 1;
    const state = `${number} of ${versions.length}`;
    if (this.find(".version").textContent === state) return;
    this.find(".version").textContent = state;
    this.find(".versions").hidden = versions.length === 1;
    /** @type {HTMLButtonElement} */ (this.find(".previous")).disabled = number === 1;
    /** @type {HTMLButtonElement} */ (this.find(".next")).disabled = number === versions.length;
  }

  /** @param {string} text */
  #showText(text) {
    if (this.text === text) return;
    this.text = text;
    this.view.show(text);
  }

  /** What is to be heard of it. */
  get said() {
    return this.find(".text").innerText;
  }

  /** @param {string} note */
  showNote(note) {
    if (this.find(".note").textContent === note) return;
    this.find(".note").textContent = note;
    this.find(".note").hidden = !note;
  }

  /** Shows with the next frame what a turn has gained at its end. @param {Turn} turn @param {() => void} whenShown */
  grow(turn, whenShown) {
    if (this.isGrowing) return;
    this.isGrowing = true;
    requestAnimationFrame(() => {
      this.isGrowing = false;
      this.#showText(turn.text);
      whenShown();
    });
  }

  /** Puts an editor in the place of the text, until it is sent or cancelled. @param {(text: string) => void} send */
  #edit(send) {
    const editor = /** @type {HTMLFormElement} */ (copyOf("editor-template"));
    const field = editor.querySelector("textarea");
    const close = () => {
      editor.remove();
      this.element.classList.remove("edited");
      this.find(".edit").focus();
    };
    const submit = () => {
      const text = field.value;
      if (!text.trim()) return;
      close();
      send(text);
    };
    field.value = this.text;
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it is no call to stop a reply
        close();
      } else if (isSend(event)) {
        event.preventDefault();
        submit();
      }
    });
    editor.addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    editor.querySelector(".cancel").addEventListener("click", close);
    this.element.classList.add("edited");
    this.find(".text").after(editor);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** A text as it is: what people write. */
class PlainView {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
  }

  /** @param {string} text */
  show(text) {
    this.element.textContent = text;
  }
}

/** Whether a key sends what is typed, and is not part of typing it. @param {KeyboardEvent} event */
export function isSend(event) {
  const isComposing = event.isComposing || event.keyCode === 229; // Safari's Enter that ends a composition
  return event.key === "Enter" && !event.shiftKey && !isComposing;
}

/** @param {string} id  of a template with one element @returns {HTMLElement} */
export function copyOf(id) {
  const template = /** @type {HTMLTemplateElement} */ (document.getElementById(id));
  return /** @type {HTMLElement} */ (template.content.firstElementChild.cloneNode(true));
}

/** What there is to say about a reply. @param {Pick<Turn, "text" | "outcome">} turn @returns {string} */
export function noteOn({ text, outcome }) {
  if (!outcome) return "not complete";
  const { finish, tokens, tokensPerSecond, droppedTurns } = outcome;
  const count = `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
  const isCut = finish === "length";
  const oldest = droppedTurns === 1 ? "the oldest turn" : `the ${droppedTurns} oldest turns`;
  const parts = [
    !text && finish === "stop" && "the model said nothing",
    tokens && (isCut ? `cut off after ${count}` : count),
    tokensPerSecond && `${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`,
    finish === "stopped" && "stopped",
    finish === "failed" && "broken off",
    droppedTurns && `the context was full: ${oldest} gave way`,
  ];
  return parts.filter(Boolean).join(" · ");
}
