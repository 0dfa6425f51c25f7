"""The server as a person starts and stops it: a process of its own."""

import http.client
import json
import signal
import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from processes import run

from gpt2ft.errors import SettingsError
from gpt2ft.runs import serve
from gpt2ft.settings.using import ChatSettings, ServeSettings

pytest.importorskip("uvicorn", reason="needs the extra [serve]")

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds until a test gives up
KEY = "0123456789abcdef"
BARE = {serve.KEY_VARIABLE: None}


@pytest.fixture
def start(tiny_weights_folder):
    """start(settings...): the process, and the address that it prints."""
    with ExitStack() as stack:

        def start(*settings):
            command = ["python", "launch/serve.py", tiny_weights_folder, "--port", 0, *settings]
            process = stack.enter_context(processes.start(command, **BARE))
            return process, process.wait_for(r"http://([\d.]+):(\d+)")

        yield start


def refused(*settings, **more):
    """Return the one line of a server that does not start."""
    ended = run(["python", "launch/serve.py", *settings], code=2, **(BARE | more))
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    return line


def ask(address, request):
    """The answer, up to its end."""
    connection = socket.create_connection((address[1], int(address[2])), timeout=TIMEOUT)
    connection.sendall(request)
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def wait_until_ready(address):
    while b"200 OK" not in ask(address, get("/ready")):
        pass


def asking_for_a_stream():
    body = b'{"prompt": "Once", "max_tokens": 200, "stream": true}'
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


@pytest.mark.parametrize(
    "signal_",
    [pytest.param(signal.SIGTERM, id="SIGTERM"), pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.long)],
)
def test_told_to_stop_it_finishes_its_replies_and_ends_well(start, signal_):
    process, address = start()
    wait_until_ready(address)
    connection = socket.create_connection((address[1], int(address[2])), timeout=TIMEOUT)
    connection.sendall(asking_for_a_stream())
    received = connection.recv(65536)
    process.send_signal(signal_)
    while data := connection.recv(65536):
        received += data
    assert b"data: [DONE]" in received
    assert "Traceback" not in process.finish().stderr


@pytest.mark.long
def test_a_second_signal_does_not_wait(start):
    process, address = start("--shutdown_timeout", "1000")
    wait_until_ready(address)
    connection = socket.create_connection((address[1], int(address[2])), timeout=TIMEOUT)
    connection.sendall(asking_for_a_stream())
    connection.recv(65536)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.finish()


def test_votes_on_two_models_are_what_dpo_reads(tiny_weights_folder, tmp_path, run_dpo, capsys):
    file = tmp_path / "votes.jsonl"
    both = ["--compare", tiny_weights_folder, tiny_weights_folder, "--votes", file, "--max_new_tokens", 5]
    with processes.start(["python", "launch/serve.py", *both, "--temperature", 2, "--port", 0], **BARE) as process:
        address = process.wait_for(r"http://([\d.]+):(\d+)")
        wait_until_ready(address)
        for vote in ("left", "right", "both_good", "both_bad"):
            pair = post(address, "/v1/pairs", {"messages": [{"role": "user", "content": "What is tea?"}]})
            post(address, "/v1/votes", {"pair": pair["id"], "vote": vote})
        process.send_signal(signal.SIGTERM)
        process.finish()
    assert len(file.read_text().splitlines()) == 4
    run_dpo(tmp_path / "run", steps=1, data={"train": [str(file)], "eval": []}, eval_every=None)
    assert " 2 pairs of replies to " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("left", "right", "is_compared"),
    [
        ("A drink.", " A leaf.\n", True),
        ("\n\nHuman: What?\n\nAssistant: Tea.", "User: Tea.<|end|>\x00\u2028", True),
        ("", "A drink.", False),
        ("A drink.", "A drink.", False),
        ("", " ", False),
    ],
)
@pytest.mark.parametrize("vote", ["left", "both_bad"])
def test_whatever_the_models_have_said_is_read(tmp_path, left, right, is_compared, vote):
    from gpt2ft.data.kinds import PREFERENCES
    from gpt2ft.data.preference_groups import preference_groups
    from gpt2ft.data.reading import ReadContext
    from gpt2ft.data.sources import open_source
    from gpt2ft.server.comparison.pairs import AskedPair, Contestant, OpenPair, Side
    from gpt2ft.server.reply import GenerationRequest, Reply
    from gpt2ft.settings.sections import FilterSettings, SamplingSettings

    prompt = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Yes?"), ("user", "What is tea?")]
    reply = Reply(GenerationRequest(SimpleNamespace(dropped_turns=0), SamplingSettings(), 9, (), None), print)
    contestant = Contestant(None, SimpleNamespace(model=SimpleNamespace(source="a", digest="b")))
    pair = OpenPair(AskedPair(prompt, [], []), Side(left, reply, contestant), Side(right, reply, contestant), 0.0)
    (tmp_path / "votes.jsonl").write_text(json.dumps(pair.record(vote)) + "\n")
    dropped = Counter()
    context = ReadContext("votes", FilterSettings())
    [shard] = open_source(str(tmp_path / "votes.jsonl"), PREFERENCES).shards()
    groups = [(tree, group) for tree in shard.trees(context) for group in preference_groups(tree, dropped)]
    assert len(groups) == (is_compared and vote == "left")
    for tree, group in groups:
        *said, chosen, rejected = [(tree.messages[index].role, tree.messages[index].text) for index in group]
        assert said == prompt
        assert [text for _, text in (chosen, rejected)] == [left.strip(), right.strip()]


