"""A conversation: what becomes of replies however they end, and how it is changed. What the model sees of it is in
test_session_prompts.py.
"""

import pytest
import torch

from gpt2ft.chat.session import Session
from gpt2ft.inference.generate import generate
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.text.template import render_prompt

SEEDED = SamplingSettings(temperature=5.0, top_p=1.0, seed=5)


def after(number):
    """A `should_stop` that says yes from its question `number` on."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= number


class TestReply:
    def test_pieces_together_are_the_turn(self, scripted):
        session = scripted()
        session.say("What is tea?")
        pieces = session.answer("A hot drink 🙂 of leaves.")
        assert len(pieces) > 3
        assert "".join(pieces) == "A hot drink 🙂 of leaves."
        assert session.turns == [("user", "What is tea?"), ("assistant", "A hot drink 🙂 of leaves.")]
        assert session.last.finish == "stop"

    def test_statistics(self, scripted, tokenizer):
        session = scripted()
        session.system = "Be brief."
        session.say("What is tea?")
        session.answer("A hot drink.")
        last = session.last
        assert last.tokens == len(tokenizer.encode("A hot drink."))
        assert last.prompt_tokens == len(render_prompt(tokenizer, [("system", "Be brief."), ("user", "What is tea?")]))
        assert last.dropped_turns == 0
        assert last.tokens_per_second == pytest.approx(last.tokens / last.seconds)

    def test_an_empty_reply_is_a_turn(self, scripted):
        session = scripted()
        session.say("Say nothing.")
        assert session.answer("") == []
        assert session.turns[-1] == ("assistant", "")
        assert session.last.finish == "stop"

    def test_the_end_of_a_reply_is_cut_at_max_new_tokens_or_at_the_context(self, scripted, tokenizer):
        session = scripted(n_positions=32, max_new_tokens=3)
        session.say("Hi")
        session.answer("one two three four five six")
        assert (session.last.finish, session.last.tokens) == ("length", 3)
        session.new()
        session.max_new_tokens = 1000
        session.say("Hi")
        session.answer("a" + " tea" * 50)
        assert session.last.finish == "context"
        assert session.last.prompt_tokens + session.last.tokens == 32
        assert session.turns[-1][1].startswith("a tea tea")

    def test_half_a_character_is_not_held_back_for_ever(self, scripted, tokenizer):
        session = scripted(max_new_tokens=2)
        session.say("Smile")
        assert "".join(session.answer("🙂")) == "\ufffd" == session.turns[-1][1]

    def test_nothing_to_reply_to(self, scripted):
        session = scripted()
        with pytest.raises(ValueError, match="message"):
            session.reply()
        session.say("Hi")
        session.answer("Hello")
        with pytest.raises(ValueError, match="message"):
            session.reply()

    def test_two_messages_in_a_row_become_one(self, scripted):
        session = scripted()
        session.say("What is")
        session.say("tea?")
        assert session.turns == [("user", "What is\n\ntea?")]


class TestInterruption:
    def test_what_was_said_becomes_a_turn(self, scripted):
        session = scripted()
        session.say("Hi")
        pieces = session.answer("one two three four", should_stop=after(2))
        assert session.turns[-1] == ("assistant", "".join(pieces))
        assert (session.last.finish, session.last.tokens) == ("interrupted", 2)

    def test_nothing_said_is_no_turn_and_the_reply_can_be_asked_for_again(self, scripted):
        session = scripted()
        session.say("Hi")
        assert session.answer("Hello there.", should_stop=lambda: True) == []
        assert session.turns == [("user", "Hi")]
        assert (session.last.finish, session.last.tokens) == ("interrupted", 0)
        session.answer("Hello there.")
        assert session.turns[-1] == ("assistant", "Hello there.")

    def test_a_reader_that_closes_the_reply(self, scripted):
        session = scripted()
        session.say("Hi")
        session.model.gpt2.script = session.model.tokenizer.encode("one two three four")
        reply = session.reply()
        said = next(reply) + next(reply)
        reply.close()
        assert session.turns[-1] == ("assistant", said)
        assert session.last.finish == "interrupted"

    @pytest.mark.parametrize("act", ["say", "reply", "undo", "retry", "new", "to_messages", "complete"])
    def test_a_reader_that_forgets_the_reply(self, scripted, act):
        """The reply is settled before anything else happens, and only once."""
        session = scripted()
        session.say("Hi")
        session.model.gpt2.script = session.model.tokenizer.encode("one two three four")
        forgotten = session.reply()
        said = next(forgotten)
        if act == "reply":
            with pytest.raises(ValueError, match="message"):
                session.reply()
        else:
            getattr(session, act)(*{"say": ["More"], "complete": ["More"]}.get(act, []))
        turns = {"undo": [], "new": [], "retry": [("user", "Hi")]}.get(act, [("user", "Hi"), ("assistant", said)])
        turns += [("user", "More")] if act == "say" else []
        assert session.turns == turns
        assert list(forgotten) == []
        assert session.turns == turns

    def test_ctrl_c_while_the_model_computes(self, scripted):
        session = scripted()
        session.say("Hi")
        session.model.gpt2.script = session.model.tokenizer.encode("one two three four")
        reply = session.reply()
        said = next(reply)

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = session.model.gpt2.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(reply)
        handle.remove()
        assert session.turns[-1] == ("assistant", said)
        session.say("Go on")
        session.answer("five")
        assert session.turns[-1] == ("assistant", "five")

    def test_a_model_that_fails_leaves_the_session_usable(self, model, tokenizer):
        """Nothing that it computed meanwhile is used again."""
        session = Session(model, GREEDY, 8)
        session.say("What is tea?")
        expected = list(session.reply())
        session.new()
        session.say("The kettle, what is it?")
        bias = model.gpt2.h[0].mlp.c_fc.bias.data
        healthy = bias.clone()
        bias[0] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            list(session.reply())
        assert session.turns == [("user", "The kettle, what is it?")]
        bias.copy_(healthy)
        assert "".join(session.reply()) != ""
        session.new()
        session.say("What is tea?")
        assert list(session.reply()) == expected


class TestChanges:
    def test_undo_takes_the_message_and_its_reply_back(self, scripted):
        session = scripted()
        for text in ("one", "two"):
            session.say(text)
            session.answer(text)
        session.undo()
        assert session.turns == [("user", "one"), ("assistant", "one")]
        session.say("three")
        session.undo()
        assert len(session.turns) == 2
        session.undo()
        assert session.turns == []
        with pytest.raises(ValueError, match="message"):
            session.undo()

    def test_undone_turns_leave_no_trace(self, model, tokenizer):
        replies = []
        for detour in (False, True):
            session = Session(model, GREEDY, 8)
            session.say("What is tea?")
            "".join(session.reply())
            if detour:
                session.say("The kettle is hot and then")
                "".join(session.reply())
                session.undo()
            session.say("And the pot?")
            replies.append("".join(session.reply()))
        assert replies[0] == replies[1] != ""

    def test_a_retry_says_something_else_and_a_seed_makes_it_repeatable(self, model, tokenizer):
        def replies():
            session = Session(model, SEEDED, 8)
            session.say("What is tea?")
            said = ["".join(session.reply())]
            for _ in range(4):
                session.retry()
                said.append("".join(session.reply()))
            assert session.turns == [("user", "What is tea?"), ("assistant", said[-1])]
            return said

        first = replies()
        assert len(set(first)) == 5
        assert replies() == first

    def test_a_retry_without_a_reply(self, scripted):
        session = scripted()
        with pytest.raises(ValueError, match="message"):
            session.retry()
        session.say("Hi")
        session.retry()
        assert session.turns == [("user", "Hi")]

    def test_a_new_conversation_keeps_the_system_text_and_repeats_the_draws(self, model, tokenizer):
        session = Session(model, SEEDED, 8)
        session.system = "Be brief."
        said = []
        for _ in range(2):
            session.say("What is tea?")
            said.append("".join(session.reply()))
            session.new()
            assert session.turns == []
            assert session.last is None
        assert session.system == "Be brief."
        assert said[0] == said[1]


class TestMessages:
    def test_there_and_back(self, scripted):
        session = scripted()
        session.system = "Be brief."
        session.say("Hi {role}\n")
        session.answer("")
        session.say("Still there?")
        messages = session.to_messages()
        assert messages == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi {role}"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "Still there?"},
        ]
        other = scripted()
        other.say("Forgotten")
        other.from_messages(messages)
        assert (other.system, other.turns) == (session.system, session.turns)
        assert other.to_messages() == messages
        assert other.answer("Yes.")
        other.from_messages([])
        assert (other.system, other.turns) == (None, [])

    @pytest.mark.parametrize(
        ("messages", "facts"),
        [
            ({"role": "user"}, "list.*dict"),
            (["Hi"], "message 1 .*`role` and `content`.*'Hi'"),
            ([{"role": "user"}], "message 1 .*`role` and `content`"),
            ([("user", 5)], "message 1 "),
            ([("user", "Hi"), ("bot", "Hi")], "message 2: `role` .*assistant.*'bot'"),
            ([("assistant", "Hi")], "message 1: `role` .*system or user.*'assistant'"),
            ([("user", "Hi"), ("user", "Hi")], "message 2: `role` .*assistant.*'user'"),
            ([("user", "Hi"), ("system", "Hi")], "message 2: `role` .*assistant.*'system'"),
            ([("system", "Hi"), ("assistant", "Hi")], "message 2: `role` .*user.*'assistant'"),
            ([(["user"], "Hi")], "message 1: `role` .*system or user"),
        ],
    )
    def test_damaged_messages_change_nothing(self, scripted, messages, facts):
        session = scripted()
        session.say("Hi")
        if isinstance(messages, list):
            pair = ("role", "content")
            messages = [dict(zip(pair, m, strict=True)) if isinstance(m, tuple) else m for m in messages]
        with pytest.raises(ValueError, match=facts):
            session.from_messages(messages)
        assert session.turns == [("user", "Hi")]


class TestComplete:
    def test_it_equals_plain_generation_and_plays_no_part_in_the_turns(self, model, tokenizer):
        end = tokenizer.end_of_text_id
        session = Session(model, GREEDY, 30)
        session.say("Hi")
        for text, prompt in (("The kettle", tokenizer.encode("The kettle")), ("", [end])):
            reply = generate(model.decoder([end]), [prompt], 30)[0]
            assert "".join(session.complete(text)) == tokenizer.decode(reply.ids) != ""
            assert session.last.tokens == len(reply.ids)
        assert session.turns == [("user", "Hi")]

    def test_it_ends_at_end_of_text(self, scripted, tokenizer):
        session = scripted()
        session.model.gpt2.generation_prompt = tokenizer.encode("The")
        session.model.gpt2.script = [*tokenizer.encode(" kettle."), tokenizer.end_of_text_id]
        assert "".join(session.complete("The")) == " kettle."
        assert session.last.finish == "stop"

    def test_it_can_be_interrupted(self, scripted, tokenizer):
        session = scripted()
        session.model.gpt2.generation_prompt = tokenizer.encode("The")
        session.model.gpt2.script = tokenizer.encode(" kettle is hot.")
        assert "".join(session.complete("The", should_stop=after(2))) == " kettle is"
        assert session.last.finish == "interrupted"

    def test_a_text_that_is_too_long(self, scripted):
        with pytest.raises(ValueError, match="at most 76 tokens.* 100"):
            scripted().complete(" tea" * 100)


def test_taking_a_message_back_leaves_the_one_it_was_joined_to(scripted):
    session = scripted()
    session.say("First.")
    session.say(" Second.\r\n")
    assert session.turns == [("user", "First.\n\nSecond.")]
    session.undo()
    assert session.turns == [("user", "First.")]
    session.undo()
    assert session.turns == []
