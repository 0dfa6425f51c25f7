// What the buttons and keys of the page do.

import { fetchModel, fetchPair, sendVote, ServerError, streamReply } from "./api.js";
import { Ballot } from "./ballot.js";
import { Conversation } from "./conversation.js";
import { connectHistory, connectSettings } from "./dialogs.js";
import { Reply } from "./reply.js";
import { followEnd } from "./scrolling.js";
import * as storage from "./storage.js";
import { isSend, Transcript } from "./transcript.js";

const SAVE_EVERY = 1000; // milliseconds, while a reply is under way

/** @type {(id: string) => any} */
const element = (id) => document.getElementById(id);

class Chat {
  constructor() {
    this.conversation = storage.loadCurrent() ?? new Conversation();
    this.transcript = new Transcript(element("turns"), {
      edit: (place, text) => this.edit(place, text),
      retry: (place) => this.ask(this.conversation.turns[place].parent),
      choose: (place) => this.choose(place),
      copy: (text) => this.copy(text),
    });
    this.ballot = new Ballot(element("ballot"));
    this.end = followEnd(element("to-end"));
    /** @type {import("./api.js").Model} without a name as long as it is not known */
    this.model = { name: "", defaults: {}, limits: {} };
    /** @type {{ controller: AbortController, done: Promise<void> } | null} the reply under way */
    this.underway = null;
    this.saving = 0; // a timer
    this.numAsked = 0; // of requests to greet or to reply, of which the last one has the say on troubles
  }

  // --- what a person does ---

  /** @param {string} text */
  async send(text) {
    await this.stop();
    await this.ask(this.conversation.add("user", text.toWellFormed()));
  }

  /** Another version of a message, from where the conversation goes on. @param {number} place @param {string} text */
  async edit(place, text) {
    await this.stop();
    await this.ask(this.conversation.add("user", text.toWellFormed(), this.conversation.turns[place].parent));
  }

  /** Asks for a reply, or for another version of it. @param {number} parent  the place of the turn to reply to */
  async ask(parent) {
    await this.stop();
    this.numAsked += 1;
    const controller = new AbortController();
    this.underway = { controller, done: this.#receive(parent, controller.signal) };
    await this.underway.done;
  }

  /** Ends the reply under way; what was said stays. */
  async stop() {
    while (this.underway) {
      this.underway.controller.abort();
      await this.underway.done;
    }
  }

  /** Shows another version of a turn. @param {number} place */
  async choose(place) {
    await this.stop();
    this.conversation.choose(place);
    this.save();
    this.show();
    const view = this.transcript.views.find((view) => view.place === place);
    view.find(".versions button:not(:disabled)").focus();
  }

  /** @param {Conversation} conversation */
  async open(conversation) {
    await this.stop();
    this.conversation = conversation;
    this.transcript.clear();
    this.save();
    this.show();
    this.end.toEnd();
    focusMessage();
  }

  /** @param {import("./conversation.js").Settings} settings */
  configure(settings) {
    this.conversation.settings = settings;
    this.conversation.turns.forEach((turn) => delete turn.refusal); // with others it may be no more
    this.save();
    this.show();
  }

  /** @param {string} text */
  async copy(text) {
    await navigator.clipboard.writeText(text).then(
      () => announce("Copied"),
      () => announce("The browser did not allow copying"),
    );
  }

  // --- a reply ---

  /**
   * Receives a reply and shows how it ends, whatever that may be.
   * @param {number} parent
   * @param {AbortSignal} signal
   */
  async #receive(parent, signal) {
    const { conversation } = this;
    const before = conversation.last;
    conversation.last = parent;
    delete conversation.turns[parent].refusal;
    const reply = new Reply(conversation);
    this.#begin();
    let problem = null;
    try {
      for await (const piece of this.#pieces(reply, signal)) this.#take(reply, piece);
      reply.end();
    } catch (error) {
      problem = error;
      reply.end(error.name === "AbortError" ? "stopped" : "failed");
    }
    if (reply.place < 0) conversation.last = before;
    if (problem instanceof ServerError) {
      this.model.name = ""; // it may come back with another one
      if (problem.isFinal) conversation.turns[parent].refusal = problem.message;
    }
    this.#finish(reply, problem, parent);
  }

  /** @param {Reply} reply @param {AbortSignal} signal */
  async *#pieces(reply, signal) {
    if (!this.model.name) await this.#fetchModel(signal);
    const body = { model: this.model.name, ...reply.request };
    if (this.model.votes === undefined) yield* streamReply(body, storage.loadKey(), signal);
    else yield await this.#preferred(reply, body, signal);
  }

