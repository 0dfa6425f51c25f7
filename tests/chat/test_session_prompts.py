"""What the model sees of a conversation, in chat tokens or as plain text."""

import random

import pytest

from gpt2ft.chat.session import Session
from gpt2ft.inference.generate import generate
from gpt2ft.inference.prompt_format import ChatPromptFormat, PlainPromptFormat, prompt_format_for
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.text.context import kept_turns
from gpt2ft.text.template import render_prompt, render_turn
from gpt2ft.text.tokenizer_export import save_tokenizer


class TestContext:
    def test_what_the_model_sees_is_what_kept_turns_leaves(self, model, tokenizer):
        """Random conversations against a fresh, one-off generation from the turns that the rule leaves."""
        context = model.gpt2.config.n_positions
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
                limit = context - min(most, context // 4) - 1
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
