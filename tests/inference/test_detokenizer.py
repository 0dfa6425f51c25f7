"""Text that comes piece by piece is the text that would have come at once."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from gpt2ft.inference.detokenizer import StopStrings, Utf8Stream

MIXED = "A 🙂 é 日本 👨‍👩‍👧 \u2028\ufeff tea"


class TestTextStream:
    @given(some.data())
    def test_the_pieces_of_any_ids_equal_decode(self, tokenizer, data):
        """Random ids: single bytes in every order, words, control tokens."""
        any_id = some.integers(0, len(tokenizer) - 1)
        ids = data.draw(some.lists(some.one_of(some.integers(0, 255), any_id), max_size=40))
        stream = Utf8Stream(tokenizer)
        pieces = [stream.push(id) for id in ids]
        assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)

    @given(some.text())
    @example(MIXED)
    def test_real_text_is_never_damaged(self, tokenizer, text):
        text = text.encode(errors="replace").decode()
        stream = Utf8Stream(tokenizer)
        pieces = [stream.push(id) for id in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert stream.finish() == ""

    def test_a_character_comes_with_its_last_token(self, tokenizer):
        ids = tokenizer.encode("𓀀!")
        assert len(ids) == 5
        stream = Utf8Stream(tokenizer)
        assert [stream.push(id) for id in ids] == ["", "", "", "𓀀", "!"]

    def test_half_a_character_ends_as_one_replacement(self, tokenizer):
        stream = Utf8Stream(tokenizer)
        assert [stream.push(id) for id in tokenizer.encode("🙂")[:2]] == ["", ""]
        assert stream.finish() == "\ufffd"

    def test_an_unknown_id_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="a token id must be from 0 to"):
            Utf8Stream(tokenizer).push(len(tokenizer))


def cut(text, strings):
    """By the definition: character by character, until the text holds a stop string."""
    for end in range(len(text) + 1):
        if starts := [text[:end].find(string) for string in strings if string in text[:end]]:
            return text[: min(starts)], True
    return text, False


class TestStopStrings:
    @given(
        some.lists(some.text("ab\n", max_size=4), max_size=12),
        some.lists(some.text("ab\n", min_size=1, max_size=4), max_size=3),
    )
    @example(["\n", "a\na", "b", "x"], ["\nab"])
    @example(["aab"], ["aaab", "ab", "b"])
    def test_pieces_of_any_size_are_cut_where_the_whole_is(self, pieces, strings):
        text = "".join(pieces)
        stop = StopStrings(strings)
        passed = ""
        for number, piece in enumerate(pieces, start=1):
            passed += stop.push(piece)
            held = "".join(pieces[:number])[len(passed) :]
            assert stop.found or not held or any(string.startswith(held) for string in strings)
        assert (passed + stop.finish(), stop.found) == cut(text, strings)

    def test_what_could_be_the_beginning_is_held_back_until_it_is_decided(self):
        stop = StopStrings(["\nUser:"])
        assert [stop.push(piece) for piece in ("Hi\n", "Us", "ual\n", "\nUs", "er", ":", " more")] == [
            "Hi", "", "\nUsual", "\n", "", "", "",
        ]  # fmt: skip
        assert stop.found
        assert stop.finish() == ""

    def test_what_is_undecided_at_the_end_was_no_stop(self):
        stop = StopStrings(["\nUser:"])
        assert stop.push("Hi\nUser") == "Hi"
        assert stop.finish() == "\nUser"
        assert not stop.found

    def test_an_empty_one_is_refused(self):
        with pytest.raises(ValueError, match="a stop string must have at least one character"):
            StopStrings(["a", ""])
