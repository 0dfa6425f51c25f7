"""`export --push` through huggingface_hub's own client, which speaks to a hub of a few lines on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants

import gpt2ft.hub
from gpt2ft.errors import NetworkError, SettingsError
from gpt2ft.runs import export
from gpt2ft.settings.using import ExportSettings

MODEL_FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "merges.txt", "vocab.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
}


class Hub:
    """Contents of a hub: repositories with their files, and whether they are private."""

    def __init__(self):
        self.files, self.private, self.refused, self.validated = {}, {}, None, []

    def answer(self, method, path, body):
        """(status, JSON) for a request."""
        path = path.partition("?")[0].removeprefix("/")
        repository = path.removeprefix("api/models/").partition("/preupload/")[0].partition("/commit/")[0]
        repository = repository.partition("/resolve/")[0].partition(".git/")[0].partition("/revision/")[0]
        if path == self.refused:
            return 403, {"error": "this key may not write"}
        if path == "api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "api/repos/create":
            name = f"{body['organization'] or 'me'}/{body['name']}"
            self.private.setdefault(name, body.get("visibility") == "private" or body.get("private") is True)
            self.files.setdefault(name, {})
            return 200, {"url": f"{constants.ENDPOINT}/{name}"}
        if path == "api/validate-yaml":
            self.validated.append(body)
            return 200, {}
        if repository not in self.private:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in body["files"]]
            return 200, {"files": modes}
        if "/commit/" in path:
            for line in body:
                if line["key"] == "file":
                    self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{constants.ENDPOINT}/{repository}/commit/1", "commitOid": "1" * 40}
        if "/resolve/" in path:
            return (200 if path.partition("/resolve/main/")[2] in self.files[repository] else 404), {}
        return 200, {"id": repository, "private": self.private[repository], "siblings": [], "sha": "1" * 40}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            content = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
            if "chunked" in self.headers.get("transfer-encoding", ""):
                content = ""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size).decode()
                    self.rfile.readline()
                self.rfile.readline()
            lines = [json.loads(line) for line in content.splitlines() if line.strip()]
            status, value = hub.answer(
                self.command, self.path, lines if "/commit/" in self.path else (lines or [{}])[0]
            )
            answer = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("x-error-code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
            self.send_header("content-type", "application/json")
            self.send_header("x-repo-commit", "1" * 40)
            self.send_header("etag", '"1"')
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_POST = do_HEAD = respond

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    url = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(gpt2ft.hub, "rely_on_cache_unless_reachable", lambda: "")
    monkeypatch.setenv("HF_TOKEN", "hf_key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def lora_run(run_sft, tiny_weights_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "run"
    run_sft(folder, 2, path=tiny_weights_folder, lora={"rank": 4, "alpha": 8.0})
    return folder


def push(model, output, name="tea", format="hf", **settings):
    export.run(ExportSettings(model=str(model), output=str(output), format=format, push=name, **settings))


def test_what_belongs_to_the_model_is_pushed_and_nothing_else(hub, lora_run, tmp_path, capsys):
    push(lora_run, tmp_path / "out")
    assert hub.private == {"me/tea": True}
    files = hub.files["me/tea"]
    assert set(files) == MODEL_FILES
    assert all(str(place).encode() not in content for content in files.values() for place in (lora_run, tmp_path))
    assert f"pushed    {constants.ENDPOINT}/me/tea, private" in capsys.readouterr().out
    ModelCard(files["README.md"].decode()).validate()  # as before the hub's own push_to_hub
    assert hub.validated[0]["repoType"] == "model"
    assert "base_model" not in hub.validated[0]["content"]


def test_a_card_that_is_there_stays_and_private_is_not_made_public(hub, lora_run, tmp_path, capsys):
    hub.private["team/tea"], hub.files["team/tea"] = False, {"README.md": b"Mine."}
    with pytest.raises(SettingsError, match="team/tea is there already and public"):
        push(lora_run, tmp_path / "out", "team/tea")
    assert not (tmp_path / "out").exists()
    push(lora_run, tmp_path / "out", "team/tea", public=True, dtype="float16")
    assert hub.files["team/tea"]["README.md"] == b"Mine."
    assert set(hub.files["team/tea"]) == MODEL_FILES
    assert "README.md that was there is kept" in capsys.readouterr().out
    hub.private["team/tea"] = True
    with pytest.raises(SettingsError, match="private"):
        push(lora_run, tmp_path / "again", "team/tea", public=True)
    push(lora_run, tmp_path / "new", "new", public=True)
    assert hub.private["me/new"] is False


@pytest.mark.parametrize("name", ["a/b/c", "", "-tea", "te a", "x--y"])
def test_names_that_are_none(name, hub, tmp_path):
    with pytest.raises(SettingsError, match="`push`"):
        push("nowhere", tmp_path / "out", name)
    assert hub.files == {}


def test_without_a_key_nothing_is_loaded_or_written(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(export, "find_model", None)
    with pytest.raises(SettingsError, match="key .* `hf auth login`, or set HF_TOKEN"):
        push("quickstart", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_key_or_a_network_that_fails(hub, lora_run, tmp_path, monkeypatch):
    hub.refused = "api/whoami-v2"
    with pytest.raises(SettingsError, match="403"):
        push("nowhere", tmp_path / "out")
    hub.refused = "api/repos/create"
    with pytest.raises(NetworkError, match="is written, but could not be pushed: .*`hf upload me/tea"):
        push(lora_run, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    monkeypatch.setattr(gpt2ft.hub, "rely_on_cache_unless_reachable", lambda: "HF_HUB_OFFLINE is set")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        push("nowhere", tmp_path / "again")


@pytest.mark.parametrize("model", ["", "checkpoints/step-00000002"])
def test_an_adapter_on_a_base_of_this_machine_is_not_pushed(model, hub, lora_run, tmp_path):
    with pytest.raises(SettingsError, match="stands on .* this machine alone: .*--format hf"):
        push(lora_run / model, tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()
    assert hub.files == {}


def test_public_needs_push():
    settings = ExportSettings(format="hf", output="out", public=True)
    assert "`public`" in next(settings.problems())
