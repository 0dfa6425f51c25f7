// A reply under way: it becomes a turn with its first piece of text, and has an outcome at its end.

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Outcome} Outcome */
/** @typedef {import("./api.js").Piece} Piece */

export class Reply {
  /** @param {Conversation} conversation  whose path ends with the turn to reply to */
  constructor(conversation) {
    const { messages, numLeftOut } = conversation.messages();
    this.conversation = conversation;
    this.request = { messages, ...conversation.sampling() };
    this.numLeftOut = numLeftOut;
    this.place = -1; // of its turn; -1 while there is none
    this.numPieces = 0;
    this.firstCame = 0; // milliseconds
    this.lastCame = 0;
    /** @type {Outcome} as it would be if nothing more came */
    this.outcome = { finish: "failed", tokens: 0, tokensPerSecond: 0, droppedTurns: numLeftOut };
  }

  get turn() {
    return this.conversation.turns[this.place];
  }

  /** @param {Piece} piece @returns {boolean} whether it began with this piece */
  take({ text, finish, tokens, droppedTurns }) {
    const begins = this.place < 0 && (text !== "" || finish !== null);
    if (begins) this.place = this.conversation.add("assistant", "");
    if (text) this.#count(text);
    this.outcome.finish = finish ?? this.outcome.finish;
    this.outcome.tokens = tokens ?? this.outcome.tokens;
    if (droppedTurns !== undefined) this.outcome.droppedTurns = droppedTurns + this.numLeftOut;
    return begins;
  }

  /** @param {string} text */
  #count(text) {
    this.turn.text += text;
    this.lastCame = performance.now();
    if (this.numPieces++ === 0) this.firstCame = this.lastCame;
    this.outcome.tokens = this.numPieces; // until the server says how many: a piece is a token or a few
  }

  /** Tokens after the first one by the time after it: how fast it was written, not how long it had to wait. */
  get tokensPerSecond() {
    const seconds = (this.lastCame - this.firstCame) / 1000;
    return seconds > 0 ? (this.outcome.tokens - 1) / seconds : 0;
  }

  /** @param {Outcome["finish"]} finish  if it did not end by itself */
  end(finish = this.outcome.finish) {
    if (this.place < 0) return;
    this.turn.outcome = { ...this.outcome, finish, tokensPerSecond: this.tokensPerSecond };
  }
}
