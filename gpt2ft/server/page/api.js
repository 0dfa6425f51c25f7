// The server, which speaks OpenAI's API.

// 401: with a key; 404: the server may have another model by now; 408, 425, 429: later.
const CHANCES = [401, 404, 408, 425, 429];

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
 */

/**
 * @param {string | null} key
 * @param {AbortSignal} [signal]
 * @returns {Promise<Model>}
 */
export async function fetchModel(key, signal) {
  const response = await request("/v1/models", key, { signal });
  const answer = await response.json().catch(nothing);
  const { id: name, defaults = {}, limits = {} } = answer?.data?.[0] ?? {};
  if (typeof name !== "string") throw new ServerError("The server does not name its model.");
  return { name, defaults, limits };
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
  const response = await request("/v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
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
