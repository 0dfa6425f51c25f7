// Conversations in the browser's storage, one entry each, so that tabs with different conversations never touch the
// same entry. Where nothing was said yet, it is kept with the tab alone.

import { Conversation, randomName } from "./conversation.js";

const CONVERSATION = "gpt2ft.conversation."; // and its id
const CURRENT = "gpt2ft.current"; // the id of the tab's conversation
const DRAFT = "gpt2ft.draft"; // what is typed and not sent
const KEY = "gpt2ft.key"; // for the server

/**
 * Keeps a conversation. If another tab saved the same one since this tab last read or saved it, this one goes on as a
 * copy with an id of its own, so that neither loses a turn.
 * @param {Conversation} conversation
 * @returns {boolean} whether there was room for it
 */
export function save(conversation) {
  const kept = Conversation.parse(read(localArea, CONVERSATION + conversation.id));
  if (kept && kept.revision !== conversation.revision) conversation.id = randomName();
  conversation.revision = randomName();
  conversation.changed = Date.now();
  const area = conversation.turns.length ? localArea : tabArea;
  const isKept = write(area, CONVERSATION + conversation.id, JSON.stringify(conversation));
  write(tabArea, CURRENT, conversation.id);
  return isKept;
}

/** @param {string} id @returns {Conversation | null} null if there is none, or none that can be read */
export function load(id) {
  const name = CONVERSATION + id;
  return Conversation.parse(read(localArea, name)) ?? Conversation.parse(read(tabArea, name));
}

/** The conversation of this tab, before it was reloaded. @returns {Conversation | null} */
export const loadCurrent = () => load(read(tabArea, CURRENT) ?? "");

/** All that can be read, the latest first. @returns {Conversation[]} */
export function list() {
  return names()
    .map((name) => Conversation.parse(read(localArea, name)))
    .filter((conversation) => conversation !== null)
    .sort((one, other) => other.changed - one.changed);
}

/** @param {string} id */
export const remove = (id) => write(localArea, CONVERSATION + id, null);

/** Tells when another tab saves or removes a conversation. @param {(id: string) => void} listener */
export function onOtherTab(listener) {
  addEventListener("storage", ({ key }) => {
    if (key?.startsWith(CONVERSATION)) listener(key.slice(CONVERSATION.length));
  });
}

export const loadDraft = () => read(tabArea, DRAFT) ?? "";
/** @param {string} text */
export const saveDraft = (text) => write(tabArea, DRAFT, text || null);

export const loadKey = () => read(tabArea, KEY);
/** @param {string} key */
export const saveKey = (key) => write(tabArea, KEY, key);

// --- an area of storage: it may be full, or forbidden altogether ---

const localArea = () => localStorage;
const tabArea = () => sessionStorage;

/** @returns {string[]} */
function names() {
  try {
    return Object.keys(localArea()).filter((name) => name.startsWith(CONVERSATION));
  } catch {
    return [];
  }
}

/** @param {() => Storage} area @param {string} name @returns {string | null} */
function read(area, name) {
  try {
    return area().getItem(name);
  } catch {
    return null;
  }
}

/** @param {() => Storage} area @param {string} name @param {string | null} value  null removes it */
function write(area, name, value) {
  try {
    if (value === null) area().removeItem(name);
    else area().setItem(name, value);
    return true;
  } catch {
    return false;
  }
}
