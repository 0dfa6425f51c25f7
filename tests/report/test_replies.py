"""Every metric of replies on replies made by hand, whose value is known."""

import pytest

from gpt2ft.report.instructions import obeys
from gpt2ft.report.replies import (
    METRICS,
    Exchange,
    behaviour,
    copies_prompt,
    distinct_share,
    longest_repeat,
    num_words,
    repeated_share,
    writes_user_turn,
)

LOOP = "I like tea. " * 5


def test_a_stuck_loop():
    """20 pieces, so 17 4-grams of which 4 differ; the first 16 pieces come again from the fifth on."""
    assert repeated_share(LOOP) == pytest.approx(13 / 17)
    assert longest_repeat(LOOP) == 16
    assert distinct_share(LOOP, 1) == 4 / 20
    assert distinct_share(LOOP, 2) == 4 / 19
    assert repeated_share("!!!!!!!!") == 4 / 5  # of punctuation alone
    assert repeated_share("茶很好。" * 3) == pytest.approx(5 / 9)  # without spaces


def test_prose_repeats_nothing():
    prose = "Pour boiling water over the leaves, wait, and drink it from a warm cup."
    assert repeated_share(prose) == 0
    assert longest_repeat(prose) == 1  # a comma
    assert distinct_share(prose, 2) == 1
    assert num_words(prose) == 14
    assert longest_repeat("one cup and one cup") == 2


def test_an_empty_reply():
    found = behaviour([Exchange("Tea?", " \n", stopped=True)], seed=0)
    assert {name: metric["value"] for name, metric in found.items()} == {
        "ends_by_itself": 1, "cut": 0, "empty": 1, "words": 0, "repeated_4grams": 0, "longest_repeat": 0,
        "writes_user_turn": 0, "copies_prompt": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "forged",
    ["Tea.\nUser: And cold?", "Tea. Human: And cold?", "**User:** x", "### Instruction: x", "a <|user|> b", "[INST] x"],
)
def test_a_forged_user_turn(forged):
    assert writes_user_turn(forged)


@pytest.mark.parametrize("honest", ["", "A user is a person.", "Ask the user: would they?", "Human beings: all of us."])
def test_words_about_users_are_no_turn_of_theirs(honest):
    assert not writes_user_turn(honest)


def test_a_copied_prompt():
    assert copies_prompt("What is the capital of France?", "what is the capital of france")
    assert copies_prompt("Hello!", "Hello.")
    story = "Tell me about the old kettle which stood on the stove of my aunt in Leeds for years."
    assert copies_prompt(story, "The old kettle which stood on the stove of hers was blue.")
    assert not copies_prompt("What is the capital of France?", "The capital of France is Paris.")
    assert not copies_prompt("Hello!", "Hello, how are you?")
    assert not copies_prompt("", "")


@pytest.mark.parametrize(
    ("prompt", "good", "bad"),
    [
        ("Explain in one sentence why the sky is blue.", "Air scatters 3.5 times more blue.", "It is. Look up."),
        ("Say it in at most two sentences.", "It is. Look!", "It is. Look! Up."),
        ("Answer in at most five words.", "It is a hot drink", "It is a very hot drink"),
        ("Use fewer than 3 words.", "hot drink", "a hot drink"),
        ("Describe tea in three words.", "Hot, brown, good.", "Hot and brown, good."),
        ("Describe tea in 10 words or less.", "Hot.", "a " * 11),
        ('Use the word "kettle".', "My Kettle sings.", "My kettles sing."),
        ("Describe tea without using the word hot.", "Warm.", "Hot."),
        ("Do not use the word “tea”.", "A drink.", "Tea is a drink."),
        ('Begin with "Dear".', "Dear aunt,", "My dear aunt,"),
        ("End your reply with 'Goodbye'.", "So, goodbye!", "Goodbye, then."),
        ("Answer yes or no: is tea hot?", "Yes, it is.", "It is."),
        ("Write it in capital letters.", "TEA!", "Tea!"),
        ("Write it in lower case.", "tea!", "Tea!"),
        ("List three drinks.", "1. tea\n2. milk\n3. rum", "tea, milk, rum"),
        ("Give it as a list.", "- tea", "tea"),
        ("Give it as JSON.", '{"tea": 1}', "tea: 1"),
        ('In one sentence, and use the word "cup".', "A cup.", "A pot."),
    ],
)
def test_instructions_that_can_be_checked(prompt, good, bad):
    assert obeys(prompt, good) is True
    assert obeys(prompt, bad) is False
    assert obeys(prompt, "") in (False, "without" in prompt or "not" in prompt)


@pytest.mark.parametrize(
    ("reply", "repeat"),
    [("." * 20_000 + "x", 19_999), ("\n" * 20_000 + "x", 0), ("- " * 10_000, 9_999), ("tea." * 5_000, 9_998)],
)
def test_a_loop_of_any_length_can_be_measured(reply, repeat):
    """Tokens of 64 dots in a row are among those that models loop on. Compared run by run, they would take minutes."""
    assert longest_repeat(reply) == repeat
    for prompt in ("Say it in one sentence.", "Name them as a list.", "Use the word tea and end with tea."):
        assert obeys(prompt, reply) is not None
    assert not writes_user_turn(reply)


def test_a_number_that_no_reply_reaches_is_no_instruction():
    assert obeys(f"Say it in {'9' * 5000} words.", "Tea.") is None


def test_a_prompt_without_instructions_has_nothing_to_obey():
    assert obeys("I live in one house, and list nothing. What is tea?", "Tea.") is None


def test_metrics_are_taken_over_what_has_them():
    exchanges = [
        Exchange("What is my name?", "It is Anna.", stopped=True, earlier=("Anna",)),
        Exchange("What is my name?", "I do not know.", stopped=False, earlier=("Anna",), topic=("tea",)),
        Exchange("In one word?", "Tea", stopped=True, topic=("tea", "kettle")),
    ]
    found = behaviour(exchanges, seed=0)
    assert set(found) == set(METRICS)
    for name, value, count in (("uses_earlier_turn", 0.5, 2), ("obeys", 1, 1), ("on_topic", 0.5, 2)):
        assert (found[name]["value"], found[name]["count"]) == (value, count)
    assert found["ends_by_itself"]["value"] == pytest.approx(2 / 3)
    assert found["words"]["value"] == pytest.approx((3 + 4 + 1) / 3)
    assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in found.values())
