"""Trackers by Accelerate: what each needs, how it goes on with a run, and how it takes a text. Main process only.

    name          needs                     keeps the run in             takes a text as
    tensorboard   nothing                   the run's folder             text
    wandb         a key, unless offline     wandb/ there, and online     HTML
    trackio       nothing, unless a Space   its own cache, or a Space    Markdown
    mlflow        nothing                   MLFLOW_TRACKING_URI          a file of the run

Their own environment variables set projects and servers: WANDB_PROJECT, TRACKIO_SPACE_ID, MLFLOW_EXPERIMENT_NAME.
"""

import html
import importlib.util
import json
import netrc
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpt2ft.errors import SettingsError, reason
from gpt2ft.files import write_json

PROJECT = "gpt2ft"
RUNS = "tracking.json"  # in the folder of a run: what each tracker calls it


def check_trackers(names: Sequence[str]) -> None:
    """Raise SettingsError unless every tracker is installed and has the key that it needs."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # or a mere folder of that name, where it keeps runs
            raise SettingsError(f"`tracking` = {name} needs the package {name}, which is missing: pip install {name}")
    if "wandb" in names and not _has_wandb_key():
        raise SettingsError(
            "`tracking` = wandb needs an API key, but finds none: run `wandb login`, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the run in its folder"
        )
    if "trackio" in names and os.environ.get("TRACKIO_SPACE_ID"):
        from huggingface_hub import get_token

        if get_token() is None:
            raise SettingsError(
                "`tracking` = trackio needs a token of the hub for the Space in TRACKIO_SPACE_ID, but finds none: run "
                "`hf auth login`, or unset it to keep the run on this machine"
            )


def start_trackers(folder: Path, step: int, settings: Mapping[str, Any]) -> list[Any]:
    """Return the trackers of a run. Where that is continued, each goes on with what it has of it.

    Args:
        folder: of the run.
        step: that it goes on from; at 0 it is a new one to all of them.
        settings: as in the recipe.

    Raises:
        SettingsError: if one cannot be started.
    """
    names, file = settings.get("tracking", ["tensorboard"]), folder / RUNS
    known = json.loads(file.read_text(encoding="utf-8")) if step and file.is_file() else {}
    started = [_start(name, folder, step, settings, known) for name in names]
    if known:
        write_json(file, known)
    return started


def log_text(tracker: Any, step: int, name: str, text: str) -> None:
    """Show a text in a tracker."""
    if tracker.name == "tensorboard":
        tracker.tracker.add_text(name, text, step)
    elif tracker.name == "wandb":
        import wandb

        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        tracker.log({name: wandb.Html(page)}, step=step)
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Markdown(_as_code(text))}, step=step)
    else:
        import mlflow

        mlflow.log_text(text, f"{name}/step-{step:08d}.txt")


def _start(name: str, folder: Path, step: int, settings: Mapping[str, Any], known: dict[str, str]) -> Any:
    """Start a tracker, and add to `known` what it calls the run."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    config, earlier, shown_as = dict(_flat(settings)), known.get(name), folder.resolve().name
    run_id = earlier or secrets.token_hex(4)
    how: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder, "purge_step": step + 1},
        "wandb": {"dir": str(folder), "name": shown_as, "id": run_id, "config": config},
        "trackio": {"name": earlier or f"{shown_as}-{run_id}", "resume": "allow", "embed": False, "config": config},
        "mlflow": {"run_name": shown_as, "run_id": earlier},
    }
    if earlier:
        how["wandb"]["resume"] = "allow"
    project = {"tensorboard": "tensorboard", "wandb": os.environ.get("WANDB_PROJECT", PROJECT)}.get(name, PROJECT)
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **how[name])
        tracker.start()
        if name == "tensorboard":
            log_text(tracker, step, "settings", f"```\n{json.dumps(settings, indent=2)}\n```")
        if name == "mlflow" and not earlier:  # which takes each value once
            tracker.store_init_configuration(config)
    except Exception as error:  # any of their own: of keys that are refused, of servers that do not answer
        raise SettingsError(f"`tracking` = {name} cannot be started: {reason(error)}") from error
    if name != "tensorboard":
        known[name] = {"wandb": run_id, "trackio": how["trackio"]["name"]}.get(name) or tracker.tracker.info.run_id
    return tracker


def _has_wandb_key() -> bool:
    """Return True if wandb finds what it logs in with, or needs nothing; otherwise it would ask at the terminal."""
    import wandb

    settings = wandb.setup().settings  # of its environment variables and files
    if settings.mode in ("offline", "dryrun", "disabled") or settings.api_key:
        return True
    if getattr(settings, "identity_token_file", None):  # which earlier versions do not know
        return True
    try:
        logins = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return not logins.keys().isdisjoint({urlsplit(settings.base_url).netloc, "api.wandb.ai"})


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield settings by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            yield name, value


def _as_code(text: str) -> str:
    """Return a text as Markdown that shows it as it is, whatever backticks it holds."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in ("", *re.findall("`+", text))))
    return f"{fence}\n{text}\n{fence}"
