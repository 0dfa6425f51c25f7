// What opens over the page: the settings, and the list of earlier conversations.

import { SAMPLING } from "./conversation.js";
import { copyOf } from "./transcript.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Settings} Settings */

/**
 * Lets the person change the settings. A value out of its range keeps the dialog open, as browsers do with forms;
 * whatever closes it but "Apply" changes nothing.
 * @param {() => Settings} current
 * @param {(settings: Settings) => void} apply
 */
export function connectSettings(current, apply) {
  const dialog = dialogWithId("settings");
  const form = dialog.querySelector("form");
  /** @param {string} name */
  const field = (name) => /** @type {HTMLInputElement} */ (form.elements.namedItem(name));

  document.getElementById("open-settings").addEventListener("click", () => {
    const settings = current();
    field("system").value = settings.system;
    SAMPLING.forEach((name) => (field(name).value = String(settings[name] ?? "")));
    dialog.returnValue = "";
    dialog.showModal();
  });
  form.querySelector(".cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "apply") return;
    const given = SAMPLING.filter((name) => field(name).value !== "");
    const sampling = Object.fromEntries(given.map((name) => [name, field(name).valueAsNumber]));
    apply({ system: field("system").value, ...sampling });
  });
}

/**
 * Lists the conversations that this browser keeps.
 * @param {() => Conversation[]} list
 * @param {() => string} currentId
 * @param {(id: string) => void} open
 * @param {(id: string) => Promise<void>} remove
 */
export function connectEarlier(list, currentId, open, remove) {
  const dialog = dialogWithId("earlier");
  const entries = dialog.querySelector("ul");

  const show = () => {
    const conversations = list();
    document.getElementById("none-earlier").hidden = conversations.length > 0;
    entries.replaceChildren(...conversations.map(entry));
  };

  /** @param {Conversation} conversation */
  const entry = ({ id, title, changed }) => {
    const element = copyOf("earlier-template");
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

  document.getElementById("open-earlier").addEventListener("click", () => {
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
