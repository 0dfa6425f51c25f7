"""A conversation with a finished model in the terminal."""

import sys

from gpt2ft.chat.session import Session
from gpt2ft.chat.terminal import talk
from gpt2ft.files import cache_root
from gpt2ft.inference.prompt_format import PlainPromptFormat
from gpt2ft.runs.inference_model import load_inference_model
from gpt2ft.settings.scripts import ChatSettings
from gpt2ft.settings.sections import SamplingSettings

UNTRAINED = "it was never trained to chat: it is asked in plain text, and may wander off"


def run(settings: ChatSettings) -> None:
    model = load_inference_model(settings, settings.seed or 0)
    sampling = SamplingSettings(**settings.model_dump(include=set(SamplingSettings.model_fields)))
    session = Session(model, sampling, settings.max_new_tokens)
    session.system = settings.system or None
    notice = UNTRAINED if isinstance(model.prompt_format, PlainPromptFormat) and not settings.complete else ""
    if not talk(session, cache_root(None) / "chat_history", settings.complete, notice):
        sys.exit(1)