  /**
   * Lets the person vote on two replies. The conversation goes on from the better one, the other stays as a version of
   * it; of two that are alike the left one goes on, which was drawn.
   * @param {Reply} reply @param {object} body @param {AbortSignal} signal
   */
  async #preferred(reply, body, signal) {
    const pair = await fetchPair(body, storage.loadKey(), signal);
    this.#showVotes(pair.votes);
    element("waiting").hidden = true;
    const voted = this.ballot.vote(pair, async (vote) => {
      this.#showVotes(await sendVote(pair.id, vote, storage.loadKey(), signal));
    }, signal);
    announce(this.ballot.said);
    const vote = await voted.finally(focusMessage);
    const [better, other] = vote === "right" ? [pair.right, pair.left] : [pair.left, pair.right];
    reply.addBeside(other);
    return better;
  }

  #begin() {
    showSendAs("Stop");
    this.save();
    this.show();
    element("trouble").hidden = true;
    element("waiting").hidden = false;
    announce("Waiting for the reply");
    focusMessage();
    this.end.toEnd();
  }

  /** @param {Reply} reply @param {import("./api.js").Piece} piece */
  #take(reply, piece) {
    if (reply.take(piece)) {
      element("waiting").hidden = true;
      this.transcript.show(reply.conversation);
      this.transcript.last.element.classList.add("underway");
    }
    if (reply.place < 0) return;
    const { last } = this.transcript;
    last.grow(reply.turn, () => this.end.keepUp());
    this.#saveSoon();
  }

  /** @param {Reply} reply @param {Error | null} problem @param {number} parent */
  #finish(reply, problem, parent) {
    this.underway = null;
    showSendAs("Send");
    element("waiting").hidden = true;
    this.transcript.last?.element.classList.remove("underway");
    this.save();
    this.show();
    if (problem && problem.name !== "AbortError") this.#showTrouble(problem, () => this.ask(parent));
    else if (reply.place >= 0) this.#tellEnd();
    this.end.keepUp();
  }

  /** Tells a screen reader of a reply once: those of a pair it was told before the vote. */
  #tellEnd() {
    if (this.model.votes === undefined) return announce(`Reply: ${this.transcript.last.said}`);
    announce(`Your vote counts: ${element("votes").textContent}`);
  }

  // --- the screen ---

  /** Shows the conversation as it is. */
  show() {
    const { conversation } = this;
    this.transcript.show(conversation);
    element("empty").hidden = conversation.last >= 0;
    element("system").hidden = !conversation.settings.system.trim();
    element("system").querySelector("p").textContent = conversation.settings.system;
    element("trouble").hidden = true;
    if (conversation.awaitsReply && !this.underway) {
      const { refusal } = conversation.turns[conversation.last];
      const problem = refusal ? new ServerError(refusal, 400) : new Error("There is no reply yet.");
      this.#showTrouble(problem, () => this.ask(conversation.last));
    }
  }

  /** @param {Error} problem @param {() => void} tryAgain */
  #showTrouble(problem, tryAgain) {
    const needsKey = problem instanceof ServerError && problem.needsKey;
    element("trouble").querySelector("p").textContent = problem.message;
    element("trouble").hidden = false;
    element("key-form").hidden = !needsKey;
    element("ask-again").hidden = needsKey || (problem instanceof ServerError && problem.isFinal);
    element("ask-again").onclick = tryAgain;
    element("key-form").onsubmit = (/** @type {SubmitEvent} */ event) => {
      event.preventDefault();
      storage.saveKey(element("key").value);
      element("key").value = "";
      tryAgain();
    };
  }

  // --- the server and the storage ---

  /** @param {AbortSignal} [signal] */
  async #fetchModel(signal) {
    this.model = await fetchModel(storage.loadKey(), signal);
    element("model").textContent = document.title = this.model.name;
    this.#showVotes(this.model.votes);
  }

  /** @param {number} [votes]  none where nothing is compared */
  #showVotes(votes) {
    element("votes").hidden = votes === undefined;
    element("votes").textContent = votes === undefined ? "" : `${votes} ${votes === 1 ? "vote" : "votes"}`;
  }

  /** Makes the server's acquaintance when the page opens. */
  async greet() {
    const number = ++this.numAsked;
    let problem = null;
    try {
      await this.#fetchModel();
    } catch (error) {
      problem = error;
    }
    if (number !== this.numAsked) return;
    this.show();
    if (problem) this.#showTrouble(problem, () => this.greet());
  }

  save() {
    clearTimeout(this.saving);
    this.saving = 0;
    const isKept = storage.save(this.conversation);
    element("storage-trouble").hidden = isKept;
    element("storage-trouble").textContent = isKept ? "" : STORAGE_TROUBLE;
  }

  #saveSoon() {
    this.saving ||= setTimeout(() => this.save(), SAVE_EVERY);
  }

  /** Shows what another tab did to the conversation that is shown here. @param {string} id */
  takeOver(id) {
    if (id !== this.conversation.id || this.underway) return;
    this.conversation = storage.load(id) ?? this.conversation; // what is removed there stays here
    this.show();
  }
}

