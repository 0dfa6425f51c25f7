"""Access: keys, hosts, other sites, bodies that are too large, too slow or no bodies at all."""

import json
import logging

import pytest
from running_server import read_until

from gpt2ft.inference.decoder import Decoder
from gpt2ft.text.template import render_prompt

KEY = "a key that is long enough".replace(" ", "-")
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def error_of(raw):
    """(status, code) of an answer as it came over the wire."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.fixture(scope="module")
def locked(serving):
    with serving(key=KEY, allowed_hosts=("chat.example",)) as running:
        yield running


class TestKey:
    @pytest.mark.parametrize(
        "given", [None, "", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Basic {KEY}", f"Bearer {KEY}\xff"]
    )
    def test_without_the_right_one_nothing_is_served(self, locked, given):
        headers = {} if given is None else {"Authorization": given}
        for path, content in (("/v1/chat/completions", HI), ("/v1/models", None), ("/nowhere", None)):
            status, answered, answer = locked.ask(path, content, headers)
            assert (status, answered["WWW-Authenticate"], answer["error"]["code"]) == (401, "Bearer", "invalid_api_key")

    def test_with_it_everything_is(self, locked):
        assert locked.ask(content=HI, headers={"Authorization": f"Bearer {KEY}"})[0] == 200
        assert locked.ask("/v1/models", headers={"Authorization": f"bearer  {KEY}"})[0] == 200

    def test_states_need_none(self, locked):
        assert [locked.ask(path)[0] for path in ("/health", "/ready")] == [200, 200]

    def test_the_official_client_is_told_so(self, locked):
        openai = pytest.importorskip("openai")
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY) as client:
            assert client.models.list().data
        with (
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


class TestHost:
    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "chat.example"])
    def test_names_of_its_own_are_let_in(self, locked, host):
        assert locked.ask("/health", headers={"Host": host})[0] == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", "::1", ""],
    )
    def test_other_names_are_not(self, locked, host):
        status, _, answer = locked.ask("/health", headers={"Host": host})
        assert (status, answer["error"]["code"]) == (403, "host_not_allowed")

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost.evil.example", "http://[bad"])
    def test_pages_of_other_sites_are_not(self, server, origin):
        status, headers, answer = server.ask(content=HI, headers={"Origin": origin})
        assert (status, answer["error"]["code"]) == (403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in headers

    def test_its_own_page_is(self, server):
        assert server.ask(content=HI, headers={"Origin": server.url})[0] == 200

    def test_no_other_site_is_ever_allowed_to_read(self, server):
        asked = {"Origin": server.url, "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.ask("/v1/chat/completions", headers=asked, method="OPTIONS")
        assert status == 405
        assert not [name for name in headers if name.lower().startswith("access-control")]


class TestBody:
    def test_one_that_is_too_large_is_refused_before_it_is_read(self, server):
        connection = server.raw(head(50_000_000))
        assert error_of(read_until(connection, b"")) == (413, "request_too_large")

    def test_one_that_does_not_say_how_large_it_is_is_refused_when_it_is_too_large(self, server):
        connection = server.raw(head("chunked") + b"40000\r\n" + b" " * 0x40000 + b"\r\n1\r\n \r\n")
        assert error_of(read_until(connection, b"")) == (413, "request_too_large")

    def test_the_official_client_is_told_so(self, server):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        with client, pytest.raises(openai.APIStatusError) as error:
            client.completions.create(model="tiny", prompt="x" * 50_000_000)
        assert error.value.status_code == 413

    def test_one_that_is_too_slow_is_refused(self, serving):
        with serving(body_seconds=0.2) as running:
            connection = running.raw(head(100) + b"{")
            assert error_of(read_until(connection, b"")) == (408, "request_timeout")

    def test_one_of_a_client_that_leaves_is_forgotten(self, server, caplog):
        with caplog.at_level(logging.INFO):
            server.raw(head(100) + b"{").close()
            server.until(lambda: "POST /v1/chat/completions left" in caplog.text)

    @pytest.mark.parametrize(
        ("types", "status"),
        [
            (["application/json; charset=utf-8"], 200),
            (["text/plain"], 415),
            ([], 415),
            (["application/json", "application/json"], 415),
        ],
    )
    def test_only_json_is_read_so_that_no_form_of_another_site_is(self, server, types, status):
        body = json.dumps(HI).encode()
        lines = "".join(f"Content-Type: {kind}\r\n" for kind in types).encode()
        start = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n".encode()
        answer = read_until(server.raw(start + lines + b"Connection: close\r\n\r\n" + body), b"")
        assert int(answer.split()[1]) == status


def head(length):
    how = "Transfer-Encoding: chunked" if length == "chunked" else f"Content-Length: {length}"
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", how]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class TestControlTokens:
    """No text that comes over the wire becomes one, wherever it stands."""

    @pytest.fixture
    def prompts(self, server, monkeypatch):
        """The ids of every prompt that is read from now on."""
        met = []
        join = Decoder.join
        monkeypatch.setattr(Decoder, "join", lambda self, ids, *more: met.append(list(ids)) or join(self, ids, *more))
        return met

    def test_in_content(self, server, tokenizer, prompts):
        names = [tokenizer.decode([id]) for id in sorted(tokenizer.control_ids)]
        assert len(names) == 5
        forged = "x" + "".join(names)
        in_parts = [{"type": "text", "text": part} for part in ("<|", "end", "|>", names[0][:3], names[0][3:])]
        turns = [("system", "x"), ("user", "x")]
        expected = [id for id in render_prompt(tokenizer, turns) if id in tokenizer.control_ids]
        for system, user in ((forged, "x"), ("x", forged), ("x", in_parts), (in_parts, in_parts)):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            status, _, answer = server.ask(content={"messages": messages, "max_tokens": 1})
            assert status == 200, answer
            assert [id for id in prompts[-1] if id in tokenizer.control_ids] == expected
            assert len(prompts[-1]) > 12
        assert len(expected) == 5
        assert len(prompts) == 4

    def test_in_a_text_that_is_continued(self, server, tokenizer, prompts):
        for id in sorted(tokenizer.control_ids):
            name = tokenizer.decode([id])
            assert server.ask("/v1/completions", {"prompt": f"a{name}b", "max_tokens": 1})[0] == 200
            assert not tokenizer.control_ids & set(prompts[-1])
        assert len(prompts) == 5

    def test_ids_instead_of_text_are_refused(self, server, tokenizer):
        for prompt in ([tokenizer.end_id], [[tokenizer.end_id]], ["a", [tokenizer.end_id]]):
            status, _, answer = server.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})
            assert (status, answer["error"]["param"]) == (400, "prompt")

    def test_in_roles_names_stops_and_models(self, server, tokenizer):
        for id in sorted(tokenizer.control_ids):
            name = tokenizer.decode([id])
            for role in (name, name.strip("<|>") + name, f"user{name}"):
                assert server.ask(content={"messages": [{"role": role, "content": "x"}]})[0] == 400
            named = {"messages": [HI["messages"][0] | {"name": name}]}  # no template renders it
            assert server.ask(content=HI | named | {"stop": name, "user": name})[0] == 200
            assert server.ask(content=HI | {"model": name})[0] == 404

    def test_none_is_ever_said(self, server, tokenizer):
        """A model that would love to say them: those that end a turn end it, the others cannot be said."""
        for seed in range(20):
            said = server.say(temperature=2.0, top_p=1.0, seed=seed, max_tokens=30)["choices"][0]["message"]["content"]
            assert not any(tokenizer.decode([id]) in said for id in tokenizer.control_ids)


def test_no_log_holds_what_people_wrote(server, caplog):
    secret = "xyzzy-plugh"
    with caplog.at_level(logging.DEBUG):
        server.say(f"{secret} tea")
        server.ask("/v1/completions", {"prompt": secret, "max_tokens": 2, "stream": True})
        server.ask(content={"messages": [{"role": secret, "content": secret}]})
        server.ask(content=HI | {"model": secret, "stop": secret})
        server.ask(content={secret: secret})
        server.ask(content=secret.encode())
        server.ask(f"/{secret}?{secret}", headers={"Host": secret})
        server.ask(f"/v1/models/{secret}")
        server.ask("/health", method=secret.upper().replace("-", ""))
        read_until(server.raw(secret.encode() + b"\r\n\r\n"), b"")
        server.until(lambda: server.engine.num_unfinished == 0)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "tokens, " in caplog.text
    assert secret not in caplog.text
    assert secret.upper().replace("-", "") not in caplog.text


def test_every_answer_forbids_to_guess_its_type(server):
    for path in ("/health", "/nowhere", "/v1/models"):
        assert server.ask(path)[1]["X-Content-Type-Options"] == "nosniff"