def post(address, path, content):
    connection = http.client.HTTPConnection(address[1], int(address[2]), timeout=TIMEOUT)
    connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    answer = json.loads(response.read())
    connection.close()
    return answer


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"compare": ["a"], "votes": "x.jsonl"}, ["`compare`"]),
        ({"compare": ["a", "b", "c"], "votes": "x.jsonl"}, ["`compare`"]),
        ({"compare": ["a", "b"]}, ["`compare`", "`votes`"]),
        ({"votes": "x.jsonl"}, ["`votes`", "`compare`"]),
        ({"compare": ["a", "b"], "votes": ""}, ["`votes`", ".jsonl"]),
        ({"compare": ["a", "b"], "votes": "x.txt"}, ["`votes`", ".jsonl"]),
        ({"compare": ["a", "b"], "votes": "x.jsonl", "model": "c"}, ["`model`", "`compare`"]),
    ],
)
def test_two_models_and_a_file_belong_together(given, names):
    [problem] = ServeSettings(**given).problems()
    assert [name for name in names if name not in problem] == []


def test_a_file_that_cannot_hold_votes_is_refused_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "tea.jsonl"
    file.write_text("tea\n")
    for votes in (file, tmp_path, "/dev/full"):
        with pytest.raises(SettingsError, match=f"`votes` = {votes} .*"):
            serve.run(ServeSettings(compare=["missing", "missing"], votes=str(votes), port=0))
    assert file.read_text() == "tea\n"


def test_other_machines_are_let_in_with_a_key_alone(start, tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match=f"`host` = 0.0.0.0 .*{serve.KEY_VARIABLE}.*`api_key_file`"):
        serve.run(ServeSettings(host="0.0.0.0", port=0))
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    _, address = start("--host", "0.0.0.0", "--api_key_file", str(file))
    assert b"401 Unauthorized" in ask(address, get("/v1/models"))
    with_key = get("/v1/models").replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
    assert b"200 OK" in ask(address, with_key)


def test_a_port_that_is_taken_is_said(monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"`port` = {port} .*Address already in use"):
            serve.run(ServeSettings(port=port))


def test_a_model_that_cannot_say_a_token_is_not_served(tiny_weights_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in tiny_weights_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    next(tensor for name, tensor in weights.items() if name.endswith("ln_f.weight"))[:] = 3e38  # finite, but too large
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ended = run(["python", "launch/serve.py", folder, "--port", 0], code=2, **BARE)
    assert str(folder) in ended.stderr.splitlines()[-1]


def test_what_is_not_installed_is_said(tmp_path):
    """FastAPI hidden from this process, as if it had never been installed."""
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(name='fastapi')")
    line = refused("quickstart", "--random_init", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert line.startswith("error: ")
    assert "fastapi" in line
    assert "[serve]" in line


@pytest.mark.parametrize(
    ("in_file", "in_environment", "fact"),
    [
        (None, "short", "16"),
        (None, "x" * 15 + " " + "y", "space"),
        (None, "ü" * 20, "letters"),
        ("", None, "16"),
        (KEY, KEY, f"`api_key_file` .*{serve.KEY_VARIABLE}"),
    ],
)
def test_keys_that_protect_nothing_are_refused(tmp_path, monkeypatch, in_file, in_environment, fact):
    file = tmp_path / "key"
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    if in_environment is not None:
        monkeypatch.setenv(serve.KEY_VARIABLE, in_environment)
    if in_file is not None:
        file.write_text(in_file)
    settings = ServeSettings(api_key_file=None if in_file is None else str(file))
    with pytest.raises(SettingsError, match=fact):
        serve.read_key(settings)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.read_key(ServeSettings()) is None
    (tmp_path / "key").write_text(f" {KEY}\n")
    assert serve.read_key(ServeSettings(api_key_file=str(tmp_path / "key"))) == KEY
    with pytest.raises(SettingsError, match=str(tmp_path / "missing")):
        serve.read_key(ServeSettings(api_key_file=str(tmp_path / "missing")))
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY)
    assert serve.read_key(ServeSettings()) == KEY
    assert not [name for name in ServeSettings.model_fields if name in ("key", "api_key")]  # others can read argv


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "my-machine", "localhost.example", "")),
    ],
)
def test_which_addresses_are_this_machine_s_own(host, is_loopback):
    assert serve.is_loopback(host) == is_loopback


def test_the_defaults_of_sampling_are_those_of_a_chat():
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "precision")
    chat, served = ChatSettings(), ServeSettings()
    assert [getattr(chat, name) for name in names] == [getattr(served, name) for name in names]
