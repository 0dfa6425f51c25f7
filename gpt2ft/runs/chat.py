"""A conversation with a finished model in the terminal."""

import sys
from datetime import datetime
from pathlib import Path

from gpt2ft.chat.session import Session
from gpt2ft.chat.terminal import talk
from gpt2ft.files import cache_root
from gpt2ft.inference.prompt_format import PlainPromptFormat
from gpt2ft.runs.inference_model import load_inference_model
from gpt2ft.runs.loaded_model import MODEL, finished_runs, newest_run
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.settings.using import ChatSettings

UNTRAINED = "it was never trained to chat: it is asked in plain text, and may wander off"


def run(settings: ChatSettings) -> None:
    if settings.list:
        newest_run()  # refuses where there is none
        print(*map(_ended, reversed(finished_runs())), sep="\n")
        return
    model = load_inference_model(settings, settings.seed or 0)
    sampling = SamplingSettings(**settings.model_dump(include=set(SamplingSettings.model_fields)))
    session = Session(model, sampling, settings.max_new_tokens)
    session.system = settings.system or None
    notices = [of_newest(model.source)] if settings.model is None else []
    if isinstance(model.prompt_format, PlainPromptFormat) and not settings.complete:
        notices.append(UNTRAINED)
    if not talk(session, cache_root(None) / "chat_history", settings.complete, "\n".join(notices)):
        sys.exit(1)


def _ended(run: Path) -> str:
    return f"{datetime.fromtimestamp((run / MODEL).stat().st_mtime):%Y-%m-%d %H:%M}  {run}"


def of_newest(run: str) -> str:
    """Return which run was taken where none was named, and how to see the others."""
    number = len(finished_runs())
    return (
        f"{run} is the newest of {number} finished runs; --list shows them" if number > 1 else f"{run} is the only run"
    )
