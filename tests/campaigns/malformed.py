"""Requests that are wrong in many ways, as bytes on the wire: made from a seed, so that each can be made again."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PATHS = (CHAT, TEXT)
CONTROLS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>")
SCALARS = (None, True, False, -1, 0, 3.5, 10**30, -(10**400), "", "x", "0.7", [], {}, [[]], [None], {"a": 1})

PARAMETERS = (
    *("messages", "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("seed", "stop", "max_tokens", "max_completion_tokens", "user", "n", "tools", "logprobs", "response_format"),
    *("logit_bias", "best_of", "prompt_cache_options", "metadata", "reasoning_effort", "prediction", "unheard_of"),
)


@dataclass(frozen=True)
class Malformed:
    """One request.

    `may_hang_up`: the server may also end the connection without a word. `may_succeed`: it may turn out to be in order.
    """

    kind: str
    data: bytes
    may_hang_up: bool = False
    may_succeed: bool = False


def request(
    body: bytes, path: str = CHAT, headers: tuple[str, ...] = ("Content-Type: application/json",), length: str = ""
) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    head.append(f"Content-Length: {length or len(body)}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def valid(draw: random.Random) -> dict:
    return {"messages": [{"role": "user", "content": "tea"}], "max_tokens": 1, "stream": draw.random() < 0.3}


# --- JSON that asks for what cannot be --------------------------------------------------------------------------------


def wrong_value(draw: random.Random) -> bytes:
    """One parameter with a value of the wrong kind or size."""
    parameters = valid(draw) | {draw.choice(PARAMETERS): draw.choice(SCALARS)}
    return request(json.dumps(parameters).encode())


def wrong_message(draw: random.Random) -> bytes:
    role = draw.choice([*CONTROLS, "tool", "User", "", "system", "developer", "assistant", *SCALARS])
    content = draw.choice([*SCALARS, [{"type": "text"}], [{"type": "image_url", "image_url": {"url": "x"}}], ["x"]])
    message = {"role": role, "content": content} | draw.choice([{}, {"name": "x"}, {"name": 5}, {"tool_calls": [1]}])
    return request(json.dumps({"messages": [message] * draw.choice([1, 2, 300]), "max_tokens": 1}).encode())


def not_finite(draw: random.Random) -> bytes:
    value = draw.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000])
    name = draw.choice(["temperature", "top_p", "seed", "max_tokens", "min_p", "unheard_of"])
    return request(b'{"messages":[{"role":"user","content":"x"}],"%s":%s}' % (name.encode(), value.encode()))


def too_long(draw: random.Random) -> bytes:
    text = draw.choice(["tea ", "%", " ", "\n", "🙂"]) * draw.randrange(3000, 20000)
    if draw.random() < 0.5:
        return request(json.dumps({"prompt": text, "max_tokens": 1}).encode(), TEXT)
    return request(json.dumps(valid(draw) | {"messages": [{"role": "user", "content": text}]}).encode())


# --- bytes that are no JSON, or no text -------------------------------------------------------------------------------


def lone_surrogate(draw: random.Random) -> bytes:
    surrogate = f"\\ud8{draw.randrange(256):02x}"
    places = [
        '{"messages":[{"role":"user","content":"%s"}]}',
        '{"messages":[{"role":"user","content":"x"}],"stop":"%s"}',
        '{"messages":[{"role":"user","content":"x"}],"model":"%s"}',
        '{"messages":[{"role":"user","content":"x"}],"%s":1}',
        '{"messages":[{"role":"%s","content":"x"}]}',
    ]
    return request((draw.choice(places) % surrogate).encode())


def not_utf8(draw: random.Random) -> bytes:
    bad = draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf"])
    return request(b'{"messages":[{"role":"user","content":"' + bad + b'"}]}')


def deep(draw: random.Random) -> bytes:
    depth = draw.choice([200, 5000, 60000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inside = opening * depth + b"1" + closing * draw.choice([0, depth])
    name = draw.choice([b"messages", b"stop", b"tools", b"unheard_of", b"logit_bias"])
    return request(draw.choice([inside, b'{"' + name + b'":' + inside + b"}"]))


def truncated(draw: random.Random) -> bytes:
    body = json.dumps(valid(draw)).encode()
    return request(body[: draw.randrange(len(body))])


def noise(draw: random.Random) -> bytes:
    return request(draw.randbytes(draw.randrange(1, 400)))


def mutated(draw: random.Random) -> bytes:
    """A valid body with a few of its bytes changed; it may still be valid."""
    body = bytearray(json.dumps(valid(draw)).encode())
    for _ in range(draw.randrange(1, 4)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return request(bytes(body))


def wrong_shape(draw: random.Random) -> bytes:
    bodies = [b"", b"null", b"[]", b'"x"', b"7", b"{}", b"{} {}", b'{"messages":[],"messages":[]}', b"\xef\xbb\xbf{}"]
    return request(draw.choice(bodies), draw.choice(PATHS))


# --- HTTP ----------------------------------------------------------------------------------------------------------


def wrong_headers(draw: random.Random) -> bytes:
    body = json.dumps(valid(draw)).encode()
    headers = [
        ("Content-Type: text/plain",),
        (),
        ("Content-Type: application/json", "Content-Type: text/plain"),
        ("Content-Type: application/json", "Content-Encoding: gzip"),
        ("Content-Type: application/json", "Origin: http://evil.example"),
        ("Content-Type: application/json", "Origin: null"),
        ("Content-Type: \xff\xfe",),
        ("Content-Type: application/x-www-form-urlencoded",),
    ]
    return request(body, headers=draw.choice(headers))


def wrong_host(draw: random.Random) -> bytes:
    hosts = ["evil.example", "localhost.evil.example", "evil.example:8000", "[::1", "127.0.0.1@evil.example", ":", ""]
    return request(b"{}").replace(b"Host: localhost", f"Host: {draw.choice(hosts)}".encode())


def wrong_path(draw: random.Random) -> bytes:
    paths = [
        "/",
        "/v1",
        "/v1/models/x",
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/health/..",
        "/page.css/../api.py",
    ]
    method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
    path = draw.choice([*paths, CHAT, "//", "/\\..\\..", "/v1/chat/completions/", "/x" * draw.randrange(1, 900)])
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def too_large(draw: random.Random) -> bytes:
    """Announced, and sent at least in part."""
    return request(b"x" * draw.choice([10, 300_000]), length=str(draw.choice([300_000, 50_000_000, 10**12])))


def too_large_in_chunks(draw: random.Random) -> bytes:
    """Not announced."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * draw.randrange(5, 9)


