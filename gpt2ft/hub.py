"""Names on the Hugging Face hub, `owner/name`, the commit that a branch, a tag or nothing stands for, and uploads.

Where the hub cannot be reached, its libraries, which would try again for half a minute, look into their caches at once.
"""

import os
import re
import ssl
import sys
from functools import cache, lru_cache
from pathlib import Path
from threading import Thread
from typing import Literal, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from gpt2ft.errors import NetworkError, SettingsError

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(/[^:@]+)?(:[^@]+)?(@.+)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
SECONDS_TO_ANSWER = 2.0


class HubName(NamedTuple):
    """Parts of `owner/name[/config][:split][@revision]`; what is not given is empty."""

    repository: str
    config: str
    split: str
    revision: str


def hub_name(name: str) -> HubName | None:
    """Return the parts of a name on the hub; None where it can only be a path: nothing is on the hub and in `runs`, or
    in a folder that is here."""
    found = _NAME.fullmatch(name)
    owner = Path(name).parts[0] if name else ""
    if not found or owner == "runs" or Path(owner).is_dir():
        return None
    repository, *others = found.groups(default="")
    return HubName(repository, *(part[1:] for part in others))


def hub_model(name: str) -> HubName | None:
    """Return the parts of `owner/name[@revision]`, None for anything else."""
    found = hub_name(name)
    return None if found and (found.config or found.split) else found


@lru_cache
def commit_of(repository: str, revision: str, kind: Literal["model", "dataset"]) -> str:
    """Return the commit of a revision, by default of the main branch; without a network, the one in the cache.

    Raises:
        NetworkError: if there is none.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    revision, unreachable = revision or "main", rely_on_cache_unless_reachable()
    try:
        return HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=10).sha
    except RepositoryNotFoundError as error:
        raise NetworkError(
            f"{repository} must be a path or a {kind} on the hub, but is neither; one that is private or gated needs "
            "`hf auth login` first"
        ) from error
    except RevisionNotFoundError as error:
        raise NetworkError(f"{repository} has no branch, tag or commit {revision!r} on the hub") from error
    except Exception as error:  # a network fails in many classes
        folder = f"{kind}s--{repository.replace('/', '--')}"
        cached = Path(constants.HF_HUB_CACHE, folder, "refs", revision)
        if cached.is_file():
            return cached.read_text(encoding="utf-8").strip()
        cause = unreachable or _words(error)
        raise NetworkError(
            f"{repository} is no path here, and could not be looked up on the hub ({cause}); with its commit, as "
            f"{repository}@COMMIT, the cache is enough"
        ) from error


@cache
def rely_on_cache_unless_reachable() -> str:
    """Return why the hub cannot be asked, having switched its libraries to their caches; nothing where it can be.

    Seconds to wait for it are HF_HUB_ETAG_TIMEOUT, the hub's own variable for slow networks, or two.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", SECONDS_TO_ANSWER))
    if answers(constants.ENDPOINT, seconds):
        return ""
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # else it takes over the above
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT} does not answer within {seconds:g} s, HF_HUB_ETAG_TIMEOUT=30 waits longer"


def answers(url: str, seconds: float) -> bool:
    """Return True if anything answers within so many seconds, whatever it says; by the proxies of the environment."""
    answered = []

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=seconds):
                answered.append(True)
        except HTTPError:
            answered.append(True)
        except OSError as error:  # certificates are for whoever downloads to judge
            if isinstance(getattr(error, "reason", error), ssl.SSLError):
                answered.append(True)

    thread = Thread(target=ask, daemon=True)  # looking a name up heeds no timeout
    thread.start()
    thread.join(seconds)
    return bool(answered)


def push_target(name: str, is_public: bool) -> str:
    """Return the repository `owner/name` that may be pushed to, there already or not.

    Raises:
        SettingsError: if the name is none, there is no key or one that the hub does not know, or it is there for other
            eyes than asked for.
        NetworkError: if the hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SettingsError(f"`push` must be a name on the hub, but is {name!r}: {error}") from error
    if not get_token():
        raise SettingsError("`push` needs a key of the hub that may write: `hf auth login`, or set HF_TOKEN")
    if unreachable := rely_on_cache_unless_reachable():
        raise NetworkError(f"`push` = {name} needs the hub: {unreachable}")
    try:
        owner = HfApi().whoami()["name"]
        repository = name if "/" in name else f"{owner}/{name}"
        is_private = HfApi().repo_info(repository, repo_type="model").private
    except RepositoryNotFoundError:
        return repository
    except HfHubHTTPError as error:
        raise SettingsError(f"`push` needs a key that the hub takes, but it says: {_words(error)}") from error
    if is_private == is_public:
        seen, flag = ("private", "leave --public out") if is_private else ("public", "pass --public true")
        raise SettingsError(f"`push` = {repository} is there already and {seen}: {flag}, or name another")
    return repository


def push(folder: Path, repository: str, is_public: bool) -> str:
    """Upload the files of a folder and return in words what was done; a README.md that is there already stays.

    Raises:
        NetworkError: if the hub refuses it.
    """
    from huggingface_hub import HfApi

    api, card = HfApi(), "README.md"
    try:
        api.create_repo(repository, private=not is_public, exist_ok=True)
        is_kept = api.file_exists(repository, card)
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[card] if is_kept else None,
            commit_message="Upload a model of gpt2ft",
        )  # fmt: skip
    except Exception as error:  # a network fails in many classes
        raise NetworkError(
            f"{folder} is written, but could not be pushed: {_words(error)}; `hf upload {repository} {folder}` tries "
            "again"
        ) from error
    place = f"{api.endpoint}/{repository}, {'public' if is_public else 'private'}"
    return f"{place}; the {card} that was there is kept" if is_kept else place


def _words(error: Exception) -> str:
    return " ".join(str(error).split())
