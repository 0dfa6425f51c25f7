"""Puts a real server under load: many clients that stream, then thousands of malformed requests.

    python tests/campaigns/serving_load.py [--seconds 300] [--clients 64] [--malformed 10000] [-- SETTINGS]

It stands among the tests because it asserts, and exits with 1 where something did not hold; it is no test of its own
because it takes minutes and its figures are those of the machine. tests/campaigns/test_serving_load.py runs a sample.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import psutil
from malformed import Malformed, malformed

sys.path.append(str(Path(__file__).parents[1]))
import processes

DEFAULT = ["gpt2", "--random_init", "--slots", "64"]  # a slot for each client: see the README
TIMEOUT = 300.0  # seconds for one answer
WORDS = ["tea", "cup", "hot", "rain", "leaf", "water", "kettle", "cold", "sugar", "milk", "lemon", "why", "how", "when"]


@dataclass
class Server:
    """A launch/serve.py process."""

    process: processes.Started
    port: int

    @property
    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def files(self) -> int:
        return psutil.Process(self.process.pid).num_fds()

    def stop(self, log: Path | None = None) -> int:
        """Its exit code, once it has been told to stop; what it has logged goes to a file."""
        self.process.send_signal(signal.SIGTERM)
        ended = self.process.finish(code=None)
        if log is not None:
            log.write_text(ended.stderr)
        return ended.code


def start(arguments: list[str]) -> Server:
    """Starts it, and waits until it is ready."""
    kept = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    process = processes.start(["python", "launch/serve.py", *arguments, "--port", 0], **kept)
    server = Server(process, int(process.wait_for(r"http://[^ ]+:(\d+)")[1]))
    asyncio.run(_until_ready(server.port))
    return server


async def _until_ready(port: int) -> None:
    async with asyncio.timeout(2 * TIMEOUT):
        while (await exchange(port, b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))[0] != 200:
            pass


# --- clients that stream -------------------------------------------------------------------------------------------


@dataclass
class Client:
    """Counts and times of one client."""

    tokens: int = 0
    replies: int = 0
    left: int = 0
    first: list[float] = field(default_factory=list)  # seconds from the request to the first piece of text
    gaps: list[float] = field(default_factory=list)  # seconds between pieces
    errors: list[str] = field(default_factory=list)


@asynccontextmanager
async def connection(port: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def stream_once(port: int, client: Client, draw: random.Random, ends: float) -> None:
    """One reply of a conversation; a tenth of the clients hang up in the middle."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": _words(draw)} for i in range(draw.choice([1, 1, 3, 5]))]
    parameters = {"messages": turns, "max_tokens": draw.choice([16, 32, 64]), "stream": True}
    parameters |= {"stream_options": {"include_usage": True}, "temperature": draw.choice([0, 0.7])}
    body = json.dumps(parameters).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    leaves_after = draw.randrange(1, 10) if draw.random() < 0.1 else None
    began = last = monotonic()
    pieces, is_complete = 0, False
    async with connection(port) as (reader, writer):
        writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
        status = (await reader.readline()).split()[1:2]
        if status != [b"200"]:
            client.errors.append(f"status {status}")
            return
        while line := await reader.readline():
            if line.startswith(b'data: {"error"'):
                client.errors.append(line.decode()[:200])
            if line.startswith(b"data: [DONE]"):
                is_complete = True
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            if piece["choices"] and piece["choices"][0]["delta"].get("content"):
                now = monotonic()
                (client.gaps if pieces else client.first).append(now - last)
                last, pieces = now, pieces + 1
            if piece.get("usage"):
                client.tokens += piece["usage"]["completion_tokens"]
            if pieces == leaves_after or monotonic() > ends:
                client.tokens += pieces
                client.left += 1
                return
    client.replies += 1
    if not is_complete:
        client.errors.append(f"the stream broke off after {monotonic() - began:.1f} s")


def _words(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(3, 40)))


