"""Replies, and other versions of them."""

import json
import re

import pytest

from .scripted import TIMEOUT, Gate
from .visit import expect


def test_a_reply_is_seen_while_it_is_being_said(visit, server):
    gate = Gate()
    server.will_say("A drink", gate, " made of leaves.")
    visit.start("What is tea?")
    visit.expect_texts("What is tea?", "A drink")
    expect(visit.stop).to_be_visible()
    gate.open()
    visit.expect_texts("What is tea?", "A drink made of leaves.")
    expect(visit.send).to_be_visible()
    expect(visit.turns.last).to_contain_text(re.compile(r"\d tokens · [\d.]+ tokens/s"))
    expect(visit.tab.get_by_role("heading", name="scripted")).to_be_visible()


def test_the_speed_is_the_one_that_the_server_measured(visit):
    """However its pieces came: through a proxy they may come all at once."""
    pieces = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("A", " hot", " drink")]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "tokens_per_second": 7.5}
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    for told, note in (
        (end, "3 tokens · 7.5 tokens/s"),
        (end | {"tokens_per_second": None}, "3 tokens"),
        (end | {"tokens_per_second": 31.4}, "3 tokens · 31 tokens/s"),
    ):
        chunks = (json.dumps(chunk) for chunk in (*pieces, told, usage))
        visit.answer_once(body="".join(f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]")))
        visit.say("What is tea?")
        expect(visit.turns.last.locator(".note")).to_have_text(note)


def test_a_reply_in_markdown_only_grows_at_its_end(visit, server):
    gate = Gate()
    server.will_say("# Tea\n\n- hot\n- *cold*\n\nAnd **no", gate, "w**:\n\n```\nkettle\n```")
    visit.start("What is tea?")
    text = visit.turns.last.locator(".text")
    expect(text.locator("li em")).to_have_text("cold")
    expect(text.locator("> p")).to_have_text("And **no")
    visit.tab.evaluate("document.querySelectorAll('.assistant .text > *').forEach((block) => (block.wasThere = true))")
    gate.open()
    expect(text.locator("> pre > code")).to_have_text("kettle")
    expect(text.locator("> p > strong")).to_have_text("now")
    kept = text.evaluate("(text) => [...text.children].map((block) => [block.localName, block.wasThere ?? false])")
    assert kept == [["h3", True], ["ul", True], ["p", False], ["pre", False]]
    expect(visit.send).to_be_visible()
    expect(visit.tab.locator("#status")).to_contain_text("And now:")  # what a screen reader says


def test_what_a_person_writes_is_shown_as_it_is(visit, server):
    server.will_say("*Well.*")
    visit.say("*What* is <tea>?\n- hot")
    assert visit.texts() == ["*What* is <tea>?\n- hot", "Well."]


def test_a_request_holds_the_conversation_and_only_what_was_set(visit, server):
    server.will_say("A drink.")
    visit.say("What is tea?")
    server.will_say("Cold too.")
    visit.say(" And\ncold? ")
    first, second = visit.asked
    assert first == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "What is tea?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    said = [("user", "What is tea?"), ("assistant", "A drink."), ("user", " And\ncold? ")]
    assert [(message["role"], message["content"]) for message in second["messages"]] == said


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_keeps_what_was_said_and_frees_the_server(visit, server, how):
    server.will_say("A drink", Gate(), " never made.")
    visit.start("What is tea?")
    visit.expect_texts("What is tea?", "A drink")
    if how == "button":
        visit.stop.click()
    else:
        visit.tab.keyboard.press("Escape")
    expect(visit.turns.last).to_contain_text("stopped")
    assert server.scripts.was_left.wait(TIMEOUT)
    server.will_say("Hot.")
    visit.say("And then?")
    visit.expect_texts("What is tea?", "A drink", "And then?", "Hot.")
    assert visit.asked[1]["messages"][1] == {"role": "assistant", "content": "A drink"}


def test_stopping_before_anything_was_said_leaves_the_message_to_be_asked_again(visit, server):
    server.will_say(Gate())
    visit.start("What is tea?")
    expect(visit.tab.get_by_text("Waiting for the reply").first).to_be_visible()
    server.until_asked()
    visit.stop.click()
    expect(visit.trouble).to_contain_text("There is no reply yet.")
    assert server.scripts.was_left.wait(TIMEOUT)
    server.will_say("A drink.")
    visit.trouble.get_by_role("button", name="Try again").click()
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.trouble).to_be_hidden()


def test_a_reply_that_is_cut_off_says_so(visit, server):
    server.will_say("So long", finish="length")
    visit.say("A long one.")
    expect(visit.turns.last).to_contain_text(re.compile(r"cut off after \d tokens"))


