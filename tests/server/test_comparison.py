"""Pairs and votes over the wire: who is asked, what is told, and what is stored."""

import json
import os
import threading
from collections import Counter
from time import monotonic

import pytest
from running_server import TIMEOUT

KEY = "0123456789abcdef"
QUESTION = [{"role": "user", "content": "What is tea?"}]


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def server(serving, votes):
    with serving(slots=2, queue=8, max_new_tokens=12, votes=votes) as running:
        yield running


def pair_of(server, messages=QUESTION, **parameters):
    status, _, answer = server.ask("/v1/pairs", {"messages": messages} | parameters)
    assert status == 200, answer
    return answer


def vote(server, pair, choice="left"):
    """(status, answer)"""
    status, _, answer = server.ask("/v1/votes", {"pair": pair["id"], "vote": choice})
    return status, answer


def lines(votes):
    return [json.loads(line) for line in votes.read_text().splitlines()]


def test_a_vote_is_stored_with_all_that_led_to_it(server, votes):
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    pair = pair_of(server, messages, seed=4, temperature=0.9, stop="é")
    before = pair["votes"]
    assert vote(server, pair, "right") == (200, {"object": "vote", "pair": pair["id"], "votes": before + 1})
    line = lines(votes)[-1]
    assert line["prompt"] == messages
    assert line["chosen"] == [{"role": "assistant", "content": pair["right"]["content"]}]
    assert line["rejected"] == [{"role": "assistant", "content": pair["left"]["content"]}]
    assert line["score_chosen"] > line["score_rejected"]
    facts = line["metadata"]
    assert facts["vote"] == facts["chosen"]["side"] == "right"
    assert {facts[reply]["digest"] for reply in ("chosen", "rejected")} == {"0123456789abcdef", "fedcba9876543210"}
    assert {facts[reply]["seed"] for reply in ("chosen", "rejected")} == {4, 5}
    expected = {"temperature": 0.9, "max_tokens": 12, "stop": ["é"]}
    assert {name: facts["settings"][name] for name in expected} == expected
    assert "127.0.0.1" not in json.dumps(line)


def test_each_reply_is_that_of_the_model_that_the_file_names(server, votes, alone):
    """The first one's, which the test knows by itself, stands on either side."""
    text, *_ = alone([("user", "What is tea?")], 12, temperature=0)
    sides = Counter()
    while len(sides) < 2:
        pair = pair_of(server, temperature=0)
        assert pair["left"]["content"] != pair["right"]["content"]
        vote(server, pair)
        facts = lines(votes)[-1]["metadata"]
        first = next(reply for reply in (facts["chosen"], facts["rejected"]) if reply["model"] == "tiny")
        assert pair[first["side"]]["content"] == text
        sides[first["side"]] += 1
        assert sum(sides.values()) < 60


def test_nothing_tells_which_model_is_which_before_the_vote(server):
    pair = pair_of(server)
    assert set(pair) == {"id", "object", "created", "left", "right", "dropped_turns", "votes"}
    assert set(pair["left"]) == set(pair["right"]) == {"content", "finish_reason", "tokens"}
    told = json.dumps(server.ask("/v1/models")[2])
    assert not [word for word in ("tiny", "another", "0123456789", "fedcba") if word in told]
    for path in ("/v1/chat/completions", "/v1/completions"):  # where one could ask them again
        status, _, answer = server.ask(path, {"messages": QUESTION})
        assert (status, answer["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(("choice", "score"), [("both_good", 1), ("both_bad", 0)])
def test_replies_between_which_nobody_chose_have_equal_scores(server, votes, choice, score):
    vote(server, pair_of(server), choice)
    line = lines(votes)[-1]
    assert line["score_chosen"] == line["score_rejected"] == score
    assert line["metadata"]["vote"] == choice


def test_the_server_tells_how_many_votes_there_are(server, votes):
    [model] = server.ask("/v1/models")[2]["data"]
    assert model["votes"] == pair_of(server)["votes"] == len(lines(votes))
    assert model["id"] == "comparison"
    assert server.ask("/v1/models/comparison")[2]["votes"] == model["votes"]


def test_a_pair_has_one_vote_however_many_are_cast_at_once(server, votes):
    pairs, before = [pair_of(server) for _ in range(4)], len(lines(votes))
    answers = Counter()
    threads = [threading.Thread(target=lambda pair=pair: answers.update([vote(server, pair)[0]])) for pair in pairs * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(answers) == {200: 4, 409: 16}
    assert len(lines(votes)) == before + 4


def test_a_vote_for_a_pair_that_is_gone_is_told_why(serving, server, votes, tmp_path):
    pair = pair_of(server)
    before = len(lines(votes))
    assert refused(*vote(server, {"id": "pair-0"})) == (404, "pair_not_found")
    vote(server, pair)
    assert refused(*vote(server, pair, "right")) == (409, "pair_already_voted")
    assert len(lines(votes)) == before + 1
    with serving(votes=tmp_path / "votes.jsonl", vote_timeout=1e-9, max_new_tokens=1) as hasty:
        assert refused(*vote(hasty, pair_of(hasty))) == (410, "pair_expired")
        assert (tmp_path / "votes.jsonl").read_bytes() == b""


def test_the_oldest_pairs_give_way(server, monkeypatch):
    monkeypatch.setattr("gpt2ft.server.comparison.pairs.MOST_OPEN", 1)
    old, new = pair_of(server), pair_of(server)
    assert refused(*vote(server, old)) == (410, "pair_expired")
    assert vote(server, new)[0] == 200
    monkeypatch.setattr("gpt2ft.server.comparison.pairs.MOST_REMEMBERED", 1)
    vote(server, pair_of(server))
    assert refused(*vote(server, new)) == (409, "pair_already_voted")  # one goes for each that comes


def refused(status, answer):
    return status, answer["error"]["code"]


def test_a_full_disk_loses_nothing_and_the_vote_can_be_cast_again(server, votes, monkeypatch):
    pair, before = pair_of(server), votes.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert refused(*vote(server, pair)) == (507, "vote_not_stored")
    assert votes.read_bytes() == before
    assert vote(server, pair)[0] == 200
    assert votes.read_bytes().startswith(before)
    assert votes.read_bytes().count(b"\n") == before.count(b"\n") + 1


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        ({"pair": "x"}, 400, "vote"),
        ({"vote": "left"}, 400, "pair"),
        ({"pair": "x", "vote": "up"}, 400, "vote"),
        ({"pair": 1, "vote": "left"}, 400, "pair"),
        ({"pair": ["x"], "vote": "left"}, 400, "pair"),
        ({"pair": "x", "vote": "left", "who": "me"}, 400, "who"),
        (b"[]", 400, None),
        (b'{"pair": "x", "pair": "y", "vote": "left"}', 400, None),
    ],
)
def test_what_is_no_vote_is_refused_by_name(server, content, status, param):
    answered, _, answer = server.ask("/v1/votes", content)
    assert (answered, answer["error"]["param"]) == (status, param)


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]


