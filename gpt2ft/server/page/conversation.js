// A conversation in memory. To edit a message or to retry a reply adds another version of it beside the old one, so
// the turns are a tree, and what is shown and sent is the path from its root to one of its turns:
//
//     user: What is tea? ─┬─ assistant: A drink.
//                         └─ assistant: A leaf.     ── user: And cold?  ── assistant: Still a leaf.
//     user: What is mate? ── assistant: No tea.
//
// Nothing here knows of the screen, the storage or the server.

/**
 * How a reply ended.
 * @typedef {object} Outcome
 * @property {"stop" | "length" | "stopped" | "failed"} finish  by itself, at a limit, by the person, by an error
 * @property {number} tokens  0 if the reply did not come to its end, where the server says how many
 * @property {number} tokensPerSecond  as the server measured them, likewise
 * @property {number} droppedTurns  how many of the oldest turns the model did not see
 */

/**
 * @typedef {object} Turn
 * @property {"user" | "assistant"} role
 * @property {string} text
 * @property {number} parent  the place of the turn before it in the list of turns, -1 if there is none
 * @property {Outcome} [outcome]  of a reply that has ended
 * @property {string} [refusal]  of a message that the server cannot reply to, as it and the settings are
 */

/**
 * What is asked of the server with each message. What is missing is up to the server.
 * @typedef {object} Settings
 * @property {string} system  no system turn if empty
 * @property {number} [temperature]
 * @property {number} [top_p]
 * @property {number} [top_k]
 * @property {number} [min_p]
 * @property {number} [repetition_penalty]
 * @property {number} [max_tokens]
 * @property {number} [seed]
 */

const FINISHES = ["stop", "length", "stopped", "failed"];
const MOST_TURNS = 200; // of a request
const MOST_BYTES = 200_000;

export const SAMPLING = /** @type {const} */ (
  ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"]
);

export class Conversation {
  /** @param {Settings} [settings] */
  constructor(settings = { system: "" }) {
    this.id = randomName();
    this.revision = ""; // a new name with each saving: tells whether another tab has saved since
    this.changed = Date.now();
    this.settings = { ...settings };
    /** @type {Turn[]} a parent always stands before its children */
    this.turns = [];
    this.last = -1; // where the path ends
  }

  /** The places of the turns from the first to the last one. @returns {number[]} */
  path() {
    const places = [];
    for (let place = this.last; place >= 0; place = this.turns[place].parent) places.push(place);
    return places.reverse();
  }

  /**
   * Adds a turn after the one at `parent`, where the path then ends.
   * @param {Turn["role"]} role
   * @param {string} text
   * @param {number} [parent]
   * @returns {number} its place
   */
  add(role, text, parent = this.last) {
    this.last = this.turns.push({ role, text, parent }) - 1;
    return this.last;
  }

  /** The places of the turns that follow each place, oldest first: more than one are versions of each other. */
  branches() {
    /** @type {Map<number, number[]>} */
    const branches = new Map();
    this.turns.forEach(({ parent }, place) => {
      if (!branches.has(parent)) branches.set(parent, []);
      branches.get(parent).push(place);
    });
    return branches;
  }

  /** Leads the path through a turn, and on along the newest versions. @param {number} place */
  choose(place) {
    const branches = this.branches();
    for (let next = place; next !== undefined; next = branches.get(next)?.at(-1)) this.last = next;
  }

  /** Whether the path ends with a message that has no reply yet. */
  get awaitsReply() {
    return this.turns[this.last]?.role === "user";
  }

  /** What to list it as: the beginning of what was said first. */
  get title() {
    return this.turns[0]?.text.trim().slice(0, 120) ?? "";
  }

  /**
   * The path as the server wants it, without the oldest turns where that is more than it reads. It reads more than
   * any context of the models holds.
   */
  messages() {
    const said = this.path().map((place) => ({ role: this.turns[place].role, content: this.turns[place].text }));
    const { system } = this.settings;
    const recent = said.slice(numTooOld(said));
    return {
      messages: system.trim() ? [{ role: "system", content: system }, ...recent] : recent,
      numLeftOut: said.length - recent.length,
    };
  }

  /**
   * The sampling settings as the server wants them. Another version of a reply is another draw: with the same seed it
   * would be the same reply again.
   * @returns {Record<string, number>}
   */
  sampling() {
    const given = SAMPLING.filter((name) => this.settings[name] !== undefined);
    const values = Object.fromEntries(given.map((name) => [name, this.settings[name]]));
    if ("seed" in values) values.seed += this.turns.filter(({ parent }) => parent === this.last).length;
    return values;
  }

  /**
   * Reads what JSON.stringify made of a conversation.
   * @param {string | null} json
   * @returns {Conversation | null} null if it is none
   */
  static parse(json) {
    try {
      const { id, revision, changed, settings, turns, last } = JSON.parse(json ?? "");
      const sound =
        [id, revision, settings.system].every((value) => typeof value === "string") &&
        SAMPLING.every((name) => settings[name] === undefined || Number.isFinite(settings[name])) &&
        Number.isFinite(changed) && Array.isArray(turns) && turns.every(isTurn) && isPlace(last, turns.length);
      return sound ? Object.assign(new Conversation(settings), { id, revision, changed, turns, last }) : null;
    } catch {
      return null;
    }
  }
}

/**
 * How many turns to leave out at the beginning, so that what is left opens with a user's.
 * @param {{role: string, content: string}[]} said
 */
function numTooOld(said) {
  let first = said.length - 1;
  let bytes = size(said[first]);
  while (first > 0 && said.length - first < MOST_TURNS && bytes + size(said[first - 1]) <= MOST_BYTES) {
    first -= 1;
    bytes += size(said[first]);
  }
  return said[first].role === "user" ? first : first + 1;
}

/** In bytes of a request. @param {{role: string, content: string}} message */
const size = (message) => new TextEncoder().encode(JSON.stringify(message)).length;

/** @param {Turn} turn @param {number} place */
function isTurn({ role, text, parent, outcome, refusal }, place) {
  const numbers = outcome && [outcome.tokens, outcome.tokensPerSecond, outcome.droppedTurns];
  return (
    (role === "user" || role === "assistant") && typeof text === "string" && isPlace(parent, place) &&
    (refusal === undefined || typeof refusal === "string") &&
    (outcome === undefined || (FINISHES.includes(outcome.finish) && numbers.every(Number.isFinite)))
  );
}

/** @param {number} place @param {number} end */
const isPlace = (place, end) => Number.isInteger(place) && place >= -1 && place < end;

/** A name that nothing else has. crypto.randomUUID would not do: plain HTTP to another machine lacks it. */
export function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
