"""The official client works against the server as against its own, and what it gets is what the model says alone."""

import random
import threading

import pytest

openai = pytest.importorskip("openai")

IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
WORDS = ["tea", "cup", "hot", "rain", "leaf", "water", "kettle", "cold", "sugar", "milk", "lemon"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def test_a_reply_is_the_one_that_the_model_gives_alone(client, alone):
    turns = [("system", "Be brief."), ("user", "What is tea?"), ("assistant", "A hot drink."), ("user", "And cold?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text, prompt, tokens, finish = alone(turns, 20, temperature=0)
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, finish)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, tokens)
    assert reply.usage.total_tokens == prompt + tokens
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    assert tokens > 3


def test_streamed_pieces_together_are_the_whole_reply(client, alone):
    parameters = {"temperature": 0}
    text, prompt, tokens, finish = alone([("user", "What is tea?")], 30, **parameters)
    with client.chat.completions.create(
        model="tiny",
        messages=user("What is tea?"),
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
        **parameters,
    ) as stream:
        first, *pieces, end, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(piece.choices[0].delta.content for piece in pieces) == text
    assert end.choices[0].finish_reason == finish
    assert not end.choices[0].delta.content
    assert (usage.choices, usage.usage.prompt_tokens, usage.usage.completion_tokens) == ([], prompt, tokens)
    assert len({piece.id for piece in (first, *pieces, end, usage)}) == 1
    assert tokens > 3


def test_a_text_is_continued_as_a_document(client, inference_model):
    from gpt2ft.chat.session import Session
    from gpt2ft.inference.sampling import GREEDY

    expected = "".join(Session(inference_model, GREEDY, 20).complete("The kettle"))
    reply = client.completions.create(model="tiny", prompt="The kettle", max_tokens=20, temperature=0)
    assert reply.choices[0].text == expected != ""
    assert reply.object == "text_completion"
    stream = client.completions.create(model="tiny", prompt="The kettle", max_tokens=20, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == expected


def test_whoever_comes_and_goes_each_reply_is_as_if_alone(client, alone, server):
    """60 requests in 3 slots, greedy and sampled, some of whose readers leave early."""
    draw = random.Random(5)
    met = {"stop": 0, "length": 0, "left": 0, "together": 0}
    problems = []
    with_slots = threading.Semaphore(9)
    patient = client.with_options(max_retries=10)  # the server may not have noticed yet that others have left

    def request(number):
        own = random.Random(number)
        turns = [("user", " ".join(own.choices(WORDS, k=own.randrange(1, 30))))]
        most = own.randrange(1, 40)
        sampling = own.choice(
            [{"temperature": 0}, {"temperature": 1.2, "seed": number}, {"top_p": 0.5, "seed": number}]
        )
        text, _, _, finish = alone(turns, most, **sampling)
        leaves = own.random() < 0.2
        said = ""
        with (
            with_slots,
            patient.chat.completions.create(
                model="tiny", messages=user(turns[0][1]), max_tokens=most, stream=True, **sampling
            ) as stream,
        ):
            for piece in stream:
                met["together"] += server.engine.num_running > 1
                said += piece.choices[0].delta.content or ""
                if leaves and said:
                    met["left"] += 1
                    if not text.startswith(said):
                        problems.append((number, said, text))
                    return
        met[finish] += 1
        if (said, piece.choices[0].finish_reason) != (text, finish):
            problems.append((number, said, text))

    threads = [threading.Thread(target=request, args=(number,)) for number in range(60)]
    draw.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert sum(met[name] for name in ("stop", "length", "left")) == 60
    assert min(met.values()) > 3, met


def test_stop_strings_end_a_reply_wherever_tokens_are_cut(client, alone):
    text, _, tokens, _ = alone([("user", "What is tea?")], 30, temperature=0)
    parameters = {"model": "tiny", "messages": user("What is tea?"), "max_tokens": 30, "temperature": 0}
    places = range(3, len(text) - 4, 5)
    assert len(places) > 5
    for place in places:
        stop = text[place : place + 4]
        expected = text[: text.index(stop)]
        reply = client.chat.completions.create(**parameters, stop=["never said", stop])
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (expected, "stop")
        assert reply.usage.completion_tokens <= tokens
        streamed = client.chat.completions.create(**parameters, stop=stop, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == expected


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4/x")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 129}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"extra_body": {"tempature": 1}}, "tempature", "unknown_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0].type", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name", "invalid_value"),
        ({"messages": [{"role": "system", "content": ""}]}, "messages", "invalid_value"),
        ({"prompt_cache_key": 5}, "prompt_cache_key", "invalid_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"messages": user("tea " * 300)}, "messages", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, parameters, param, code):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**({"model": "tiny", "messages": user("Hi")} | parameters))
    assert (error.value.param, error.value.code) == (param, code)
    assert error.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(client):
    client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "tea?"}]},
            {"role": "assistant", "content": "A drink.", "refusal": None, "tool_calls": []},
            {"role": "user", "content": "Hm.", "name": "Ann"},
            {"role": "user", "content": "And cold?"},
        ],
        n=1,
        logprobs=False,
        presence_penalty=0.0,
        frequency_penalty=0,
        tools=[],
        response_format={"type": "text"},
        stop=None,
        user="somebody",
        safety_identifier="0123abcd",
        prompt_cache_key="conversation-1",
        metadata={"topic": "tea"},
        reasoning_effort="none",
        verbosity="medium",
        max_tokens=1,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    )


def test_a_developer_is_the_system_and_a_list_of_one_prompt_is_that_prompt(client):
    greedy = {"model": "tiny", "max_tokens": 20, "temperature": 0}

    def said(role):
        messages = [{"role": role, "content": "Be brief."}, *user("What is tea?")]
        return client.chat.completions.create(messages=messages, **greedy).choices[0].message.content

    def continued(prompt):
        return client.completions.create(prompt=prompt, **greedy).choices[0].text

    assert said("developer") == said("system") != said("user")
    assert continued(["The kettle"]) == continued("The kettle") != ""
    with pytest.raises(openai.BadRequestError) as error:
        continued(["The kettle", "Tea is"])
    assert error.value.param == "prompt"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=user("Hi"))
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_turns_that_do_not_fit_give_way_and_it_is_said(client, alone):
    turns = [(role, f"{word} " * 12) for word in WORDS[:5] for role in ("user", "assistant")] + [("user", "And now?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    answer = client.chat.completions.with_raw_response.create(
        model="tiny", messages=messages, max_tokens=30, temperature=0
    )
    reply = answer.parse()
    dropped = reply.dropped_turns
    assert 0 < dropped < 10
    assert answer.headers["x-dropped-turns"] == str(dropped)
    kept = [(role, text.strip()) for role, text in turns[dropped:]]
    assert kept[0][0] == "user"
    assert reply.choices[0].message.content == alone(kept, 30, temperature=0)[0]
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=30, stream=True)
    assert next(iter(stream)).dropped_turns == dropped
    stream.close()
