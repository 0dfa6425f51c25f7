"""A hub that is not there is given up after a moment, and its libraries rely on their caches."""

import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Event, Thread

import pytest
from huggingface_hub import constants

from gpt2ft import hub

MOMENT, LONG = 0.3, 300.0  # seconds


@pytest.fixture
def address():
    """address("silent"): of a server that is silent, gone, or knows nothing."""
    silent = socket.create_server(("127.0.0.1", 0))
    knows_nothing = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=knows_nothing.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = server.getsockname()[1]
    ports = {"silent": silent.getsockname()[1], "gone": gone, "knows nothing": knows_nothing.server_port}
    yield lambda kind: f"http://127.0.0.1:{ports[kind]}"
    silent.close()
    knows_nothing.shutdown()
    knows_nothing.server_close()


@pytest.mark.parametrize(
    ("kind", "seconds", "found"), [("silent", MOMENT, False), ("gone", LONG, False), ("knows nothing", LONG, True)]
)
def test_an_answer_is_waited_for_no_longer_than_said(kind, seconds, found, address):
    """Without end from the one that is silent, else."""
    assert hub.answers(address(kind), seconds) == found


def test_a_name_that_is_long_looked_up_is_not_waited_for(monkeypatch):
    given_up, looked_up = Event(), Event()

    def look_up(*_, **__):
        given_up.wait(LONG)
        looked_up.set()
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert not hub.answers("http://slow.invalid", MOMENT)
    assert not looked_up.is_set()
    given_up.set()
    assert looked_up.wait(LONG)


@pytest.mark.parametrize(("kind", "offline"), [("gone", True), ("knows nothing", False)])
def test_libraries_rely_on_their_caches_where_the_hub_is_gone(kind, offline, address, monkeypatch):
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address(kind))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", str(LONG))
    hub.rely_on_cache_unless_reachable.cache_clear()
    for _ in range(2):
        assert (address(kind) in hub.rely_on_cache_unless_reachable()) == offline
    assert constants.is_offline_mode() == datasets.config.HF_HUB_OFFLINE == offline
    hub.rely_on_cache_unless_reachable.cache_clear()
