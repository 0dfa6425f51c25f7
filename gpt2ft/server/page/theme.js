// Light or dark: as the system has it, unless the person says otherwise. This is no module, so that it runs before the
// first paint and nothing flashes.
"use strict";

{
  const KEY = "gpt2ft.theme";

  /** @returns {string} "light", "dark", or "" for the system's. */
  const chosenTheme = () => {
    try {
      const theme = localStorage.getItem(KEY);
      return theme === "light" || theme === "dark" ? theme : "";
    } catch {
      return ""; // this browser keeps nothing
    }
  };

  /** @param {string} theme */
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
  };

  /** @param {string} theme */
  const keep = (theme) => {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // it holds until the page is left
    }
  };

  show(chosenTheme());

  document.addEventListener("DOMContentLoaded", () => {
    const choice = /** @type {HTMLSelectElement} */ (document.getElementById("theme"));
    choice.value = chosenTheme();
    choice.addEventListener("change", () => {
      show(choice.value);
      keep(choice.value);
    });
    addEventListener("storage", (event) => {
      if (event.key === KEY || event.key === null) {
        choice.value = chosenTheme();
        show(choice.value);
      }
    });
  });
}
