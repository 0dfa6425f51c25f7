"""Prompts: the oldest whole turns give way, the reply keeps its room, and a format knows how a reply ends."""

import pytest

from gpt2ft.inference.prompt_format import (
    ChatPromptFormat,
    PlainPromptFormat,
    TooLong,
    chat_prompt,
    prompt_limit,
    text_prompt,
)
from gpt2ft.text.template import render_prompt

TURNS = [("user", "What is tea?"), ("assistant", "A hot drink."), ("user", "And cold?")]


@pytest.fixture(params=[ChatPromptFormat, PlainPromptFormat])
def prompt_format(request, tokenizer):
    return request.param(tokenizer)


def test_a_prompt_is_its_turns_and_the_generation_prompt(prompt_format):
    rendered = prompt_format.render(TURNS)
    prompt = chat_prompt(prompt_format, TURNS, limit=200)
    assert prompt.ids == [*(id for turn in rendered for id in turn), *prompt_format.generation_prompt]
    assert prompt.dropped_turns == 0


def test_the_oldest_turns_give_way_and_the_system_turn_stays(prompt_format):
    turns = [("system", "Be kind."), *TURNS]
    system, *_, last = prompt_format.render(turns)
    needed = [*system, *last, *prompt_format.generation_prompt]
    prompt = chat_prompt(prompt_format, turns, limit=len(needed))
    assert (prompt.ids, prompt.dropped_turns) == (needed, 2)
    with pytest.raises(TooLong, match=f"system text of {len(system)}, but this one has {len(last)}"):
        chat_prompt(prompt_format, turns, limit=len(needed) - 1)


@pytest.mark.parametrize(
    ("roles", "beside"),
    [(["system"], 0), (["assistant"], 0), (["user", "assistant"], 0), (["system", "user", "assistant", "system"], 1)],
)
def test_what_cannot_give_way_is_counted_in_any_order(prompt_format, roles, beside):
    turns = [(role, "What is tea?") for role in roles]
    lengths = [len(ids) for ids in prompt_format.render(turns)]
    with pytest.raises(TooLong, match=f"but this one has {sum(lengths[beside:])}$"):
        chat_prompt(prompt_format, turns, limit=len(prompt_format.generation_prompt) + 2)


def test_the_chat_format_is_the_template_and_ends_with_a_turn(tokenizer):
    prompt_format = ChatPromptFormat(tokenizer)
    assert chat_prompt(prompt_format, TURNS, limit=200).ids == render_prompt(tokenizer, TURNS)
    assert prompt_format.stop_ids == [tokenizer.end_id, tokenizer.end_of_text_id]
    assert prompt_format.stop_strings == ()


def test_the_plain_format_is_text_and_ends_where_the_user_would_go_on(tokenizer):
    prompt_format = PlainPromptFormat(tokenizer)
    text = tokenizer.decode(chat_prompt(prompt_format, [("system", "Be kind."), *TURNS], limit=200).ids)
    assert text == "Be kind.\n\nUser: What is tea?\nAssistant: A hot drink.\nUser: And cold?\nAssistant:"
    assert (prompt_format.stop_ids, prompt_format.stop_strings) == ([tokenizer.end_of_text_id], ("\nUser:",))
    assert not tokenizer.control_ids & set(tokenizer.encode(text))


def test_a_document_begins_with_its_text_or_with_end_of_text(tokenizer):
    ids = tokenizer.encode("The kettle is on.")
    assert text_prompt(tokenizer, "The kettle is on.", limit=len(ids)).ids == ids
    assert text_prompt(tokenizer, "", limit=9).ids == [tokenizer.end_of_text_id]
    with pytest.raises(TooLong, match=f"at most {len(ids) - 1} tokens, but has {len(ids)}"):
        text_prompt(tokenizer, "The kettle is on.", limit=len(ids) - 1)


def test_the_reply_is_left_its_room_but_no_more_than_a_quarter():
    assert prompt_limit(1024, max_new_tokens=100) == 924
    assert prompt_limit(1024, max_new_tokens=2000) == 768
