"""A server that runs in this process, and a model whose steps a test can hold up."""

import asyncio
import http.client
import json
import socket
import threading
from time import monotonic

TIMEOUT = 120  # seconds until a test gives up
N_POSITIONS = 128


class Gate:
    """Lets the model take one step each time it is opened; it stands open until it is shut."""

    def __init__(self):
        self._steps = threading.Semaphore(0)
        self._is_shut = False
        self.num_passed = 0

    def __call__(self, *_):
        if self._is_shut:
            self._steps.acquire()
        self.num_passed += 1

    def shut(self):
        self._is_shut = True

    def let_pass(self, steps=1):
        self._steps.release(steps)

    def open(self):
        self._is_shut = False
        self._steps.release(10**6)


class Running:
    """A server that runs, and the plainest ways to talk to it."""

    def __init__(self, server, listening, inference_model):
        self.server = server
        self.engine = server.engine
        self.tokenizer = inference_model.tokenizer
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.gate = Gate()
        self.hook = inference_model.gpt2.register_forward_pre_hook(self.gate)

    def ask(self, path="/v1/chat/completions", content=None, headers=None, method=None):
        """(status, headers, JSON or bytes) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        body = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
        given = ({"Content-Type": "application/json"} if body is not None else {}) | (headers or {})
        connection.request(method or ("GET" if body is None else "POST"), path, body, given)
        response = connection.getresponse()
        found = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(found) if is_json else found

    def until(self, is_met, what="what was waited for"):
        """Asks after the server's health, which lets its event loop go round, until `is_met()`."""
        end = monotonic() + TIMEOUT
        while not is_met():
            assert monotonic() < end, f"{what} did not come about within {TIMEOUT} s"
            self.ask("/health")

    def skip(self, seconds):
        """Has all timers of the server's connections believe that so much time has passed."""
        loop = next(iter(self.server.server_state.connections)).loop

        async def skip():
            loop.time = lambda: monotonic() + seconds

        asyncio.run_coroutine_threadsafe(skip(), loop).result(TIMEOUT)

    def until_ready(self):
        self.until(lambda: self.ask("/ready")[0] == 200, "readiness")

    def say(self, text="What is tea?", **parameters):
        """The JSON of a reply to one message."""
        status, _, answer = self.ask(content={"messages": [{"role": "user", "content": text}]} | parameters)
        assert status == 200, answer
        return answer

    def stream(self, text="What is tea?", **parameters):
        """A connection on which a streamed reply has been asked for."""
        content = {"messages": [{"role": "user", "content": text}], "stream": True} | parameters
        body = json.dumps(content).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        return self.raw(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)

    def raw(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
        connection.sendall(data)
        return connection


def read_until(connection, text):
    """Return what a connection brings, up to `text` at least, or up to its end where that is b""."""
    received = b""
    while not text or text not in received:
        data = connection.recv(65536)
        if not data:
            assert not text, f"the connection ended before {text!r}: {received[-500:]!r}"
            break
        received += data
    return received
