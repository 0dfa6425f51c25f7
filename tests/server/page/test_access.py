"""The page for everyone: by keyboard, by ear, on a phone, and however long a conversation is."""

import json

import pytest

from .scripted import Gate
from .visit import PHONE, expect


def test_a_conversation_by_keyboard_alone(visit, server):
    keyboard = visit.tab.keyboard
    expect(visit.message).to_be_focused()
    server.will_say("A drink.")
    keyboard.type("What is")
    keyboard.press("Shift+Enter")
    keyboard.type("tea?")
    keyboard.press("Enter")
    visit.expect_texts("What is\ntea?", "A drink.")
    expect(visit.message).to_be_focused()
    expect(visit.message).to_have_value("")

    server.will_say("A leaf.")
    walk(visit, "Retry", key="Shift+Tab")
    keyboard.press("Enter")
    visit.expect_texts("What is\ntea?", "A leaf.")
    expect(visit.message).to_be_focused()

    walk(visit, "Settings", key="Shift+Tab")
    keyboard.press("Enter")
    expect(visit.tab.get_by_label("System prompt")).to_be_focused()
    keyboard.press("Escape")
    expect(visit.tab.get_by_role("button", name="Settings")).to_be_focused()

    server.will_say("A city.")
    walk(visit, "Edit")
    keyboard.press("Enter")
    keyboard.press("Control+A")
    keyboard.type("What is Rome?")
    keyboard.press("Enter")
    visit.expect_texts("What is Rome?", "A city.")


def walk(visit, name, key="Tab"):
    """To a button; each stop on the way can be seen to be one."""
    for _ in range(30):
        visit.tab.keyboard.press(key)
        focused = visit.tab.locator("*:focus")
        expect(focused).to_have_count(1)
        outline, shadow = focused.evaluate(
            """(element) => {
              const style = getComputedStyle(element.matches("#message") ? element.form : element);
              return [style.outlineStyle, style.boxShadow];
            }"""
        )
        assert outline == "solid" or shadow != "none"
        if focused.text_content() == name:
            return
    raise AssertionError(f"there is no way to {name}")


def test_keys_that_compose_a_character_do_not_send(visit):
    visit.message.fill("に")
    visit.message.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    visit.message.press("Shift+Enter")
    expect(visit.message).to_have_value("に\n")
    visit.expect_texts()


