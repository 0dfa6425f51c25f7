"""A sample of the campaign, on the quickstart's shape with random weights."""

import asyncio

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from malformed import KINDS
from serving_load import judge, report_malformed, report_streams, start, stream_all


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        server = start(["quickstart", "--random_init", "--slots", "8"])
    yield server
    assert server.stop() == 0


def stream(server, seconds, clients, rounds=1):
    """In further rounds where the machine is too busy for each client to get somewhere in the first."""
    samples, replies, left = [], 0, 0
    for _ in range(rounds):
        met = asyncio.run(stream_all(server.port, seconds, clients, samples, server))
        assert [error for client in met for error in client.errors] == []
        replies, left = replies + sum(c.replies for c in met), left + sum(c.left for c in met)
        if replies > clients and left and report_streams(met, samples, seconds) == []:
            return samples
    raise AssertionError(f"{replies} replies, {left} hung up on")


def test_many_clients_stream_at_once(server):
    samples = stream(server, 2, 12, rounds=20)
    assert samples[-1][2] < samples[0][2] + 40  # open files


def test_malformed_requests_are_refused_in_good_order(server):
    counts, problems = report_malformed(server, 5 * len(KINDS), seed=2)
    assert problems == []
    assert {400, 403, 404, 413, 415} <= counts.keys()
    assert counts[400] > counts[200]


def test_the_judge_sees_what_it_looks_for():
    from malformed import Malformed

    sent = Malformed("any", b"")
    shaped = b'HTTP/1.1 400 Bad\r\n\r\n{"error":{"message":"m","type":"t","param":null,"code":"c"}}'
    assert judge(sent, 400, shaped) is None
    assert judge(sent, 400, b"HTTP/1.1 400 Bad\r\n\r\nno")
    assert judge(sent, 500, shaped)
    assert judge(sent, 200, b"")
    assert judge(sent, None, b"")


@pytest.mark.campaign
def test_clients_stream_for_a_minute_and_nothing_leaks(server):
    samples = stream(server, 60, 64)
    settled = [sample[1] for sample in samples if sample[0] > 30]
    assert max(settled) < 1.1 * settled[0]


@pytest.mark.campaign
def test_thousands_of_malformed_requests(server):
    assert report_malformed(server, 4000, seed=3)[1] == []
