"""Troubles on the way to a reply, and how to go on."""

import json

import pytest

from .scripted import Gate
from .visit import expect


def test_a_refusal_is_shown_and_can_be_tried_again(visit, new_visit, server):
    server.restart(slots=1, queue=0)
    other, gate = new_visit(), Gate()
    server.will_say("Long", gate, ".")
    other.start("A long one.")
    other.expect_texts("A long one.", "Long")
    visit.say("What is tea?")
    expect(visit.trouble).to_contain_text("1 request in work or waiting: try again later Try again in 5 s.")
    gate.open()
    other.expect_texts("A long one.", "Long.")
    expect(other.send).to_be_visible()
    server.will_say("A drink.")
    visit.trouble.get_by_role("button", name="Try again").click()
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.trouble).to_be_hidden()


def test_a_reply_that_fails_amid_keeps_what_was_said(visit, server):
    server.will_say("A dri", RuntimeError())
    visit.say("What is tea?")
    expect(visit.trouble).to_contain_text("the computation has failed: see the server's log")
    visit.expect_texts("What is tea?", "A dri")
    expect(visit.turns.last).to_contain_text("broken off")
    server.will_say("A drink.")
    visit.trouble.get_by_role("button", name="Try again").click()
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.turns.last).to_contain_text("2 of 2")


def test_what_cannot_succeed_is_not_to_be_tried_again(visit, server):
    again = visit.trouble.get_by_role("button", name="Try again")
    visit.say("long " * 1000)
    expect(visit.trouble).to_contain_text("shorten it")
    expect(again).to_be_hidden()
    visit.tab.reload()
    expect(visit.trouble).to_contain_text("shorten it")
    expect(again).to_be_hidden()
    visit.button("Edit").click()
    server.will_say("A drink.")
    visit.tab.keyboard.press("Control+A")
    visit.tab.keyboard.type("What is tea?")
    visit.tab.keyboard.press("Enter")
    visit.expect_texts("What is tea?", "A drink.")


@pytest.mark.parametrize(
    ("status", "can_succeed"),
    [
        *((status, False) for status in (400, 403, 413, 415, 422)),
        *((status, True) for status in (404, 408, 429, 500, 503)),
    ],
)
def test_only_what_may_succeed_is_offered_again(visit, status, can_succeed):
    again = visit.trouble.get_by_role("button", name="Try again")
    visit.answer_once(status=status, body=json.dumps({"error": {"message": "Not so."}}))
    visit.say("What is tea?")
    expect(visit.trouble).to_contain_text("Not so.")
    expect(again).to_be_visible(visible=can_succeed)
    visit.configure(max_tokens="7")  # with other settings it may
    expect(again).to_be_visible()


def test_a_greeting_that_is_answered_late_hides_no_trouble(visit):
    held = []
    visit.tab.route("**/v1/models", lambda route: route.fallback() if held else held.append(route))
    visit.tab.reload()
    visit.answer_once(status=500, body=json.dumps({"error": {"message": "Not so."}}))
    visit.say("What is tea?")
    expect(visit.trouble).to_contain_text("Not so.")
    held[0].fulfill(body=json.dumps({"data": [{"id": "late"}]}))
    expect(visit.tab.get_by_role("heading", name="late")).to_be_visible()
    assert "Not so." in visit.trouble.text_content()


PIECE = 'data: {"choices": [{"index": 0, "delta": {"content": "A dri"}, "finish_reason": null}]}\n\n'


def test_what_no_server_should_answer(visit, server):
    broken_off = "The connection broke off before the reply was complete."
    for answer, said, message in (
        ({"body": PIECE}, ["A dri"], broken_off),
        ({"body": PIECE + "data: {\n\n"}, ["A dri"], broken_off),
        ({"body": ""}, [], broken_off),
        ({"status": 502, "body": "<h1>Bad Gateway</h1>"}, [], "The server answered 502 Bad Gateway."),
        ({"status": 500, "body": "null"}, [], "The server answered 500 Internal Server Error."),
    ):
        visit.answer_once(**answer)
        visit.say("What is tea?")
        expect(visit.trouble).to_contain_text(message)
        visit.expect_texts("What is tea?", *said)
        visit.tab.get_by_role("button", name="New").click()
    server.will_say("A drink.")
    visit.say("What is tea?")
    visit.expect_texts("What is tea?", "A drink.")


def test_a_server_that_does_not_name_its_model(visit):
    for answer in ("<h1>Hello</h1>", "{}", '{"data": []}', '{"data": [{"id": 7}]}'):
        visit.answer_once("models", body=answer)
        visit.tab.reload()
        expect(visit.trouble).to_contain_text("The server does not name its model.")
    visit.trouble.get_by_role("button", name="Try again").click()
    expect(visit.tab.get_by_role("heading", name="scripted")).to_be_visible()


def test_stopping_works_even_where_the_server_does_not_answer(visit):
    visit.tab.route("**/v1/**", lambda route: None)
    visit.tab.reload()
    visit.start("What is tea?")
    visit.stop.click()
    expect(visit.trouble).to_contain_text("There is no reply yet.")


def test_a_server_that_goes_and_comes_back_with_another_model(visit, server):
    server.will_say("A dri", Gate())
    visit.start("What is tea?")
    visit.expect_texts("What is tea?", "A dri")
    server.stop()
    expect(visit.trouble).to_contain_text("the server was stopped before the reply was complete")
    visit.trouble.get_by_role("button", name="Try again").click()
    expect(visit.trouble).to_contain_text("The server cannot be reached. Is it still running?")
    server.start(name="another")
    server.will_say("A drink.")
    visit.trouble.get_by_role("button", name="Try again").click()
    visit.expect_texts("What is tea?", "A drink.")
    expect(visit.tab.get_by_role("heading", name="another")).to_be_visible()


def test_a_key_is_asked_for_where_the_server_wants_one_and_kept_with_the_tab(server, new_visit):
    key = "a-key-of-this-test"
    server.restart(key=key)
    visit = new_visit()
    field = visit.tab.get_by_label("API key")
    expect(field).to_be_visible()
    assert field.get_attribute("type") == "password"
    for guess in ("a-wrong-one", key):
        field.fill(guess)
        field.press("Enter")
        expect(field).to_have_value("")
    expect(visit.tab.get_by_role("heading", name="scripted")).to_be_visible()
    expect(field).to_be_hidden()
    server.will_say("A drink.")
    visit.say("What is tea?")
    visit.expect_texts("What is tea?", "A drink.")
    assert key not in json.dumps(visit.stored("localStorage"))
    assert key in json.dumps(visit.stored("sessionStorage"))
    server.restart(key="another-key-of-this-test")
    visit.say("And now?")
    expect(visit.trouble).to_contain_text("the key must be given")
    server.will_say("Now too.")
    field.fill("another-key-of-this-test")
    visit.tab.get_by_role("button", name="Use this key").click()
    expect(visit.turns.locator(".text").last).to_have_text("Now too.")
