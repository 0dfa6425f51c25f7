// Staying at the end of the page while it grows, for as long as the person does.

const NEAR = 48; // pixels from the end that count as at the end

/**
 * @param {HTMLElement} button  leads to the end, and is there only where the end is out of sight
 * @returns {{ keepUp: () => void, toEnd: () => void }}  keepUp is called when the page has grown
 */
export function followEnd(button) {
  const page = document.documentElement;
  let follows = true;
  let lastTop = 0;

  const distance = () => page.scrollHeight - page.clientHeight - page.scrollTop;

  const toEnd = () => {
    follows = true;
    button.hidden = true;
    page.scrollTop = page.scrollHeight;
    lastTop = page.scrollTop; // from where a person may scroll up before the event of this comes
  };

  const look = () => {
    const isUpwards = page.scrollTop < lastTop;
    lastTop = page.scrollTop;
    if (distance() < (isUpwards ? 1 : NEAR)) follows = true;
    else if (isUpwards) follows = false;
    button.hidden = follows || distance() < NEAR;
  };

  const keepUp = () => {
    if (follows) toEnd();
    else button.hidden = false;
  };

  document.addEventListener("scroll", look, { passive: true });
  addEventListener("resize", keepUp);
  button.addEventListener("click", toEnd);
  return { keepUp, toEnd };
}
