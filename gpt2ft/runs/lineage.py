"""Lineage of a model: what a run started from and was trained on, and the same of the runs before it.

It is written into the manifest when a run begins, as folders and data may change later. Folders and files of this
machine stand in it by their last name alone, because a model card tells it to others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2ft import quickstart
from gpt2ft.data.hub_source import HubSource
from gpt2ft.data.sources import BUNDLED, open_source
from gpt2ft.hub import commit_of, hub_model
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.runs.describe import SourceShare
from gpt2ft.runs.loaded_model import home_of
from gpt2ft.runs.model_card import read_facts
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.settings.sections import ModelSettings, split_mixing_weight

Origin = dict[str, Any]  # name, and where known repository, revision, license


def lineage(settings: RunSettings, shares: Sequence[SourceShare]) -> dict[str, Any]:
    """Return method, base and data of a run, and the names for others of all sources with held-out figures."""
    method = "SFT"
    if isinstance(settings, DPOSettings):
        traits = PREFERENCE_LOSSES[settings.dpo.loss]
        method = "DPO" if traits.of_pairs and traits.needs_reference else settings.dpo.loss.upper()  # such as KTO
    data = [
        _data_origin(share.source)
        | {name: getattr(share, name) for name in ("mixing_weight", "conversations", "tokens", "supervised", "pairs")}
        for share in shares
    ]
    if settings.data.topic_replies:
        data.append(_data_origin(settings.data.topic_replies))
    sources = [split_mixing_weight(source)[0] for source in (*settings.data.train, *settings.data.eval)]
    return {
        "method": f"{method} LoRA" if settings.lora.rank else method,
        "base": _base_origin(settings.model),
        "data": data,
        "names": {source: _data_origin(source)["name"] for source in sources},
    }


def _data_origin(source: str) -> Origin:
    origin = open_source(source).origin
    if isinstance(origin, HubSource):
        known = {"name": source, "repository": origin.repo, "revision": origin.revision}
        return known | ({"license": origin.license} if origin.license else {})
    if source in BUNDLED:
        return {"name": source, "license": quickstart.LICENSE}
    return {"name": Path(origin.place).resolve().name}


def _base_origin(settings: ModelSettings) -> Origin:
    """Return the origin of what `model.path` names; of a run of ours with its lineage."""
    path, folder = settings.path, Path(settings.path)
    by_name = PUBLISHED_MODELS | {model.repository: model for model in PUBLISHED_MODELS.values()}
    if settings.random_init:
        return {"name": "random weights"}
    if not folder.is_dir() and (published := by_name.get(path)):
        return {"name": path} | {name: getattr(published, name) for name in ("repository", "revision", "license")}
    if not folder.exists() and (on_hub := hub_model(path)):
        commit = commit_of(on_hub.repository, on_hub.revision, "model")
        return {"name": on_hub.repository, "repository": on_hub.repository, "revision": commit}
    if path == "quickstart":
        return {"name": path, "license": quickstart.MODEL_LICENSE}
    home = home_of(folder)
    facts = home and read_facts(home)
    return {"name": (home or folder).resolve().name} | ({"lineage": facts["lineage"]} if facts else {})
