"""A person's visit to the page."""

import json

import pytest
from browser import TIMEOUT

missing = "the page is tested with playwright, which is missing: pip install -e '.[dev]'"
expect = pytest.importorskip("playwright.sync_api", reason=missing).expect
expect.set_options(timeout=TIMEOUT)

DESK, PHONE = {"width": 1000, "height": 800}, {"width": 360, "height": 640}


def label_of(name):
    """Return the label of a setting: its name, but for one."""
    return {"system": "System prompt"}.get(name, name.replace("_", " ").capitalize())


class Visit:
    """A tab with the page, what a person does there, and what went on behind it."""

    def __init__(self, tab):
        self.tab = tab
        tab.on("request", self._note)
        tab.on("console", lambda message: message.type == "error" and self._complain(message.text))
        tab.on("pageerror", lambda error: self._complain(f"{error}"))
        tab.on("dialog", lambda dialog: (self._complain(f"dialog {dialog.message}"), dialog.dismiss()))
        self.message = tab.get_by_label("Message", exact=True)
        self.send = tab.get_by_role("button", name="Send", exact=True)
        self.stop = tab.get_by_role("button", name="Stop", exact=True)
        self.trouble = tab.get_by_role("alert")
        self.turns = tab.locator("#turns > li")  # by role would find the items of lists in replies too

    def begin(self, url):
        """Opens the page, where nothing is stored yet."""
        self.url = url
        self.asked = []  # the bodies of the requests for replies
        self.requests = []  # all addresses
        self.troubles = []  # that no test wants
        self.resize(DESK)
        self.tab.emulate_media(color_scheme="light", reduced_motion="no-preference")
        self.tab.goto(url)
        return self

    def end(self):
        """Leaves nothing behind, and finds nothing that no test wants."""
        self.tab.evaluate("() => { try { localStorage.clear(), sessionStorage.clear() } catch {} }")
        self.tab.goto("about:blank")
        self.tab.unroute_all()
        assert self.troubles == []
        assert [url for url in self.requests if not url.startswith(self.url) and url != "about:blank"] == []

    def _note(self, request):
        self.requests.append(request.url)
        if request.method == "POST":
            self.asked.append(json.loads(request.post_data))

    def _complain(self, trouble):
        if "Failed to load resource" not in trouble:  # a refusal, which tests ask for
            self.troubles.append(trouble)

    def say(self, text):
        """Sends a message and waits for the end of the reply."""
        self.start(text)
        expect(self.send).to_be_visible()

    def start(self, text):
        """Sends a message, which the page takes once no reply is under way."""
        expect(self.send).to_be_visible()
        self.message.fill(text)
        self.message.press("Enter")

    def configure(self, **settings):
        """Sets what the dialog holds, as it is typed."""
        self.tab.get_by_role("button", name="Settings").click()
        for name, value in settings.items():
            self.tab.get_by_label(label_of(name), exact=True).fill(value)
        self.tab.get_by_role("button", name="Apply").click()

    def settings(self, *names):
        """Return what fields of the dialog show."""
        self.tab.get_by_role("button", name="Settings").click()
        shown = {name: self.tab.get_by_label(label_of(name), exact=True).input_value() for name in names}
        self.tab.get_by_role("button", name="Cancel").click()
        return shown

    def answer_once(self, path="chat/completions", **answer):
        """In place of the server."""
        self.tab.route(f"**/v1/{path}", lambda route: route.fulfill(**answer), times=1)

    def button(self, name, turn=-1):
        """A button of a turn; the last one if not said otherwise."""
        return self.turns.nth(turn).get_by_role("button", name=name)

    def texts(self):
        """Return the texts of the turns."""
        return self.turns.locator(".text").all_text_contents()

    def expect_texts(self, *texts):
        expect(self.turns.locator(".text")).to_have_text(list(texts))

    def until(self, condition):
        """Waits, frame by frame, for what an expression says. Playwright's own way needs `eval`, which is forbidden."""
        is_met = self.tab.evaluate(
            f"""async () => {{
              const end = performance.now() + {TIMEOUT};
              while (!({condition}) && performance.now() < end) await new Promise(requestAnimationFrame);
              return {condition};
            }}"""
        )
        assert is_met, condition

    def resize(self, size):
        self.tab.set_viewport_size(size)
        self.until(f"innerWidth === {size['width']}")

    def stored(self, area="localStorage"):
        return self.tab.evaluate(f"Object.fromEntries(Object.entries({area}))")
