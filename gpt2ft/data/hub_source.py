"""Data sets on the Hugging Face hub, each at one commit: those that have a name here, and any other by its own."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2ft.data.blocks import Columns, RecordBlock
from gpt2ft.data.reading import DataError
from gpt2ft.data.tables import read_table
from gpt2ft.hub import HubName, commit_of, rely_on_cache_unless_reachable


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset on the hub. The revision is a commit, so the data never changes."""

    repo: str
    revision: str
    split: str = "train"
    splits: tuple[str, ...] = ("train",)  # empty where they are not known
    config: str | None = None
    license: str | None = None  # where it is known, by the hub's name for it

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for people on the commit that was found for a name; that of a name here never changes."""
        return () if self.splits else (f"commit {self.revision}",)

    @property
    def place(self) -> str:
        return f"{self.repo}@{self.revision[:8]} {self.split}"

    @property
    def size(self) -> None:
        """Bytes, which are not known before it is loaded."""

    def digest(self) -> str:
        """Return a digest of the revision, which takes no network."""
        config = f"/{self.config}" if self.config else ""
        return hashlib.sha256(f"{self.repo}{config}@{self.revision}:{self.split}".encode()).hexdigest()

    def blocks(self, columns: Columns) -> Iterator[RecordBlock]:
        return read_table(_load(self), self.place, columns)


SOURCES = {
    "oasst1": HubSource(
        "OpenAssistant/oasst1",
        "fdf72ae0827c1cda404aff25b6603abec9e3399b",
        splits=("train", "validation"),
        license="apache-2.0",
    ),
    "oasst2": HubSource(
        "OpenAssistant/oasst2",
        "179dd21fc55192153d94adb0e0ce8f69e222bf75",
        splits=("train", "validation"),
        license="apache-2.0",
    ),
    "smoltalk": HubSource(
        "HuggingFaceTB/smoltalk", "5feaf2fd3ffca7c237fc38d1861bc30365d48ffa", splits=("train", "test"), config="all"
    ),
    "ultrachat": HubSource(
        "HuggingFaceH4/ultrachat_200k",
        "8049631c405ae6576f93f445c6b8166f76f5505a",
        split="train_sft",
        splits=("train_sft", "test_sft"),
        license="mit",
    ),
    "alpaca": HubSource("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", license="cc-by-nc-4.0"),
    "dolly": HubSource(
        "databricks/databricks-dolly-15k", "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a", license="cc-by-sa-3.0"
    ),
    # preferences
    "hh-rlhf": HubSource(
        "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", splits=("train", "test"), license="mit"
    ),  # helpful and harmless
    "ultrafeedback": HubSource("openbmb/UltraFeedback", "40b436560ca83a8dba36114c22ab3c66e43f6d5e", license="mit"),
    "ultrafeedback-binarized": HubSource(
        "HuggingFaceH4/ultrafeedback_binarized",
        "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        split="train_prefs",
        splits=("train_prefs", "test_prefs"),
        license="mit",
    ),
}


def known_source(source: str, hub: HubSource, split: str) -> HubSource:
    """Return a split of a data set that has a name here.

    Raises:
        DataError: if it has no such split.
    """
    split = split or hub.split
    if split not in hub.splits:
        splits = " or ".join(hub.splits)
        raise DataError(f"data source {source!r} must name the split {splits}, but names {split!r}")
    return replace(hub, split=split)


def any_source(source: str, name: HubName) -> HubSource:
    """Return any data set on the hub; one that has a name here at its own revision, unless another is given.

    Raises:
        NetworkError: if it cannot be found.
    """
    pinned = {hub.repo: hub for hub in SOURCES.values()}.get(name.repository)
    if pinned and not name.revision and not name.config:
        return known_source(source, pinned, name.split)
    revision = commit_of(name.repository, name.revision, "dataset")
    return HubSource(name.repository, revision, name.split or "train", (), name.config or None)


def _load(hub: HubSource) -> Any:
    unreachable = rely_on_cache_unless_reachable()
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # which would be drawn into a log
    try:
        dataset = datasets.load_dataset(hub.repo, hub.config, revision=hub.revision, split=hub.split)
        _check_revision(hub, dataset.cache_files)
    except Exception as error:  # a network and a cache fail in many classes; each ends here, with its own words
        cache, cause = datasets.config.HF_DATASETS_CACHE, " ".join(str(error).split())
        if unreachable and not isinstance(error, DataError):
            cause = unreachable
        raise DataError(
            f"{hub.place}: must be on the hub or in the cache ({cache}), but could not be loaded: {cause}; without "
            f"network, download the files of the split {hub.split!r} elsewhere, from "
            f"https://huggingface.co/datasets/{hub.repo}/tree/{hub.revision}, and give their path in data.train or "
            "data.eval instead of the name"
        ) from error
    return dataset


def _check_revision(hub: HubSource, cache_files: Sequence[dict[str, str]]) -> None:
    """Without network, `datasets` takes whatever revision is in its cache; its folder is named by the commit."""
    for cache_file in cache_files:
        found = Path(cache_file["filename"]).parent.name
        if found != hub.revision:
            raise DataError(f"the cache holds revision {found} instead of {hub.revision}")
