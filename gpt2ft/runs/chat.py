"""A conversation with a finished model in the terminal."""

import sys
from dataclasses import fields

import torch

from gpt2ft.data.store import cache_root
from gpt2ft.inference.frame import ChatFrame, PlainFrame, frame_for
from gpt2ft.inference.sampling import Sampling
from gpt2ft.inference.session import Session
from gpt2ft.runs.assemble import load_trained
from gpt2ft.serving.terminal import talk
from gpt2ft.settings import ChatSettings

UNTRAINED = "it was never trained to chat: it is asked in plain text, and may wander off"


def run(settings: ChatSettings) -> None:
    policy, _ = load_trained(settings.model, settings.random_init, settings.seed or 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")
    model = policy.gpt2.to(device, torch.bfloat16 if half else torch.float32).eval()
    frame = ChatFrame(policy.tokenizer) if settings.random_init else frame_for(policy.tokenizer)
    sampling = Sampling(**{field.name: getattr(settings, field.name) for field in fields(Sampling)})
    session = Session(model, policy.tokenizer, frame, sampling, settings.max_new_tokens)
    session.system = settings.system or None
    notice = UNTRAINED if isinstance(frame, PlainFrame) and not settings.complete else ""
    name = f"random {settings.model}" if settings.random_init else policy.source
    if not talk(session, name, cache_root(None) / "chat_history", settings.complete, notice):
        sys.exit(1)
