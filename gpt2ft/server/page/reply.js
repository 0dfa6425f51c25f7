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
    /** @type {Outcome} as it would be if nothing more came */
    this.outcome = { finish: "failed", tokens: 0, tokensPerSecond: 0, droppedTurns: numLeftOut };
  }

  get turn() {
    return this.conversation.turns[this.place];
  }

  /** @param {Piece} piece @returns {boolean} whether it began with this piece */
  take({ text, finish, tokens, tokensPerSecond, droppedTurns }) {
    const begins = this.place < 0 && (text !== "" || finish !== null);
    if (begins) this.place = this.conversation.add("assistant", "");
    if (text) this.turn.text += text;
    this.outcome.finish = finish ?? this.outcome.finish;
    this.outcome.tokens = tokens ?? this.outcome.tokens;
    this.outcome.tokensPerSecond = tokensPerSecond ?? this.outcome.tokensPerSecond;
    if (droppedTurns !== undefined) this.outcome.droppedTurns = droppedTurns + this.numLeftOut;
    return begins;
  }

  /** Keeps another whole reply as a version beside this one, which has not begun. @param {Piece} piece */
  addBeside(piece) {
    const { last } = this.conversation;
    const other = new Reply(this.conversation);
    other.take(piece);
    other.end();
    this.conversation.last = last;
  }

  /** @param {Outcome["finish"]} finish  if it did not end by itself */
  end(finish = this.outcome.finish) {
    if (this.place < 0) return;
    this.turn.outcome = { ...this.outcome, finish };
  }
}
