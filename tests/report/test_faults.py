"""Each fault of a reply, on replies made by hand."""

import pytest

from gpt2ft.report.faults import FAULTS, Rules, faults
from gpt2ft.report.replies import Exchange

ASKED = "Tell me what to drink when it rains."
GOOD = "Put the kettle on and have a cup of tea."


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (GOOD, []),
        ("I like tea. " * 5, ["repeats itself"]),
        ("Tea.\nUser: And cold?", ["writes the user's turn"]),
        ("Tell me what to drink when it rains. Tea.", ["copies the prompt"]),
        ("Have some soup.", ["leaves the topic"]),
        ("Tea.", ["too short"]),
        (" ".join(f"tea{i}" for i in range(30)) + " tea", ["too long"]),
        ("Soup! " * 3, ["repeats itself", "leaves the topic"]),
    ],
)
def test_what_is_at_fault(reply, found):
    exchange = Exchange(ASKED, reply, stopped=True, topic=("tea",))
    assert faults(exchange, Rules(min_words=2, max_words=20)) == found


def test_a_reply_that_does_not_stop():
    assert faults(Exchange(ASKED, GOOD, stopped=False), Rules()) == ["does not stop"]


def test_instructions_of_the_prompt_and_checks():
    assert faults(Exchange("Answer in one sentence.", "Tea. And milk.", True), Rules()) == ["disobeys the prompt"]
    assert faults(Exchange("Answer in one sentence.", "Tea and milk.", True), Rules()) == []
    checks = Rules(checks=("in one sentence", 'use the word "milk"'))
    assert faults(Exchange(ASKED, "Tea and milk.", True), checks) == []
    assert faults(Exchange(ASKED, "Tea and sugar.", True), checks) == ["fails a check"]
    assert faults(Exchange(ASKED, "Tea. And milk.", True), checks) == ["fails a check"]


def test_a_word_that_only_holds_the_topic_is_off_it():
    assert faults(Exchange(ASKED, "Take a steak.", True, topic=("tea",)), Rules()) == ["leaves the topic"]


def test_every_fault_is_found_above():
    assert len(FAULTS) == 9
