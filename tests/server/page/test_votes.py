"""Two replies beside each other, and the vote on them: by keyboard, by ear, on a phone, and when things go wrong."""

import json

import pytest

from .test_access import is_only_half_in_sight, walk
from .visit import PHONE, expect

CHOICES = {
    "left": "Reply 1 is better",
    "right": "Reply 2 is better",
    "both_good": "As good as each other",
    "both_bad": "Both are bad",
}


class Voting:
    """A visit to a server that compares two models."""

    def __init__(self, visit, server, file):
        self.visit = visit
        self.tab = visit.tab
        self.server = server
        self.file = file
        self.ballot = visit.tab.get_by_role("region", name="Which reply is better?")
        self.replies = self.ballot.get_by_role("article")
        self.count = visit.tab.locator("#votes")

    def ask(self, text, *replies):
        """Return the replies as they stand, the left one first."""
        for reply in replies:
            self.server.will_say(reply)
        self.visit.start(text)
        expect(self.ballot).to_be_visible()
        return self.replies.locator(".text").all_text_contents()

    def boxes(self):
        """Return where the replies are, in one look: between two looks the page may have scrolled."""
        return self.replies.evaluate_all("(replies) => replies.map((reply) => reply.getBoundingClientRect().toJSON())")

    def choose(self, vote):
        self.ballot.get_by_role("button", name=CHOICES[vote]).click()
        expect(self.ballot).to_be_hidden()

    def stored(self):
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture
def voting(server, new_visit, tmp_path):
    file = tmp_path / "votes.jsonl"
    server.restart(votes=file)
    visit = new_visit()
    expect(visit.tab.get_by_text("0 votes")).to_be_visible()
    return Voting(visit, server, file)


@pytest.mark.parametrize("vote", CHOICES)
def test_the_conversation_goes_on_from_the_reply_that_was_voted_for(voting, server, vote):
    left, right = voting.ask("What is tea?", "A drink.", "A leaf.")
    assert {left, right} == {"A drink.", "A leaf."}
    better, other = (right, left) if vote == "right" else (left, right)
    voting.choose(vote)
    voting.visit.expect_texts("What is tea?", better)
    expect(voting.count).to_have_text("1 vote")
    (line,) = voting.stored()
    assert line["metadata"]["vote"] == vote
    assert [line[key][0]["content"] for key in ("chosen", "rejected")] == [better, other]
    voting.visit.button("Previous version").click()
    voting.visit.expect_texts("What is tea?", other)
    voting.visit.button("Next version").click()
    voting.ask("And cold?", "Iced.", "Cold.")
    asked = voting.visit.asked[2]["messages"]
    assert [message["content"] for message in asked] == ["What is tea?", better, "And cold?"]
    voting.choose("left")
    expect(voting.count).to_have_text("2 votes")
    assert voting.stored()[1]["prompt"] == asked


def test_by_keyboard_alone(voting, server):
    keyboard = voting.tab.keyboard
    server.will_say("A drink.")
    server.will_say("A leaf.")
    keyboard.type("What is tea?")
    keyboard.press("Enter")
    expect(voting.ballot.get_by_role("heading", name="Which reply is better?")).to_be_focused()
    keyboard.press("Enter")  # once more than was needed
    keyboard.press("Space")
    expect(voting.ballot).to_be_visible()
    _, right = voting.replies.locator(".text").all_text_contents()
    keyboard.press("2")
    voting.visit.expect_texts("What is tea?", right)
    expect(voting.visit.message).to_be_focused()
    expect(voting.visit.message).to_have_value("")

    server.will_say("Iced.")
    server.will_say("Cold.")
    keyboard.type("And cold in 1 to 4 words?")
    keyboard.press("Enter")
    expect(voting.ballot).to_be_visible()
    walk(voting.visit, CHOICES["both_bad"])
    keyboard.press("Enter")
    expect(voting.ballot).to_be_hidden()
    assert [line["metadata"]["vote"] for line in voting.stored()] == ["right", "both_bad"]


def test_digits_in_a_message_are_no_votes_and_it_waits_for_the_vote(voting):
    voting.ask("What is tea?", "A drink.", "A leaf.")
    voting.visit.message.press_sequentially("1 2 3 4")
    voting.visit.message.press("Enter")
    expect(voting.visit.message).to_have_value("1 2 3 4")
    expect(voting.ballot).to_be_visible()
    voting.choose("left")
    assert len(voting.stored()) == 1
    assert len(voting.visit.asked) == 2
    voting.visit.message.fill("")


