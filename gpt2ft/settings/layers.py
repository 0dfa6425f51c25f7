"""Layers of settings: a recipe over the one that it builds on, and the command line over both.

What a layer says takes the place of the same setting below, and of settings below that would contradict it or that
speak of other data than its own:

    the layer says                what falls of the layers below
    data.train                    data.eval and what fits it alone (OF_THE_DATA): they belong to other data
    data.eval                     data.eval_fraction, and the other way round
    training.epochs, .min_steps   training.steps, which would override them
    training.tokens_per_micro_batch    training.auto_from; where it is auto, that becomes the size it takes the place of

Where held-out data fall with the training data and nothing takes their place, a share of the new data is held out.
"""

import re
from collections.abc import Mapping
from typing import Any

from gpt2ft.settings.sections import split_mixing_weight

Sections = dict[str, Any]  # section -> setting -> value

# Settings of `data` that fit the sources they were written for.
OF_THE_DATA = ("topic_replies", "ignore_keys", "columns", "documents")
REPLACED = {  # section -> setting -> what it replaces below
    "data": {"eval": "eval_fraction", "eval_fraction": "eval"},
    "training": {"epochs": "steps", "min_steps": "steps"},
}


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Sections:
    """Return the sections of both layers. Settings outside of sections, such as `output`, are of one layer alone."""
    merged = {name: values for name, values in below.items() if isinstance(values, Mapping)} | dict(above)
    for name, said in above.items():
        if isinstance(said, Mapping) and isinstance(below.get(name), Mapping):
            replaced = REPLACED.get(name, {})
            fallen = {replaced[setting] for setting in said if setting in replaced}
            kept = {setting: value for setting, value in below[name].items() if setting not in fallen}
            if name == "data":
                kept = _without_own(kept, said)
            if name == "training":
                kept = _with_own_step(kept, said)
            merged[name] = kept | dict(said)
    return merged


def _with_own_step(below: Sections, said: Mapping[str, Any]) -> Sections:
    """Return what holds of `training` under a layer that may give the size of micro-batches, or have it found."""
    asked, before = said.get("tokens_per_micro_batch"), below.get("tokens_per_micro_batch", "auto")
    if asked == "auto":
        return below if before == "auto" else below | {"auto_from": before}
    return {name: value for name, value in below.items() if asked is None or name != "auto_from"}


def _without_own(below: Sections, said: Mapping[str, Any]) -> Sections:
    """Return what holds of `data` under a layer that may name other data to train on.

    Where some of it is what the layer below trains on, all that is said of that still fits.
    """
    own = _names(below.get("train"))
    if "train" not in said or not own or own & _names(said["train"]):
        return below
    kept = {name: value for name, value in below.items() if name not in (*OF_THE_DATA, "eval")}
    return kept | {"eval_fraction": None} if below.get("eval") and "eval" not in said else kept


def _names(sources: Any) -> set[str]:
    """Return the names of data sources without split, revision and mixing weight."""
    listed = sources if isinstance(sources, list | tuple) else [sources] if isinstance(sources, str) else ()
    names = (split_mixing_weight(str(source))[0] for source in listed)
    return {re.split(r"(?<!^[A-Za-z]):|@", name)[0] for name in names}  # C: is a drive
