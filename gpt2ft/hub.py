"""Names on the Hugging Face hub, `owner/name`, and the commit that a branch, a tag or nothing stands for."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from gpt2ft.errors import NetworkError

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(/[^:@]+)?(:[^@]+)?(@.+)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")


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

    revision = revision or "main"
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
        cause = " ".join(str(error).split())
        raise NetworkError(
            f"{repository} is no path here, and could not be looked up on the hub ({cause}); with its commit, as "
            f"{repository}@COMMIT, the cache is enough"
        ) from error
