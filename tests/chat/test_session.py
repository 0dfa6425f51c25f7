"""A conversation: what the model sees of it, what becomes of replies however they end, and how it is changed."""

import random

import pytest
import torch

from gpt2ft.chat.session import Session
from gpt2ft.inference.generate import generate
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import ChatPromptFormat, PlainPromptFormat, prompt_format_for
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.text.context import kept_turns
from gpt2ft.text.template import render_prompt, render_turn
from gpt2ft.text.tokenizer_export import save_tokenizer

SEEDED = SamplingSettings(temperature=5.0, top_p=1.0, seed=5)
N_POSITIONS = 96


class Scripted(GPT2):
    """Says `script`, id by id, behind whatever prompt: wherever `generation_prompt` stands last, the script begins."""

    def __init__(self, tokenizer, prompt_format, n_positions=N_POSITIONS):
        super().__init__(GPT2Config(tokenizer.padded_size, n_positions, n_embd=64, n_layer=1, n_head=1))
        signs = torch.rand(self.wte.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        self.wte.weight.data = signs * 2.0 - 1.0  # rows that are far from each other: each is likeliest for itself
        self.generation_prompt = prompt_format.generation_prompt
        self.script = []
        self.known = [0] * n_positions
        self.num_read = 0

    def forward(self, tokens, positions, attend):
        self.num_read += len(tokens)
        for token, position in zip(tokens.tolist(), positions.tolist(), strict=True):
            self.known[position] = token
        q = torch.zeros(len(tokens), 1, 64)
        attend(q, q, q, 0)
        ids, width = self.known[: positions[-1] + 1], len(self.generation_prompt)
        begun = [end for end in range(width, len(ids) + 1) if ids[end - width : end] == self.generation_prompt]
        said = len(ids) - begun[-1] if begun else 0
        return self.wte.weight[self.script[said : said + 1] or [0]].expand(len(tokens), -1)


@pytest.fixture
def scripted(tokenizer):
    """scripted(prompt_format): a session; its `answer(text, *more_ids)` sets what the model says and reads it."""

    def make(prompt_format=None, n_positions=N_POSITIONS, max_new_tokens=20):
        prompt_format = prompt_format or ChatPromptFormat(tokenizer)
        gpt2 = Scripted(tokenizer, prompt_format, n_positions)
        session = Session(InferenceModel(gpt2, tokenizer, prompt_format, "scripted", ""), GREEDY, max_new_tokens)

        def answer(text, *more_ids, **how):
            gpt2.script = [*tokenizer.encode(text), *(more_ids or [prompt_format.stop_ids[0]])]
            return list(session.reply(**how))

        session.answer = answer
        return session

    return make


@pytest.fixture(scope="module")
def model(lively, tokenizer):
    gpt2 = lively(tokenizer.padded_size, N_POSITIONS)
    return InferenceModel(gpt2, tokenizer, ChatPromptFormat(tokenizer), "lively", "")


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


class TestContext:
    def test_what_the_model_sees_is_what_kept_turns_leaves(self, model, tokenizer):
        """Random conversations against a fresh, one-off generation from the turns that the rule leaves."""
        draw = random.Random(0)
        words = ["tea", "kettle", "cup", "What", "is", "it", "?", "hot", "cold", "and", "then", "the", "pot"]
        dropped = refused = kept_whole = 0
        for conversation in range(12):
            most = draw.choice([5, 12, 40])
            session = Session(model, GREEDY, most)
            session.system = " ".join(draw.choices(words, k=8)) if conversation % 2 else None
            for _ in range(8):
                text = " ".join(draw.choices(words, k=draw.choice([3, 8, 20, 72])))
                before = list(session.turns)
                turns = [*([("system", session.system)] if session.system else []), *before, ("user", text)]
                lengths = [len(render_turn(tokenizer, *turn)) for turn in turns]
                limit = N_POSITIONS - min(most, N_POSITIONS // 4) - 1
                kept = kept_turns([role for role, _ in turns], lengths, limit)
                session.say(text)
                if kept is None:
                    fitting = limit - (lengths[0] if session.system else 0)
                    with pytest.raises(ValueError, match=rf"at most {fitting} tokens.* {lengths[-1]}\b"):
                        session.reply()
                    assert session.turns == before
                    refused += 1
                    continue
                said = "".join(session.reply())
                assert said == self.fresh(model, tokenizer, [turns[turn] for turn in kept], most)
                assert session.turns == [*before, ("user", text), ("assistant", said)]
                assert session.last.dropped_turns == len(turns) - len(kept)
                dropped += bool(session.last.dropped_turns)
                kept_whole += len(kept) == len(turns) > 2
        assert dropped > 10
        assert refused > 5
        assert kept_whole > 5

    def fresh(self, model, tokenizer, turns, most):
        decoder = model.decoder([tokenizer.end_id, tokenizer.end_of_text_id])
        return tokenizer.decode(generate(decoder, [render_prompt(tokenizer, turns)], most)[0].ids)

    def test_a_turn_is_read_once(self, scripted, tokenizer):
        session = scripted()
        session.say("What is tea?")
        session.answer("A hot drink.")
        session.model.gpt2.num_read = 0
        session.say("And cold?")
        session.answer("Iced tea.")
        new = [tokenizer.end_id, *render_prompt(tokenizer, [("user", "And cold?")]), *tokenizer.encode("Iced tea.")]
        assert session.model.gpt2.num_read == len(new)

    def test_a_system_text_that_leaves_no_room(self, scripted):
        session = scripted()
        session.system = "tea " * 200
        session.say("Hi")
        with pytest.raises(ValueError, match=r"at most 0 tokens.* system .* 3\b"):
            session.reply()
        session.system = None
        session.say("Hi")
        assert session.answer("Hello")

    def test_max_new_tokens_is_checked_when_it_is_set(self, scripted):
        session = scripted()
        with pytest.raises(ValueError, match="`max_new_tokens` .*at least 1, .* 0"):
            session.max_new_tokens = 0
        assert session.max_new_tokens == 20


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


class TestPlainPromptFormat:
    @pytest.fixture
    def session(self, scripted, tokenizer):
        return scripted(PlainPromptFormat(tokenizer))

    def test_turns_are_plain_text(self, tokenizer):
        plain = PlainPromptFormat(tokenizer)
        turns = [("system", "Be {brief}."), ("user", "Tea?"), ("assistant", "Yes."), ("user", "Milk?")]
        ids = [id for turn in plain.render(turns) for id in turn] + plain.generation_prompt
        assert tokenizer.decode(ids) == "Be {brief}.\n\nUser: Tea?\nAssistant: Yes.\nUser: Milk?\nAssistant:"
        assert not tokenizer.control_ids & set(ids)

    def test_it_is_for_models_whose_chat_tokens_were_never_trained(self, tokenizer, tmp_path):
        assert not tokenizer.has_chat_tokens
        assert isinstance(prompt_format_for(tokenizer), PlainPromptFormat)
        save_tokenizer(tokenizer, tmp_path, model_max_length=1024)
        assert isinstance(prompt_format_for(type(tokenizer).from_folder(tmp_path)), ChatPromptFormat)

    def test_a_reply_ends_where_the_next_user_turn_would_begin(self, session, tokenizer):
        session.say("What is tea?")
        tail = tokenizer.encode("\nUser: And then?")
        assert len(tokenizer.encode("\nUser:")) > 2
        pieces = session.answer(" A hot drink.\nUsed leaves, too.", *tail)
        assert "".join(pieces) == "A hot drink.\nUsed leaves, too."
        assert len(pieces) > 5
        assert session.turns[-1] == ("assistant", "A hot drink.\nUsed leaves, too.")
        assert session.last.finish == "stop"

    def test_what_only_looks_like_the_stop_is_said_in_the_end(self, session, tokenizer):
        session.say("What is tea?")
        assert "".join(session.answer(" Hot.\nUser")) == "Hot.\nUser"
        assert session.last.finish == "stop"

    def test_a_stop_string_at_once_is_an_empty_reply(self, session, tokenizer):
        session.say("What is tea?")
        assert session.answer("\nUser:") == []
        assert session.turns[-1] == ("assistant", "")

    def test_the_next_turn_is_read_behind_what_is_cached(self, session, tokenizer):
        session.say("What is tea?")
        session.answer(" A hot drink.")
        session.model.gpt2.num_read = 0
        session.say("And cold?")
        session.answer(" Iced tea.")
        new = tokenizer.encode("\nUser: And cold?\nAssistant: Iced tea.")
        assert abs(session.model.gpt2.num_read - len(new)) <= 1


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
