// What opens over the page: the settings, and the history.

import { SAMPLING } from "./conversation.js";
import { copyOf } from "./transcript.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Settings} Settings */

/**
 * Lets the person change the settings. Fields show what holds, which is the server's default unless it was changed. A
 * value out of its range keeps the dialog open, as browsers do with forms; whatever closes it but "Apply" changes nothing.
 * @param {() => Settings} current
 * @param {() => Pick<import("./api.js").Model, "defaults" | "limits">} server
 * @param {(settings: Settings) => void} apply
 */
export function connectSettings(current, server, apply) {
  const dialog = dialogWithId("settings");
  const form = dialog.querySelector("form");
  /** @param {string} name */
  const field = (name) => /** @type {HTMLInputElement} */ (form.elements.namedItem(name));

  document.getElementById("open-settings").addEventListener("click", () => {
    const settings = current();
    const { defaults, limits } = server();
    field("system").value = settings.system;
    for (const name of SAMPLING) {
      if (name in defaults) field(name).placeholder = String(defaults[name]); // seen where a field is emptied
      if (name in limits) field(name).max = String(limits[name]);
      field(name).value = String(settings[name] ?? defaults[name] ?? "");
    }
    dialog.returnValue = "";
    dialog.showModal();
  });
  form.querySelector(".cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "apply") return;
    const given = SAMPLING.filter((name) => !["", field(name).placeholder].includes(field(name).value));
    const sampling = Object.fromEntries(given.map((name) => [name, field(name).valueAsNumber]));
    apply({ system: field("system").value, ...sampling });
  });
}

/**
 * Lists the conversations that this browser keeps: the history.
 * @param {() => Conversation[]} list
 * @param {() => string} currentId
 * @param {(id: string) => void} open
 * @param {(id: string) => Promise<void>} remove
 */
export function connectHistory(list, currentId, open, remove) {
  const dialog = dialogWithId("history");
  const entries = dialog.querySelector("ul");

  const show = () => {
    const conversations = list();
    document.getElementById("no-history").hidden = conversations.length > 0;
    entries.replaceChildren(...conversations.map(entry));
  };

  /** @param {Conversation} conversation */
  const entry = ({ id, title, changed }) => {
    const element = copyOf("history-template");
    const button = element.querySelector(".open");
    const time = element.querySelector("time");
    const deletion = /** @type {HTMLButtonElement} */ (element.querySelector(".delete"));
    element.querySelector(".title").textContent = title;
    time.dateTime = new Date(changed).toISOString();
    time.textContent = new Date(changed).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    button.ariaCurrent = id === currentId() ? "true" : null;
    button.addEventListener("click", () => {
      dialog.close();
      open(id);
    });
    deletion.ariaLabel = `Delete ${title}`;
    confirmed(deletion, async () => {
      await remove(id);
      show();
      dialog.querySelector("button").focus();
    });
    return element;
  };

  document.getElementById("open-history").addEventListener("click", () => {
    show();
    dialog.showModal();
  });
}

/**
 * Makes a button ask once before it does what cannot be undone.
 * @param {HTMLButtonElement} button
 * @param {() => void} act
 */
function confirmed(button, act) {
  const { textContent, ariaLabel } = button;
  button.addEventListener("click", () => {
    if (button.classList.contains("sure")) return act();
    button.classList.add("sure");
    button.textContent = button.ariaLabel = "Really delete";
  });
  button.addEventListener("blur", () => {
    button.classList.remove("sure");
    Object.assign(button, { textContent, ariaLabel });
  });
}

/** @param {string} id @returns {HTMLDialogElement} */
const dialogWithId = (id) => /** @type {HTMLDialogElement} */ (document.getElementById(id));
