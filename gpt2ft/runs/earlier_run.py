"""The run that lies in an output folder already, compared with the one that is to train there by their settings.

Before data are read, so that the answer is in words of settings and comes at once; data and weights are compared by
their content afterwards.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2ft.errors import SettingsError
from gpt2ft.files import user_path
from gpt2ft.runs.identity import settings_that_train
from gpt2ft.runs.loaded_model import read_run_settings
from gpt2ft.runs.micro_batch import with_size_of
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.settings.sections import split_mixing_weight

MOST_NAMED = 4  # settings in one sentence


def refuse_other_run(folder: Path, settings: RunSettings, is_finished: bool) -> None:
    """Raise SettingsError if the run in a folder is finished, or trains on other things or in another way.

    The two ways on are named: beside it, or in its place. A recipe that this version cannot read is left to the later
    comparison.
    """
    changes = list(_changes(folder, settings))
    if not changes and is_finished:
        raise SettingsError(
            f"the run in {folder} is finished: pass `--resume never` to train it anew; the earlier one is moved aside"
        )
    if changes:
        more = f" and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
        state = "is finished, and was another" if is_finished else "cannot be continued"
        beside = shlex.quote(str(_beside(folder, settings)))
        raise SettingsError(
            f"the run in {folder} {state}: {', '.join(changes[:MOST_NAMED])}{more}; "
            f"train beside it with `--output {beside}`, or move it aside with `--resume never`"
        )


def _changes(folder: Path, settings: RunSettings) -> Iterator[str]:
    """Yield each setting that was another in the run in a folder, as `training.epochs` was 20 and is now 30."""
    try:
        earlier = read_run_settings(folder)
    except SettingsError:
        return
    kinds = [isinstance(run, DPOSettings) for run in (earlier, settings)]
    if kinds[0] != kinds[1]:
        before, now = ("tuned on preferences" if is_dpo else "fine-tuned" for is_dpo in kinds)
        yield f"it was {before}, and is now to be {now}"
        return
    runs = earlier, with_size_of(settings, earlier)
    before, now = (dict(_flat(settings_that_train(run))) for run in runs)
    changed = [name for name in now if name in before and before[name] != now[name]]  # passes count without `steps`
    if "data.train" in changed:  # settings that belong to the data change with them
        changed = ["data.train", *(name for name in changed if not name.startswith("data."))]
    for name in changed:
        yield f"`{name}` was {_words(before[name])} and is now {_words(now[name])}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _words(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _beside(folder: Path, settings: RunSettings) -> Path:
    """Return a folder that is free, named after the data where they are a file or a folder."""
    source = user_path(split_mixing_weight(settings.data.train[0])[0])
    name = source.resolve().name.partition(".")[0] if source.exists() else ""
    first = folder.with_name(name or f"{folder.name}-2")
    folders = (first, *(first.with_name(f"{first.name}-{number}") for number in range(2, 1000)))
    return next(other for other in folders if not other.exists())
