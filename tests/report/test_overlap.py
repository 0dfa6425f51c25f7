"""What stands in training data word for word or almost, found in texts whose overlap is known."""

import sys

import pytest

from gpt2ft.report.overlap import TrainingData, grams, word_codes

STORY = "the old kettle stood on the stove of my aunt in leeds for many years and sang every morning to her cat"


def scanned(training, replies=None, held_out=()):
    found = TrainingData(replies or {}, enumerate(held_out))
    for text in training:
        found.scan(text)
    return found


def test_grams_are_numbers_of_words():
    def of(text, n):
        return grams(word_codes(text), n).tolist()

    assert len(of(STORY, 8)) == len(STORY.split()) - 7
    assert of("two words", 5) == []
    assert of("Tea, please!", 2) == of("tea ,please !", 2)
    assert of("a b", 2) != of("b a", 2)


def test_pieces_of_replies_that_stand_in_training():
    """The first reply holds 9 words of the story in a row, so two 8-grams of its 4, and no 13-gram."""
    copied = "it said: " + " ".join(STORY.split()[3:12])
    words = " ".join(f"word{number}" for number in range(20))
    found = scanned([STORY, "another text"], {"copies": [copied, ""], "invents": [words], "silent": [""]})
    heart = found.learnt_by_heart("copies", seed=0)
    assert set(heart) == {"grams_8"}
    assert heart["grams_8"]["value"] == pytest.approx(2 / 5)
    assert heart["grams_8"]["count"] == 5
    invented = found.learnt_by_heart("invents", seed=0)
    assert [invented[name]["value"] for name in ("grams_8", "grams_13")] == [0, 0]
    assert [invented[name]["count"] for name in ("grams_8", "grams_13")] == [13, 8]
    assert found.learnt_by_heart("silent", seed=0) == {}


def test_a_model_is_asked_of_the_data_of_its_own_runs():
    found = TrainingData({"a": [STORY]}, [], num_runs=2)
    found.scan("something else that is as long as that, and has nothing to do with it", 0)
    found.scan(STORY, 1)
    assert [found.learnt_by_heart("a", 0, runs)["grams_8"]["value"] for runs in ([0], [1], [0, 1], [])] == [0, 1, 1, 1]


def test_nothing_is_known_of_data_that_cannot_be_read():
    found = TrainingData({"a": [STORY, "short"]}, [], num_runs=2)
    found.scan(STORY, 0)
    found.leave_out(1, "gone")
    assert found.learnt_by_heart("a", 0, [0])["grams_8"] == {"value": 1, "low": 1, "high": 1, "count": 15}
    assert found.learnt_by_heart("a", 0, [0, 1]) == found.learnt_by_heart("a", 0) == {}
    assert found.overlap(0)[0]["exact"] == 0
    found.leave_out(0, "gone too")
    assert found.overlap(0)[0] == {"conversations": 0, "problems": ["gone", "gone too"]}


def test_held_out_replies_that_stand_in_training():
    near = STORY.replace("kettle", "pot").capitalize() + "."  # 3 of 19 5-grams are others
    held_out = [STORY.upper(), near, "Yes.", "nothing of this stands in any other text at all, nor ever did"]
    one_word_less = " ".join(STORY.split()[:-1])
    other, overlapping = scanned([STORY, "Yes.", "unlike"], held_out=held_out).overlap(len(held_out))
    assert other == {"conversations": 4, "exact": 1, "near": 1, "problems": []}
    assert overlapping.tolist() == [True, False, False, False]
    assert scanned([one_word_less], held_out=held_out).overlap(4)[0]["near"] == 1  # 18 of 19 are the same
    assert scanned([one_word_less], held_out=held_out).overlap(4)[0]["exact"] == 0


def test_without_the_library_near_copies_are_not_looked_for_and_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    found, overlapping = scanned(
        [STORY], {"a": [STORY]}, [STORY, "another one that is long enough to be looked at"]
    ).overlap(2)
    assert "near" not in found
    assert found["exact"] == 1
    assert overlapping.tolist() == [True, False]
    (problem,) = found["problems"]
    assert "gpt2ft[report]" in problem
