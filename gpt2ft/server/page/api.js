// The server, which speaks OpenAI's API.

// 401: with a key; 404: the server may have another model by now; 408, 425, 429: later; 410: for another pair of replies.
const CHANCES = [401, 404, 408, 410, 425, 429];
const LATER = [0, 408, 425, 429]; // and whatever is the server's own trouble

/** What the server, or the way to it, had to say against a request. */
export class ServerError extends Error {
  /** @param {string} message @param {number} [status]  of the HTTP response, 0 if there was none */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }

  /** Whether the same request would be refused again: it asks for what cannot be. */
  get isFinal() {
    return this.status >= 400 && this.status < 500 && !CHANCES.includes(this.status);
  }

  /** Whether the very same request may succeed later, without anything being changed. */
  get isPassing() {
    return this.status >= 500 || LATER.includes(this.status);
  }

  get needsKey() {
    return this.status === 401;
  }
}

/**
 * A piece of a reply: text, or at its end how it ended.
 * @typedef {object} Piece
 * @property {string} text
 * @property {"stop" | "length" | null} finish
 * @property {number} [tokens]
 * @property {number} [tokensPerSecond]  as the server measured them; none of fewer than two tokens
 * @property {number} [droppedTurns]
 */

/**
 * The model that the server has.
 * @typedef {object} Model
 * @property {string} name
 * @property {Record<string, number>} defaults  what holds where a request says nothing
 * @property {Record<string, number>} limits  the most that it may ask for
 * @property {number} [votes]  how many there are, if it stands for two that are compared
 */

/**
 * Two replies, of which nobody here knows whose they are.
 * @typedef {object} Pair
 * @property {string} id
 * @property {Piece} left
 * @property {Piece} right
 * @property {number} votes  how many there are
 */

/** @typedef {"left" | "right" | "both_good" | "both_bad"} Vote */

/**
 * @param {string | null} key
 * @param {AbortSignal} [signal]
 * @returns {Promise<Model>}
 */
export async function fetchModel(key, signal) {
  const response = await request("/v1/models", key, { signal });
  const answer = await response.json().catch(nothing);
  signal?.throwIfAborted();
  const { id: name, defaults = {}, limits = {}, votes } = answer?.data?.[0] ?? {};
  if (typeof name !== "string") throw new ServerError("The server does not name its model.");
  return { name, defaults, limits, votes };
}

/**
 * Asks for a reply and yields it as it comes.
 * @param {object} body  model, messages and sampling settings
 * @param {string | null} key
 * @param {AbortSignal} signal  ends the request, and with it the work on the server
 * @returns {AsyncGenerator<Piece>}
 * @throws {ServerError} if there is no reply, or not to its end
 */
export async function* streamReply(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", key, { ...json(asked), signal });
  try {
    for await (const data of serverSentEvents(response.body)) {
      if (data === "[DONE]") return;
      yield piece(JSON.parse(data));
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
  }
  throw new ServerError("The connection broke off before the reply was complete.");
}

/** @param {any} chunk @returns {Piece} */
function piece(chunk) {
  if (chunk.error) throw new ServerError(chunk.error.message);
  const choice = chunk.choices[0];
  return {
    text: choice?.delta?.content ?? "",
    finish: choice?.finish_reason ?? null,
    tokens: chunk.usage?.completion_tokens,
    tokensPerSecond: chunk.tokens_per_second ?? undefined,
    droppedTurns: chunk.dropped_turns,
  };
}

/**
 * Asks for a reply of each of two models.
 * @param {object} body  as for one
 * @param {string | null} key
 * @param {AbortSignal} signal
 * @returns {Promise<Pair>}
 */
export async function fetchPair(body, key, signal) {
  const response = await request("/v1/pairs", key, { ...json(body), signal });
  const { id, left, right, dropped_turns: droppedTurns, votes } = await answerOf(response);
  /** @param {any} reply @returns {Piece} */
  const whole = ({ content, finish_reason, tokens }) => ({ text: content, finish: finish_reason, tokens, droppedTurns });
  return { id, left: whole(left), right: whole(right), votes };
}

/**
 * Says which reply of a pair is better. Returns how many votes there are.
 * @param {string} pair
 * @param {Vote} vote
 * @param {string | null} key
 * @param {AbortSignal} signal
 * @returns {Promise<number>}
 */
export async function sendVote(pair, vote, key, signal) {
  const response = await request("/v1/votes", key, { ...json({ pair, vote }), signal });
  return (await answerOf(response)).votes;
}

/** @param {object} body @returns {RequestInit} */
const json = (body) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
});

/** @param {Response} response @returns {Promise<any>} */
async function answerOf(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke off before the answer was complete.");
  }
}

/** @param {string} path @param {string | null} key @param {RequestInit} options @returns {Promise<Response>} */
async function request(path, key, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch(unreachable);
  if (!response.ok) throw await refusal(response);
  return response;
}

/** @param {Error} error @returns {never} */
function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new ServerError("The server cannot be reached. Is it still running?");
}

/** @param {Response} response @returns {Promise<ServerError>} */
async function refusal(response) {
  const answer = await response.json().catch(nothing);
  const message = answer?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  const seconds = response.headers.get("Retry-After");
  const wait = /^\d+$/.test(seconds ?? "") ? `\nTry again in ${seconds} s.` : "";
  return new ServerError(message + wait, response.status);
}

/** @returns {any} */
const nothing = () => null;

/**
 * The data of server-sent events: "data: ..." lines up to an empty line; comments and other fields are left out.
 * @param {ReadableStream<BufferSource>} stream
 * @returns {AsyncGenerator<string>}
 */
async function* serverSentEvents(stream) {
  let data = [];
  for await (const line of lines(stream)) {
    if (line.startsWith("data:")) data.push(line.slice("data:".length).trimStart());
    if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

/** @param {ReadableStream<BufferSource>} stream @returns {AsyncGenerator<string>} */
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop() ?? "";
      yield* parts;
    }
  } finally {
    await reader.cancel().catch(nothing); // whoever reads may leave early
  }
}
