"""Any GPT-2 on the hub is loaded by its name, at one commit; the library is replaced, so no network is needed."""

import json
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
from facts import tells

import gpt2ft.hub
from gpt2ft import quickstart
from gpt2ft.errors import NetworkError
from gpt2ft.hub import commit_of
from gpt2ft.model import pretrained
from gpt2ft.model.peft import read_base
from gpt2ft.model.pretrained import ADAPTER_CONFIG, ModelError
from gpt2ft.runs.loaded_model import find_model, load_model
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.sections import ModelSettings

NEWEST = "a" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The files on the hub under any name, those of the bundled model; `hub.downloaded` says what was asked for."""
    files, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(quickstart.MODEL, files)
    cache.mkdir()
    downloaded = []

    def snapshot_download(repository, *, revision, allow_patterns):
        for file in files.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
                downloaded.append((repository, revision, file.name))
        return str(cache)

    def repo_info(self, repository, *, revision, repo_type, timeout):
        assert repo_type == "model"
        return type("Info", (), {"sha": {"main": NEWEST, "refs/pr/3": "b" * 40}[revision]})

    commit_of.cache_clear()
    for module in (gpt2ft.hub, pretrained):
        monkeypatch.setattr(module, "rely_on_cache_unless_reachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    files.joinpath("pytorch_model.bin").touch()
    monkeypatch.chdir(tmp_path)
    yield type("Hub", (), {"files": files, "downloaded": downloaded})
    commit_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "commit"),
    [
        ("microsoft/DialoGPT-small", NEWEST),
        ("microsoft/DialoGPT-small@refs/pr/3", "b" * 40),
        (f"owner/name@{'c' * 40}", "c" * 40),
    ],
)
def test_any_gpt2_by_its_name(name, commit, hub):
    loaded = load_model(ModelSettings(path=name), seed=0)
    assert loaded.digest == load_model(ModelSettings(path="quickstart"), seed=0).digest
    assert loaded.source == name
    assert {(repository, revision) for repository, revision, _ in hub.downloaded} == {(name.partition("@")[0], commit)}
    assert "pytorch_model.bin" not in {file for *_, file in hub.downloaded}
    assert find_model(name)[1] is None


def test_with_random_weights_none_are_downloaded(hub):
    load_model(ModelSettings(path="owner/name", random_init=True), seed=0)
    assert {file for *_, file in hub.downloaded} >= {"config.json"}
    assert "model.safetensors" not in {file for *_, file in hub.downloaded}


def test_another_architecture_is_named_before_its_weights_are_downloaded(hub):
    config = json.loads((hub.files / "config.json").read_text())
    (hub.files / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="`model_type` must be 'gpt2', but is 'llama'"):
        load_model(ModelSettings(path="owner/name"), seed=0)
    assert {file for *_, file in hub.downloaded} == {"config.json"}


def test_an_adapter_or_a_gguf_file_is_no_model(hub):
    (hub.files / "config.json").unlink()
    with pytest.raises(ModelError, match=f"owner/name@{NEWEST[:8]} holds no config.json"):
        load_model(ModelSettings(path="owner/name"), seed=0)


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", "bert", "t5"])
def test_a_folder_of_another_architecture_is_named_as_what_it_is(kind, tmp_path):
    """Whatever its tokenizer is made of."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"]}))
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError) as raised:
        load_model(ModelSettings(path=str(tmp_path)), seed=0)
    assert tells(str(raised.value), f"`model_type` ... {kind!r}")
    assert "vocab.json" not in str(raised.value)


def test_pickled_weights_alone_are_refused_with_what_to_do(hub):
    (hub.files / "model.safetensors").unlink()
    with pytest.raises(ModelError) as raised:
        load_model(ModelSettings(path="owner/name"), seed=0)
    assert tells(str(raised.value), f"owner/name@{NEWEST[:8]} ... safetensors ... pickle ... owner/name@refs/pr/")


def test_without_a_network(hub, monkeypatch):
    def snapshot_download(*names, **settings):
        raise FileNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(NetworkError, match=f"owner/name@{NEWEST[:8]} could not be downloaded: no network"):
        load_model(ModelSettings(path="owner/name"), seed=0)


def test_a_published_model_by_its_full_name_is_the_pinned_one(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "download", lambda name: asked.append(name) or quickstart.MODEL)
    for name in ("distilgpt2", PUBLISHED_MODELS["distilgpt2"].repository):
        load_model(ModelSettings(path=name), seed=0)
    assert asked == ["distilgpt2"] * 2
    assert hub.downloaded == []


def test_what_is_no_name_on_the_hub_is_not_looked_for(hub):
    for path in ("runs/none", "DialoGPT-small", "owner/name:train", "owner/name/config"):
        with pytest.raises(ModelError) as raised:
            load_model(ModelSettings(path=path), seed=0)
        assert tells(str(raised.value), f"{path!r} ... OWNER/NAME")
    assert hub.downloaded == []


def test_the_base_of_an_adapter_is_read_at_its_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/name", "r": 1}
    for revision, base in ((None, "owner/name"), ("b" * 40, f"owner/name@{'b' * 40}")):
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {"revision": revision}))
        assert read_base(tmp_path) == base