def test_a_screen_reader_is_told_of_both_replies_once_and_that_the_vote_counts(voting):
    voting.tab.evaluate(
        """() => {
          window.told = [];
          const status = document.querySelector("#status");
          new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    left, right = voting.ask("What is tea?", "A drink.", "A leaf.")
    voting.choose("left")
    expect(voting.visit.send).to_be_visible()
    replies = f"Reply 1: {left} Reply 2: {right} Which is better?"
    assert voting.tab.evaluate("told") == ["Waiting for the reply", replies, "Your vote counts: 1 vote"]


def test_nothing_that_axe_knows_to_be_a_barrier(voting):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing").Axe()
    voting.ask("What is tea?", "# Tea\n\nA *drink*.", "A leaf.")
    voting.visit.answer_once("votes", status=507, body=json.dumps({"error": {"message": "the disk is full"}}))
    voting.ballot.get_by_role("button", name=CHOICES["left"]).click()
    expect(voting.ballot.get_by_role("alert")).to_have_text("the disk is full")
    for scheme in ("light", "dark"):
        voting.tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        result = axe.run(voting.tab, options={}).response
        issues = [
            (rule["id"], node) for rule in (*result["violations"], *result["incomplete"]) for node in rule["nodes"]
        ]
        assert [(rule, node["html"]) for rule, node in issues if not is_only_half_in_sight(node)] == []


def test_side_by_side_on_a_desk_and_one_below_the_other_on_a_phone(voting):
    wide = "w" * 300
    voting.ask("What is tea?", f"A {wide}\n\n```\n{wide}\n```", "A leaf. " * 60)
    left, right = voting.boxes()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    voting.visit.resize(PHONE)
    left, right = voting.boxes()
    assert left["x"] == right["x"]
    assert left["y"] + left["height"] <= right["y"]
    assert voting.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    button = voting.ballot.get_by_role("button", name=CHOICES["right"])
    assert button.bounding_box()["height"] >= 36
    voting.choose("right")


def test_replies_are_text_and_never_markup(voting):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    for text in voting.ask("What is tea?", f"A {evil}", f"B {evil}"):
        assert text[1:] == f" {evil}"
    expect(voting.ballot.locator("img, script")).to_have_count(0)
    voting.choose("left")


def test_nothing_on_the_page_names_a_model(voting):
    voting.ask("What is tea?", "A drink.", "A leaf.")
    expect(voting.tab.get_by_role("heading", name="scripted")).to_be_visible()  # the name of both
    assert "0000000000" not in voting.tab.content()
    voting.choose("left")


def test_a_vote_that_could_not_be_stored_can_be_cast_again(voting):
    voting.ask("What is tea?", "A drink.", "A leaf.")
    voting.visit.answer_once("votes", status=507, body=json.dumps({"error": {"message": "the disk is full"}}))
    voting.ballot.get_by_role("button", name=CHOICES["right"]).click()
    expect(voting.ballot.get_by_role("alert")).to_have_text("the disk is full")
    voting.choose("left")
    assert [line["metadata"]["vote"] for line in voting.stored()] == ["left"]


@pytest.mark.parametrize("again", ["left", "right"])
def test_a_vote_whose_answer_was_lost_counts_once_and_stays(voting, again):
    left, _ = voting.ask("What is tea?", "A drink.", "A leaf.")
    voting.tab.route("**/v1/votes", lambda route: (route.fetch(), route.abort()), times=1)
    voting.ballot.get_by_role("button", name=CHOICES["left"]).click()
    expect(voting.ballot.get_by_role("alert")).to_contain_text("cannot be reached")
    voting.choose(again)
    voting.visit.expect_texts("What is tea?", left)
    assert [line["metadata"]["vote"] for line in voting.stored()] == ["left"]


@pytest.mark.parametrize("status", [404, 410])
def test_for_a_pair_that_is_gone_there_is_another(voting, status):
    voting.ask("What is tea?", "A drink.", "A leaf.")
    body = json.dumps({"error": {"message": "this pair is gone"}})
    voting.visit.answer_once("votes", status=status, body=body)
    voting.ballot.get_by_role("button", name=CHOICES["left"]).click()
    expect(voting.visit.trouble).to_contain_text("this pair is gone", ignore_case=True)
    expect(voting.ballot).to_be_hidden()
    for reply in ("No.", "Yes."):
        voting.server.will_say(reply)
    voting.visit.trouble.get_by_role("button", name="Try again").click()
    expect(voting.replies.first).to_contain_text(".")
    voting.choose("left")
    assert len(voting.stored()) == 1


def test_escape_leaves_a_pair_without_a_vote(voting):
    voting.ask("What is tea?", "A drink.", "A leaf.")
    voting.tab.keyboard.press("Escape")
    expect(voting.ballot).to_be_hidden()
    expect(voting.visit.trouble).to_contain_text("There is no reply yet.")
    assert voting.stored() == []


def test_another_version_is_another_vote(voting):
    voting.ask("What is tea?", "A drink.", "A leaf.")
    voting.choose("left")
    for reply in ("No.", "Yes."):
        voting.server.will_say(reply)
    voting.visit.button("Retry").click()
    expect(voting.ballot).to_be_visible()
    voting.choose("both_good")
    expect(voting.visit.turns.last).to_contain_text("4 of 4")
    assert len({json.dumps(line["prompt"]) for line in voting.stored()}) == 1
