"""Conversations after a reload, in another tab, and with a damaged or full storage."""

import json
import re

from processes import wait_until

from .scripted import TIMEOUT, Gate
from .visit import Visit, expect


def test_a_reload_keeps_the_conversation_its_versions_its_settings_and_the_draft(visit, server):
    for text in ("A drink.", "A leaf."):
        server.will_say(text)
    visit.configure(system="Be brief.", temperature="0.5")
    visit.say("What is tea?")
    visit.button("Retry").click()
    visit.expect_texts("What is tea?", "A leaf.")
    visit.message.fill("And co")
    before = visit.stored()
    assert before
    visit.tab.reload()
    visit.expect_texts("What is tea?", "A leaf.")
    expect(visit.turns.last).to_contain_text("2 of 2")
    expect(visit.message).to_have_value("And co")
    server.will_say("Yes.")
    visit.say("And cold?")
    assert visit.asked[-1]["temperature"] == 0.5
    assert visit.asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_settings_survive_a_reload_before_anything_was_said(visit):
    visit.configure(system="Be brief.")
    visit.tab.reload()
    expect(visit.tab.get_by_text("Be brief.")).to_be_visible()
    assert visit.stored() == {}


def test_a_reload_amid_a_reply_keeps_what_was_said(visit, server):
    server.will_say("A drink", Gate())
    visit.start("What is tea?")
    visit.expect_texts("What is tea?", "A drink")
    visit.tab.reload()
    visit.expect_texts("What is tea?", "A drink")
    expect(visit.turns.last).to_contain_text(re.compile("broken off|not complete"))
    assert server.scripts.was_left.wait(TIMEOUT)
    expect(visit.send).to_be_visible()


def damaged_entries():
    turn = {"role": "user", "text": "What is tea?", "parent": -1}
    sound = {"id": "x", "revision": "", "changed": 1, "settings": {"system": ""}, "turns": [turn], "last": 0}
    changes = [
        {"turns": None},
        {"turns": [None]},
        {"turns": [turn | {"role": "system"}]},
        {"turns": [turn | {"text": 7}]},
        {"turns": [turn | {"parent": 0}]},  # of its own
        {"turns": [turn | {"outcome": {"finish": "stop"}}]},
        {"last": 1},
        {"last": None},
        {"settings": None},
        {"settings": {"system": "", "temperature": "hot"}},
        {"changed": "today"},
    ]
    return sound, ["", "null", "[]", "{", '"x"', *(json.dumps(sound | change) for change in changes)]


def test_a_damaged_entry_is_passed_over(visit, server):
    sound, damaged = damaged_entries()
    keep = "([name, entry]) => localStorage.setItem(`gpt2ft.conversation.${name}`, entry)"
    for number, entry in enumerate(damaged):
        visit.tab.evaluate(keep, [f"damaged{number}", entry])
    visit.tab.evaluate(keep, ["x", json.dumps(sound)])
    visit.tab.evaluate("sessionStorage.setItem('gpt2ft.current', 'damaged9')")
    visit.tab.reload()
    visit.expect_texts()
    visit.tab.get_by_role("button", name="History").click()
    expect(visit.tab.get_by_role("dialog").get_by_role("listitem")).to_have_count(1)
    visit.tab.get_by_role("button", name="What is tea?").first.click()
    visit.expect_texts("What is tea?")


def test_full_storage_is_said_and_the_conversation_goes_on(visit, server):
    server.will_say("A drink.")
    visit.say("What is tea?")
    visit.tab.evaluate(
        """() => {
          for (let size = 2 ** 23, number = 0; size > 0; size = Math.floor(size / 2))
            try { for (;;) localStorage.setItem(`filling${number++}`, "x".repeat(size)); } catch {}
        }"""
    )
    server.will_say("Yes.")
    visit.say("And cold?")
    visit.expect_texts("What is tea?", "A drink.", "And cold?", "Yes.")
    expect(visit.tab.get_by_text("This browser keeps no more")).to_be_visible()
    visit.tab.evaluate("localStorage.clear()")
    server.will_say("Yes.")
    visit.say("Sure?")
    expect(visit.tab.get_by_text("This browser keeps no more")).to_be_hidden()
    visit.tab.reload()
    expect(visit.turns).to_have_count(6)


def test_a_browser_that_keeps_nothing(profile, server):
    visit = Visit(profile.new_page())
    visit.tab.add_init_script(
        """for (const area of ["localStorage", "sessionStorage"]) {
          Object.defineProperty(window, area, { get() { throw new DOMException("forbidden", "SecurityError"); } });
        }"""
    )
    visit.begin(server.url)
    server.will_say("A drink.")
    visit.say("What is tea?")
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.tab.get_by_text("This browser keeps no more")).to_be_visible()
    visit.end()
    visit.tab.close()


def test_tabs_with_conversations_of_their_own_leave_each_other_alone(new_visit, server):
    one, other = new_visit(), new_visit()
    for visit, text in ((one, "What is tea?"), (other, "What is mate?"), (one, "And cold?")):
        server.will_say("Well.")
        visit.say(text)
    for visit in (one, other):
        visit.tab.reload()
    one.expect_texts("What is tea?", "Well.", "And cold?", "Well.")
    other.expect_texts("What is mate?", "Well.")


def open_the_only_one(visit):
    visit.tab.get_by_role("button", name="History").click()
    visit.tab.get_by_role("dialog").get_by_role("listitem").get_by_role("button").first.click()


def until_they_agree(*visits):
    """What a tab stores, others learn a moment later."""
    wait_until(lambda: all(visit.stored() == visits[0].stored() for visit in visits))


def test_tabs_with_the_same_conversation_lose_no_turn(new_visit, server):
    one, other = new_visit(), new_visit()
    server.will_say("A drink.")
    one.say("What is tea?")
    until_they_agree(one, other)
    open_the_only_one(other)
    other.expect_texts("What is tea?", "A drink.")
    server.will_say("Yes.")
    one.say("And cold?")
    other.expect_texts("What is tea?", "A drink.", "And cold?", "Yes.")

    gates = Gate(), Gate()  # then both go on at the same time
    for visit, gate, text in zip((one, other), gates, ("Here", "There"), strict=True):
        server.will_say(text, gate, ".")
        visit.start(f"{text}?")
        expect(visit.turns.locator(".text").last).to_have_text(text)
    until_they_agree(one, other)
    for gate in gates:
        gate.open()
    for visit, text in ((one, "Here"), (other, "There")):
        expect(visit.turns.locator(".text").last).to_have_text(f"{text}.")
        expect(visit.send).to_be_visible()
        before = visit.texts()
        assert before[:4] == ["What is tea?", "A drink.", "And cold?", "Yes."]
        assert before[-2:] == [f"{text}?", f"{text}."]
        visit.tab.reload()
        visit.expect_texts(*before)
    assert len([name for name in one.stored() if name.startswith("gpt2ft.conversation.")]) == 2
