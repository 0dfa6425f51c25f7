"""Requests as the engine gets them: turns, what fits, limits, sampling, and what ends a reply."""

import pytest

from gpt2ft.server.errors import ApiError
from gpt2ft.server.openai.conversion import RequestConverter, turns_of
from gpt2ft.server.openai.requests import ChatMessage, ChatRequest, CompletionRequest
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.settings.using import ServeSettings
from gpt2ft.text.template import render_prompt


def messages(*turns):
    return [ChatMessage(role=role, content=text) for role, text in turns]


def chat(text="What is tea?", **parameters):
    return ChatRequest(messages=messages(("user", text)), **parameters)


@pytest.fixture
def convert(inference_model):
    """convert(request, **settings): its GenerationRequest on a server with these settings."""

    def convert(request, **settings):
        converter = RequestConverter(inference_model, ServeSettings(**settings))
        return (converter.chat if isinstance(request, ChatRequest) else converter.completion)(request)

    return convert


def refusal(action, *arguments, **named):
    """(code, param) of a request that is refused."""
    with pytest.raises(ApiError) as error:
        action(*arguments, **named)
    assert error.value.status == 400
    return error.value.code, error.value.param


class TestTurns:
    def test_they_are_tidied_and_joined_where_one_role_speaks_twice(self):
        given = messages(
            ("system", "Be brief."), ("user", " What\r\n"), ("user", ""), ("user", "is tea?"),
            ("assistant", "A drink."), ("user", "Hm."),
        )  # fmt: skip
        expected = [("system", "Be brief."), ("user", "What\n\nis tea?"), ("assistant", "A drink."), ("user", "Hm.")]
        assert turns_of(given) == expected

    def test_an_empty_system_text_is_none(self):
        assert turns_of(messages(("system", " "), ("user", "Hi"))) == [("user", "Hi")]
        assert turns_of(messages(("user", "Hi"), ("developer", ""), ("user", "Ho"))) == [("user", "Hi\n\nHo")]
        assert refusal(turns_of, messages(("system", " "))) == ("invalid_value", "messages")

    def test_a_developer_is_the_system(self):
        given = messages(("developer", "Be brief."), ("system", "Be kind."), ("user", "Hi"))
        assert turns_of(given) == [("system", "Be brief.\n\nBe kind."), ("user", "Hi")]

    @pytest.mark.parametrize(
        "roles",
        [
            ["assistant"],
            ["assistant", "user"],
            ["system", "assistant", "user"],
            ["user", "system", "user"],
            ["user", "system", "assistant", "user"],
            ["user", "assistant"],
            ["system"],
        ],
    )
    def test_any_order_is_a_prompt_as_the_template_renders_it(self, convert, inference_model, roles):
        turns = [(role, "x") for role in roles]
        prompt = convert(ChatRequest(messages=messages(*turns))).prompt
        assert turns_of(messages(*turns)) == turns
        assert (prompt.ids, prompt.dropped_turns) == (render_prompt(inference_model.tokenizer, turns), 0)


class TestPrompt:
    def test_of_a_chat(self, convert, inference_model):
        request = convert(chat())
        assert request.prompt.ids == render_prompt(inference_model.tokenizer, [("user", "What is tea?")])
        assert request.prompt.dropped_turns == 0
        assert request.stop_ids == tuple(inference_model.prompt_format.stop_ids)

    def test_of_a_document(self, convert, inference_model):
        tokenizer = inference_model.tokenizer
        request = convert(CompletionRequest(prompt="The kettle"))
        assert request.prompt.ids == tokenizer.encode("The kettle")
        assert request.stop_ids == (tokenizer.end_of_text_id,)

    def test_old_turns_give_way_and_are_counted(self, convert):
        turns = [(role, "tea " * 12) for _ in range(6) for role in ("user", "assistant")]
        request = convert(ChatRequest(messages=messages(*turns, ("user", "And now?"))))
        assert 0 < request.prompt.dropped_turns < 12

    def test_a_text_that_does_not_fit_is_refused(self, convert):
        assert refusal(convert, chat("tea " * 300)) == ("context_length_exceeded", "messages")
        assert refusal(convert, CompletionRequest(prompt="tea " * 300)) == ("context_length_exceeded", "prompt")

    def test_too_many_messages_are_refused(self, convert):
        request = ChatRequest(messages=messages(("user", "a"), ("assistant", "b"), ("user", "c")))
        assert convert(request, messages=3)
        assert refusal(convert, request, messages=2) == ("invalid_value", "messages")


class TestLength:
    def test_by_either_name_or_the_server_s_own(self, convert):
        assert convert(chat(), max_new_tokens=9).max_new_tokens == 9
        assert convert(chat(max_tokens=5)).max_new_tokens == 5
        assert convert(chat(max_completion_tokens=5)).max_new_tokens == 5
        assert convert(CompletionRequest(prompt="x", max_tokens=5)).max_new_tokens == 5

    def test_within_the_server_s_limit(self, convert, inference_model):
        most = inference_model.n_positions
        assert convert(chat(max_tokens=most)).max_new_tokens == most
        assert convert(chat(), max_tokens=7).max_new_tokens == 7  # the default does not go beyond it either
        assert refusal(convert, chat(max_tokens=most + 1)) == ("invalid_value", "max_tokens")
        assert refusal(convert, chat(max_completion_tokens=8), max_tokens=7) == (
            "invalid_value", "max_completion_tokens",
        )  # fmt: skip
        assert refusal(convert, chat(max_tokens=5, max_completion_tokens=5)) == ("invalid_value", "max_tokens")


def test_sampling_is_the_server_s_where_a_request_says_nothing(convert):
    assert convert(chat(), top_k=7).sampling == SamplingSettings(top_k=7)
    given = {"temperature": 0.0, "top_p": 0.5, "top_k": 0, "min_p": 0.2, "repetition_penalty": 1.5, "seed": -3}
    assert convert(chat(**given), top_k=7, temperature=1.5).sampling == SamplingSettings(**given)


def test_stop_strings_end_the_text(convert, inference_model):
    for request in (chat(stop=["kettle"]), CompletionRequest(prompt="x", stop=["kettle"])):
        detokenizer = convert(request).detokenizer
        text = "".join(detokenizer.push(id) for id in inference_model.tokenizer.encode("A hot kettle boils."))
        assert (text, detokenizer.is_stopped) == ("A hot ", True)


def test_clients_are_told_what_holds_where_a_request_says_nothing(convert, inference_model):
    settings = ServeSettings(top_k=7, temperature=1.5, max_new_tokens=9)
    converter = RequestConverter(inference_model, settings)
    sampling = {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0}
    assert converter.defaults == sampling | {"max_tokens": 9}
    assert converter.most_tokens == inference_model.n_positions
    request = convert(chat(), **settings.model_dump(exclude_unset=True))
    assert (request.sampling, request.max_new_tokens) == (SamplingSettings(**sampling), 9)