def test_a_reply_that_does_not_know_the_beginning_says_so(visit, server):
    for text in ("many words " * 200, "many words " * 200, "Well."):
        server.will_say(text)
        visit.say("And?")
    visit.expect_texts("And?", "many words " * 200, "And?", "many words " * 200, "And?", "Well.")
    expect(visit.turns.nth(1)).not_to_contain_text("gave way")
    expect(visit.turns.last).to_contain_text("the context was full: the 2 oldest turns gave way")


def test_what_is_typed_amid_a_reply_waits(visit, server):
    gate = Gate()
    server.will_say("A drink", gate, ".")
    visit.message.fill("What is tea?")
    visit.send.dblclick()
    visit.expect_texts("What is tea?", "A drink")
    visit.message.fill("And cold?")
    visit.message.press("Enter")
    gate.open()
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.message).to_have_value("And cold?")
    assert len(visit.asked) == 1


def test_a_turn_can_be_copied(visit, server):
    visit.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.will_say("A **<b>drink</b>**.")
    visit.say("What is tea?")
    visit.button("Copy").click()
    expect(visit.tab.get_by_text("Copied")).to_have_count(1)
    assert visit.tab.evaluate("navigator.clipboard.readText()") == "A **<b>drink</b>**."


def test_an_empty_reply_says_so(visit, server):
    server.will_say()
    visit.say("Say nothing.")
    expect(visit.turns.last).to_contain_text("the model said nothing")


def test_retrying_adds_a_version_and_the_conversation_goes_on_from_the_one_that_is_shown(visit, server):
    for text in ("A drink.", "A leaf."):
        server.will_say(text)
    visit.say("What is tea?")
    visit.button("Retry").click()
    visit.expect_texts("What is tea?", "A leaf.")
    expect(visit.turns.last).to_contain_text("2 of 2")
    assert visit.asked[0] == visit.asked[1]
    visit.button("Previous version").click()
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.button("Next version")).to_be_focused()
    server.will_say("Yes.")
    visit.say("Sure?")
    assert visit.asked[2]["messages"][1]["content"] == "A drink."
    visit.button("Next version", 1).click()
    visit.expect_texts("What is tea?", "A leaf.")
    visit.button("Previous version", 1).click()
    visit.expect_texts("What is tea?", "A drink.", "Sure?", "Yes.")


def test_editing_a_message_asks_again_from_there(visit, server):
    for text in ("A drink.", "Hot.", "A city."):
        server.will_say(text)
    visit.say("What is tea?")
    visit.say("And how?")
    visit.button("Edit", 0).click()
    editor = visit.tab.get_by_role("form", name="Edit your message").get_by_label("Message")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("What is tea?")
    editor.fill("What is\nRome?")
    editor.press("Enter")
    visit.expect_texts("What is\nRome?", "A city.")
    assert [message["content"] for message in visit.asked[2]["messages"]] == ["What is\nRome?"]
    visit.button("Previous version", 0).click()
    visit.expect_texts("What is tea?", "A drink.", "And how?", "Hot.")


def test_an_edit_can_be_left(visit, server):
    server.will_say("A drink.")
    visit.say("What is tea?")
    visit.button("Edit", 0).click()
    visit.tab.keyboard.type("!")
    visit.tab.keyboard.press("Escape")
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.button("Edit", 0)).to_be_focused()
    assert len(visit.asked) == 1


def test_a_retry_that_fails_leaves_the_reply_that_was_there(visit, server):
    server.will_say("A drink.")
    visit.say("What is tea?")
    server.will_say(RuntimeError())
    visit.button("Retry").click()
    expect(visit.trouble).to_contain_text("the computation has failed")
    visit.expect_texts("What is tea?", "A drink.")


def test_a_new_conversation_ends_the_reply_and_the_old_one_can_be_opened_again(visit, server):
    server.will_say("A drink", Gate())
    visit.start("What is tea?")
    visit.expect_texts("What is tea?", "A drink")
    visit.tab.get_by_role("button", name="New").click()
    visit.expect_texts()
    expect(visit.tab.get_by_role("heading", name="Say something.")).to_be_visible()
    server.will_say("No tea.")
    visit.say("What is mate?")
    assert len(visit.asked[1]["messages"]) == 1
    visit.tab.get_by_role("button", name="History").click()
    dialog = visit.tab.get_by_role("dialog", name="History")
    expect(dialog.get_by_role("listitem")).to_have_count(2)
    dialog.get_by_role("button", name="What is tea?").first.click()
    visit.expect_texts("What is tea?", "A drink")
    visit.tab.get_by_role("button", name="History").click()
    dialog.get_by_role("button", name="Delete What is tea?").click()
    expect(dialog.get_by_role("listitem")).to_have_count(2)
    dialog.get_by_role("button", name="Really delete").click()
    expect(dialog.get_by_role("listitem")).to_have_count(1)
    visit.tab.keyboard.press("Escape")
    visit.expect_texts()