def no_http(draw: random.Random) -> bytes:
    lines = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(30),  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /\x00\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        draw.randbytes(draw.randrange(1, 200)) + b"\r\n\r\n",
    ]
    return draw.choice(lines)


def cut_off(draw: random.Random) -> bytes:
    """The client sends a part and no more."""
    whole = request(json.dumps(valid(draw)).encode())
    return whole[: draw.randrange(len(whole))]


KINDS: dict[Callable[[random.Random], bytes], dict[str, bool]] = {
    wrong_value: {"may_succeed": True},
    wrong_message: {"may_succeed": True},
    not_finite: {},
    too_long: {"may_succeed": True},  # white space around a message is not counted
    lone_surrogate: {},
    not_utf8: {},
    deep: {},
    truncated: {},
    noise: {},
    mutated: {"may_succeed": True},
    wrong_shape: {},
    wrong_headers: {},
    wrong_host: {},
    wrong_path: {"may_succeed": True},
    too_large: {},
    too_large_in_chunks: {},
    no_http: {"may_hang_up": True, "may_succeed": True},
    cut_off: {"may_hang_up": True},
}


def malformed(seed: int, number: int) -> Malformed:
    """Request `number` of a campaign: the kinds take turns."""
    kind = list(KINDS)[number % len(KINDS)]
    return Malformed(kind.__name__, kind(random.Random(f"{seed}:{number}")), **KINDS[kind])