def test_a_screen_reader_is_told_of_a_reply_once(visit, server):
    visit.tab.evaluate(
        """() => {
          window.told = [];
          const status = document.querySelector("#status");
          new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    server.will_say("A", "drink", "made", "of", "leaves", ".")
    visit.say("What is tea?")
    assert visit.tab.evaluate("told") == ["Waiting for the reply", "Reply: Adrinkmadeofleaves."]
    live = visit.tab.locator("main").locator("[aria-live], [role=log], [role=status]")
    expect(live).to_have_count(0)


def test_nothing_that_axe_knows_to_be_a_barrier(visit, server):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing").Axe()

    def look():
        for scheme in ("light", "dark"):
            visit.tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            result = axe.run(visit.tab, options={}).response
            rules = [*result["violations"], *result["incomplete"]]
            issues = [(rule["id"], node) for rule in rules for node in rule["nodes"]]
            assert [(rule, node["html"]) for rule, node in issues if not is_only_half_in_sight(node)] == []
            assert {"color-contrast", "button-name"} <= {rule["id"] for rule in result["passes"]}

    look()
    visit.configure(system="Be brief.")
    markdown = "# Tea\n\n> A *leaf* of [tea](https://tea.invalid).\n\n1. `hot`\n\n```\ncold\n```\n\n|a|b|\n|-|-|\n|c|d|"
    for text in ("A drink.", markdown):
        server.will_say(text)
    visit.say("What is tea?")
    visit.button("Retry").click()
    expect(visit.turns.last.locator("table")).to_be_visible()
    visit.answer_once(status=401, body=json.dumps({"error": {"message": "A key, please."}}))
    visit.say("And now?")
    visit.button("Edit", 0).click()
    look()
    visit.tab.keyboard.press("Escape")
    for name in ("History", "Settings"):
        visit.tab.get_by_role("button", name=name).click()
        look()
        visit.tab.keyboard.press("Escape")


def is_only_half_in_sight(node):
    """It scrolls things about itself, and then cannot tell their colours."""
    reasons = [(check["data"] or {}).get("messageKey") or "" for check in node["any"]]
    return any(reason.startswith("elmPartially") for reason in reasons)


def test_a_phone_never_scrolls_sideways(visit, server):
    visit.resize(PHONE)
    server.restart(name="a-model-with-a-long-name" * 4)
    visit.tab.reload()
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    visit.configure(system="s" * 300)
    wide = "w" * 300
    server.will_say(f"{wide}\n\n```\n{wide}\n```\n\n|{wide}|b|c|d|\n|-|-|-|-|\n|a|b|c|{wide}|", finish="length")
    visit.say("W" * 90 + "\n" + "word " * 10)
    visit.answer_once(status=500, body=json.dumps({"error": {"message": "e" * 300}}))
    visit.button("Retry").click()
    expect(visit.trouble).to_be_visible()
    assert visit.tab.evaluate(overflow) == 0
    visit.answer_once(status=401, body=json.dumps({"error": {"message": "A key, please."}}))
    visit.trouble.get_by_role("button", name="Try again").click()
    expect(visit.tab.get_by_label("API key")).to_be_visible()
    visit.button("Edit", 0).click()
    assert visit.tab.evaluate(overflow) == 0
    for name in ("History", "Settings"):
        visit.tab.get_by_role("button", name=name).click()
        dialog = visit.tab.get_by_role("dialog")
        assert dialog.evaluate("dialog => dialog.scrollWidth - dialog.clientWidth") == 0
        assert visit.tab.evaluate(overflow) == 0
        visit.tab.keyboard.press("Escape")
    expect(visit.send).to_be_in_viewport()


def test_what_is_short_is_one_line_on_a_phone(visit):
    visit.resize(PHONE)
    visit.tab.route("**/v1/models", lambda route: route.fulfill(status=401, body="{}"))
    visit.tab.reload()
    for line in ("#keys", "#key-hint", "#new", "#open-history", "#open-settings"):
        expect(visit.tab.locator(line)).to_be_visible()
        lines, width, room = visit.tab.locator(line).evaluate(
            """(line) => {
              const text = document.createRange();
              text.selectNodeContents(line);
              const boxes = [...text.getClientRects()];
              const middles = boxes.map(({ top, bottom }) => Math.round((top + bottom) / 2));
              return [new Set(middles).size, text.getBoundingClientRect().width, line.clientWidth];
            }"""
        )
        assert lines == 1
        assert width <= room


def test_motion_only_where_it_is_welcome(visit, server):
    server.will_say(Gate())
    visit.start("What is tea?")
    server.until_asked()
    name = "getComputedStyle(document.querySelector('.pulse')).animationName"
    visit.tab.emulate_media(reduced_motion="no-preference")
    assert visit.tab.evaluate(name) == "pulse"
    visit.tab.emulate_media(reduced_motion="reduce")
    assert visit.tab.evaluate(name) == "none"
    visit.stop.click()


def test_the_end_stays_in_sight_until_the_person_looks_elsewhere(visit, server):
    first, second = Gate(), Gate()
    lines = "a line\n" * 60
    server.will_say(lines, first, lines + "amid", second, lines + "over.")
    visit.start("Count.")
    to_end = visit.tab.get_by_role("button", name="To the end")
    place = "[scrollY, document.documentElement.scrollHeight - innerHeight - scrollY]"
    first.open()
    expect(visit.turns.last).to_contain_text("amid")
    visit.until(f"{place}[1] < 2")
    expect(to_end).to_be_hidden()
    visit.tab.mouse.move(400, 300)
    visit.tab.mouse.wheel(0, -30)
    visit.until(f"{place}[1] > 20")
    expect(to_end).to_be_hidden()  # the end is near
    there, _ = visit.tab.evaluate(place)
    second.open()
    expect(visit.turns.last).to_contain_text("over.")
    expect(visit.send).to_be_visible()
    assert visit.tab.evaluate(place)[0] == there
    to_end.click()
    visit.until(f"{place}[1] < 2")
    expect(to_end).to_be_hidden()


def test_who_scrolls_up_while_the_page_grows_is_not_taken_back(visit):
    """Even if both come in one frame, where only the sum of the two is seen."""
    visit.tab.evaluate(
        """async () => {
          const grow = () => {
            const tall = document.createElement("li");
            tall.style.height = "3000px";
            document.querySelector("#turns").append(tall);
            dispatchEvent(new Event("resize"));
          };
          grow();
          document.documentElement.scrollTop -= 30;
          for (let frames = 0; frames < 3; frames += 1) await new Promise(requestAnimationFrame);
          grow();
        }"""
    )
    expect(visit.tab.get_by_role("button", name="To the end")).to_be_visible()


def test_a_token_costs_no_more_in_a_long_conversation(visit, server):
    """Changes on the screen do not depend on how much is there, and the request is bounded."""
    turns = [{"role": "user", "text": f"And {number}?", "parent": number - 1} for number in range(1001)]
    outcome = {"finish": "stop", "tokens": 3, "tokensPerSecond": 1, "droppedTurns": 0}
    for turn in turns[1::2]:
        turn |= {"role": "assistant", "outcome": outcome}
    kept = {"id": "x", "revision": "", "changed": 1, "settings": {"system": ""}, "turns": turns[:-1], "last": 999}
    visit.tab.evaluate("entry => localStorage.setItem('gpt2ft.conversation.x', entry)", json.dumps(kept))
    visit.tab.evaluate("sessionStorage.setItem('gpt2ft.current', 'x')")
    visit.tab.reload()
    turns = visit.tab.locator("#turns > li")  # by role would take seconds
    expect(turns).to_have_count(1000)
    visit.tab.evaluate(
        """() => {
          window.changed = [];
          window.old = new Set(document.querySelectorAll("#turns > li, #turns > li *"));
          const options = { subtree: true, childList: true, characterData: true, attributes: true };
          new MutationObserver((records) => changed.push(...records.map(({ target }) => target)))
            .observe(document.querySelector("#turns"), options);
        }"""
    )
    first, second = Gate(), Gate()
    server.will_say("one", first, *["token"] * 50, second, *["token"] * 50)
    visit.tab.locator("#message").fill("And on?")
    visit.tab.keyboard.press("Enter")
    expect(turns).to_have_count(1002)
    visit.tab.evaluate("changed.length = 0")
    first.open()
    expect(turns.last.locator(".text")).to_have_text("one" + "token" * 50)
    second.open()
    expect(visit.tab.locator("#send")).to_have_text("Send")
    expect(turns.last.locator(".text")).to_have_text("one" + "token" * 100)
    assert visit.tab.evaluate("changed.length") > 0
    assert visit.tab.evaluate("changed.filter((target) => old.has(target) || old.has(target.parentNode)).length") == 0
    (asked,) = visit.asked
    assert len(asked["messages"]) < 256
    assert asked["messages"][0]["role"] == "user"
    expect(turns.last).to_contain_text("oldest turns gave way")