const STORAGE_TROUBLE =
  "This browser keeps no more: a reload loses what is said now. Deleting conversations in the history makes room.";

/** One button both sends and stops, so that the focus on it is never lost. @param {"Send" | "Stop"} name */
function showSendAs(name) {
  element("send").textContent = name;
  element("send").classList.toggle("stops", name === "Stop");
}

/** Tells a screen reader, once and politely. @param {string} text */
function announce(text) {
  element("status").textContent = text;
}

/** On a screen without a keyboard the focus would call up one that covers half of the page. */
function focusMessage() {
  if (matchMedia("(hover: hover)").matches) element("message").focus({ preventScroll: true });
}

/** @param {Chat} chat */
function connectComposer(chat) {
  const message = element("message");
  const send = () => {
    const text = message.value;
    if (!text.trim()) return;
    message.value = "";
    storage.saveDraft("");
    chat.send(text);
  };
  message.value = storage.loadDraft();
  message.addEventListener("input", () => storage.saveDraft(message.value));
  message.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (!isSend(event)) return;
    event.preventDefault();
    if (!chat.underway) send();
  });
  element("composer").addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    if (chat.underway) chat.stop();
    else send();
  });
  element("send").addEventListener("click", (/** @type {MouseEvent} */ event) => {
    if (event.detail > 1) event.preventDefault(); // a double click does not send and stop
  });
}

/** @param {Chat} chat */
function connectPage(chat) {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
  });
  element("new").addEventListener("click", () => chat.open(new Conversation(chat.conversation.settings)));
  connectSettings(
    () => chat.conversation.settings,
    () => chat.model,
    (settings) => chat.configure(settings),
  );
  connectHistory(
    storage.list,
    () => chat.conversation.id,
    (id) => chat.open(storage.load(id) ?? new Conversation()),
    async (id) => {
      if (id === chat.conversation.id) await chat.open(new Conversation(chat.conversation.settings));
      storage.remove(id);
    },
  );
  storage.onOtherTab((id) => chat.takeOver(id));
  addEventListener("pagehide", () => chat.underway && chat.save());
}

const chat = new Chat();
connectComposer(chat);
connectPage(chat);
chat.show();
chat.end.toEnd();
chat.greet();
focusMessage();