async def stream_all(port: int, seconds: float, num_clients: int, samples: list, server: Server) -> list[Client]:
    clients = [Client() for _ in range(num_clients)]
    ends = monotonic() + seconds

    async def run(number: int) -> None:
        draw = random.Random(number)
        while monotonic() < ends:
            try:
                await stream_once(port, clients[number], draw, ends)
            except (OSError, ValueError, IndexError) as error:
                clients[number].errors.append(f"{type(error).__name__}: {error}")

    async def watch() -> None:
        while True:
            began = monotonic()
            status, _ = await exchange(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            samples.append((monotonic() - ends + seconds, server.memory, server.files, monotonic() - began, status))
            await asyncio.sleep(min(1.0, seconds / 10))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(run(number) for number in range(num_clients)))
    watching.cancel()
    return clients


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def report_streams(clients: list[Client], samples: list, seconds: float) -> list[str]:
    """Prints the figures. Returns what should not have happened."""
    problems = [error for client in clients for error in client.errors]
    tokens = [client.tokens for client in clients]
    first = [value for client in clients for value in client.first]
    gaps = [value for client in clients for value in client.gaps]
    if not samples:
        return [*problems, "/health did not answer"]
    half_way = next((sample for sample in samples if sample[0] >= seconds / 2), samples[-1])
    memory = [sample[1] / 2**20 for sample in samples]
    replies, left = sum(client.replies for client in clients), sum(client.left for client in clients)
    print(
        f"{len(clients)} clients, {seconds:.0f} s: {len(problems)} errors, {replies} replies, {left} hung up on purpose"
    )
    print(f"  {sum(tokens)} tokens, {sum(tokens) / seconds:.1f} tokens/s")
    print(f"  tokens per client: min {min(tokens)}, median {quantile(tokens, 0.5)}, max {max(tokens)}")
    print(f"  first text: p50 {quantile(first, 0.5):.2f} s, p99 {quantile(first, 0.99):.2f} s")
    print(f"  between pieces: p50 {quantile(gaps, 0.5):.3f} s, p99 {quantile(gaps, 0.99):.3f} s")
    print(f"  memory: first {memory[0]:.0f} MiB, half-way {half_way[1] / 2**20:.0f} MiB, last {memory[-1]:.0f} MiB")
    print(f"  open files: first {samples[0][2]}, most {max(s[2] for s in samples)}, last {samples[-1][2]}")
    health = [sample[3] for sample in samples]
    print(f"  /health meanwhile: p50 {quantile(health, 0.5) * 1000:.0f} ms, slowest {max(health) * 1000:.0f} ms")
    if min(tokens) == 0:
        problems.append("a client made no progress")
    problems += [f"/health answered {sample[4]}" for sample in samples if sample[4] != 200]
    return problems


# --- malformed requests ----------------------------------------------------------------------------------------------


async def exchange(port: int, data: bytes, ends: bool = False) -> tuple[int | None, bytes]:
    """Sends bytes and reads all that comes: the status (None if nothing came) and the whole answer.

    Args:
        ends: say after the bytes that no more will come.
    """
    try:
        async with connection(port) as (reader, writer):
            with suppress(ConnectionError):  # it may hang up before it has read all
                writer.write(data)
                await writer.drain()
                if ends:
                    writer.write_eof()
            answer = b""
            with suppress(ConnectionError):
                while part := await reader.read(65536):
                    answer += part
    except ConnectionError:
        return None, b""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return (int(found[1]) if found else None), answer


def judge(sent: Malformed, status: int | None, answer: bytes) -> str | None:
    """Return the fault of an answer, if it has one."""
    if status is None:
        return None if sent.may_hang_up else "hung up without a word"
    if 200 <= status < 300:
        return None if sent.may_succeed else f"{status} for what cannot be"
    if not 400 <= status < 500:
        return f"{status}"
    try:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        is_shaped = error.keys() == {"message", "type", "param", "code"} and bool(error["message"])
    except (ValueError, KeyError, AttributeError):
        is_shaped = False
    return None if is_shaped else f"{status} without OpenAI's shape: {answer[-200:]!r}"


async def send_all(port: int, number: int, seed: int, together: int = 16) -> tuple[Counter, list[str]]:
    """Sends them, some at once. Returns how often each status came, and what is wrong."""
    counts, problems = Counter(), []
    numbers = iter(range(number))

    async def run() -> None:
        for index in numbers:
            sent = malformed(seed, index)
            try:
                async with asyncio.timeout(TIMEOUT):
                    status, answer = await exchange(port, sent.data, ends=sent.kind == "cut_off")
            except TimeoutError:
                problems.append(f"{sent.kind} {index}: hung")
                continue
            counts[status] += 1
            if wrong := judge(sent, status, answer):
                problems.append(f"{sent.kind} {index}: {wrong}")

    await asyncio.gather(*(run() for _ in range(together)))
    return counts, problems


def report_malformed(server: Server, number: int, seed: int) -> tuple[Counter, list[str]]:
    """Sends them, then a valid one. Prints the figures, and returns them as `send_all` does."""
    before, began = server.memory, monotonic()
    counts, problems = asyncio.run(send_all(server.port, number, seed))
    shown = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items(), key=lambda pair: str(pair[0])))
    print(f"{number} malformed requests in {monotonic() - began:.0f} s: {len(problems)} wrong answers; {shown}")
    print(
        f"  memory: {before / 2**20:.0f} MiB before, {server.memory / 2**20:.0f} MiB after; open files {server.files}"
    )
    body = json.dumps({"messages": [{"role": "user", "content": "Still there?"}], "max_tokens": 2}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    )
    status, _ = asyncio.run(exchange(server.port, head.encode() + b"Content-Type: application/json\r\n\r\n" + body))
    return counts, problems + ([] if status == 200 else [f"a valid request was then answered with {status}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    parser.add_argument("settings", nargs="*", help=f"of the server; default {' '.join(DEFAULT)}")
    given = parser.parse_args()
    server = start(given.settings or DEFAULT)
    problems = []
    try:
        if given.clients and given.seconds:
            samples = []
            clients = asyncio.run(stream_all(server.port, given.seconds, given.clients, samples, server))
            problems += report_streams(clients, samples, given.seconds)
        if given.malformed:
            problems += report_malformed(server, given.malformed, given.seed)[1]
    finally:
        code = server.stop(given.log)
    problems += [] if code == 0 else [f"the server ended with {code}"]
    print("\n".join(["all held" if not problems else f"{len(problems)} problems:", *problems[:50]]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