@pytest.mark.parametrize(
    "messages",
    [
        turns("What is tea?", "A drink."),
        turns("What is tea?", "", "And cold?"),
        turns(" "),
        turns("What is tea?", "A drink.")[1:],
        [*turns("What is tea?"), {"role": "system", "content": "Be brief."}, *turns("And cold?")],
        [{"role": "system", "content": "Be brief."}],
        [{"role": "system", "content": ""}, *turns("What is tea?", "A drink.")[1:], *turns("And cold?")],
    ],
)
def test_what_training_would_not_read_whole_is_no_prompt(server, messages):
    status, _, answer = server.ask("/v1/pairs", {"messages": messages})
    assert (status, answer["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("parameters", "status", "param"),
    [({"stream": True}, 400, "stream"), ({"max_tokens": 10**6}, 400, "max_tokens"), ({"model": "tiny"}, 404, "model")],
)
def test_the_parameters_of_a_pair_are_those_of_a_reply(server, parameters, status, param):
    answered, _, answer = server.ask("/v1/pairs", {"messages": QUESTION} | parameters)
    assert (answered, answer["error"]["param"]) == (status, param)


def test_pairs_and_votes_are_guarded_like_all_else(serving, tmp_path):
    with serving(key=KEY, votes=tmp_path / "votes.jsonl", body_bytes=200) as running:
        for path, content in (("/v1/pairs", {"messages": QUESTION}), ("/v1/votes", {"pair": "x", "vote": "left"})):
            right = {"Authorization": f"Bearer {KEY}"}
            assert running.ask(path, content)[0] == 401
            assert running.ask(path, content, right | {"Origin": "http://evil.example"})[0] == 403
            assert running.ask(path, content, right | {"Host": "evil.example"})[0] == 403
            assert running.ask(path, content, right | {"Content-Type": "text/plain"})[0] == 415
            assert running.ask(path, content | {"user": "x" * 200}, right)[0] == 413
            assert running.ask(path, headers=right)[0] == 405
            assert running.ask(path, content, right)[0] in (200, 404)


def test_with_one_model_there_are_no_pairs(serving):
    with serving() as running:
        assert running.ask("/v1/pairs", {"messages": QUESTION})[0] == 404
        assert running.ask("/v1/votes", {"pair": "x", "vote": "left"})[0] == 404
        assert "votes" not in running.ask("/v1/models")[2]["data"][0]


def test_who_hangs_up_frees_both_slots(server):
    server.gate.shut()
    body = json.dumps({"messages": QUESTION, "max_tokens": 100}).encode()
    head = f"POST /v1/pairs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection = server.raw(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    server.until(lambda: server.engine.num_unfinished > 0, "the replies")
    connection.close()
    server.gate.open()
    server.until(lambda: server.engine.num_unfinished == 0, "the end of both replies")


def test_a_pair_that_only_one_engine_takes_is_given_up_by_it(server, monkeypatch):
    first, second = server.engine.all
    monkeypatch.setattr(second, "_capacity", 0)
    status, headers, _ = server.ask("/v1/pairs", {"messages": QUESTION})
    assert status == 429
    assert headers["Retry-After"]
    server.until(lambda: first.num_unfinished == 0, "the end of the other reply")


def test_a_damaged_model_beside_a_sound_one_is_no_comparison(serving, inference_model, tmp_path):
    from copy import deepcopy

    damaged = deepcopy(inference_model.gpt2)
    damaged.wpe.weight.data[:] = float("nan")
    with serving(gpt2=damaged, ready=False, votes=tmp_path / "votes.jsonl") as running:
        end = monotonic() + TIMEOUT
        while not running.server.has_failed:
            assert monotonic() < end
