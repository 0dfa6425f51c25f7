"""Names on the hub are told from paths, and stand for one commit; the library is replaced, so no network is needed."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from facts import tells
from huggingface_hub import constants  # which the package alone does not load
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

import gpt2ft.hub
from gpt2ft.errors import NetworkError
from gpt2ft.hub import HubName, commit_of, hub_model, hub_name

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(answer): the hub answers so, or raises it; what it was asked is gathered in `hub.asked`."""
    commit_of.cache_clear()
    monkeypatch.setattr(gpt2ft.hub, "rely_on_cache_unless_reachable", lambda: "")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def hub(answer):
        def repo_info(self, repository, *, revision, repo_type, timeout):
            hub.asked.append((repository, revision, repo_type))
            if isinstance(answer, Exception):
                raise answer
            return type("Info", (), {"sha": answer})

        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)

    hub.asked = []
    yield hub
    commit_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", "", "", "")),
        ("microsoft/DialoGPT-small", ("microsoft/DialoGPT-small", "", "", "")),
        ("owner/name:test", ("owner/name", "", "test", "")),
        ("owner/name@v1.0", ("owner/name", "", "", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "", "", "refs/pr/3")),
        ("openai/gsm8k/main:test@abc", ("openai/gsm8k", "main", "test", "abc")),
        ("owner/name:train[:10%]", ("owner/name", "", "train[:10%]", "")),
        ("name", None), ("/owner/name", None), ("./owner/name", None), ("~/name", None), ("owner/", None), ("", None),
        ("runs/quickstart", None), ("here/name", None), ("owner/name:", None), ("a b/c", None),
    ],
)  # fmt: skip
def test_names(name, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_name(name) == (parts and HubName(*parts))
    assert bool(hub_model(name)) == bool(parts and not parts[1] and not parts[2])


def test_a_revision_is_looked_up_once_and_a_commit_never(hub):
    hub(COMMIT)
    for _ in range(2):
        assert commit_of("owner/name", "", "model") == COMMIT
        assert commit_of("owner/name", "v1", "dataset") == COMMIT
        assert commit_of("owner/name", "f" * 40, "dataset") == "f" * 40
    assert hub.asked == [("owner/name", "main", "model"), ("owner/name", "v1", "dataset")]


RESPONSE = SimpleNamespace(headers={}, request=None)


def test_without_a_network_the_cache_is_asked(hub, tmp_path):
    hub(ConnectionError("no network"))
    with pytest.raises(NetworkError) as raised:
        commit_of("owner/name", "", "dataset")
    assert tells(str(raised.value), "owner/name ... no network ... owner/name@COMMIT")
    (tmp_path / "datasets--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--owner--name" / "refs" / "main").write_text(COMMIT)
    assert commit_of("owner/name", "", "dataset") == COMMIT


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (lambda: RepositoryNotFoundError("404", response=RESPONSE), "owner/name ... model on the hub ... neither"),
        (lambda: RevisionNotFoundError("404", response=RESPONSE), "owner/name ... 'v1'"),
    ],
)
def test_what_is_not_on_the_hub(error, facts, hub):
    hub(error())
    with pytest.raises(NetworkError) as raised:
        commit_of("owner/name", "v1", "model")
    assert tells(str(raised.value), facts)
    assert raised.value.exit_code == 2
