"""Replies, timed: one at a time and many together, by our decoder, and one at a time by transformers' cache."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gpt2ft.benchmark.machine import seconds_of
from gpt2ft.benchmark.made_up import VOCABULARY
from gpt2ft.benchmark.training import random_model
from gpt2ft.benchmark.usual import gpt2_of_transformers
from gpt2ft.inference.decoder import Decoder
from gpt2ft.inference.generate import generate
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.random import generator
from gpt2ft.settings.measuring import BenchmarkSettings

TOGETHER = 16
PROMPT = 60  # tokens, made up

Decode = Callable[[Sequence[Sequence[int]]], None]


def measure(
    settings: BenchmarkSettings, config: GPT2Config, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return tokens/s of ours and of the usual way (None unless asked for), in turn; the best of `steps` each.

    No reply ends before `new_tokens`, whatever its model says.
    """
    random = generator(settings.seed, "prompts")
    prompts = random.integers(0, VOCABULARY - 4, (TOGETHER, PROMPT)).tolist()
    gpt2 = random_model(settings, config).to(device, dtype)
    ways = {"ours": ours(settings, gpt2, 1), "together": ours(settings, gpt2, TOGETHER)}
    if settings.against:
        ways["usual"] = usual(settings, config, device, dtype)
    asked = {name: prompts if name == "together" else prompts[:1] for name in ways}
    fastest = dict.fromkeys(ways, float("inf"))
    for step in range(settings.steps + 1):
        for name, decode in ways.items():
            seconds = seconds_of(device, lambda decode=decode, name=name: decode(asked[name]))
            if step:  # the first allocates and compiles
                fastest[name] = min(fastest[name], seconds)
    speed = {name: len(asked[name]) * settings.new_tokens / seconds for name, seconds in fastest.items()}
    mine = {"tokens_per_second": speed["ours"], "tokens_per_second_of_16_together": speed["together"]}
    return mine, {"tokens_per_second": speed["usual"]} if settings.against else None


def ours(settings: BenchmarkSettings, gpt2: Any, slots: int) -> Decode:
    """Return our decoder with so many slots."""
    suppressed = torch.from_numpy(np.arange(gpt2.config.vocab_size) >= VOCABULARY)

    def decode(prompts: Sequence[Sequence[int]]) -> None:
        decoder = Decoder(gpt2, [], suppressed, slots)  # a new one: what it has read before would be cached
        with torch.inference_mode():
            done = generate(decoder, prompts, settings.new_tokens)
        assert all(len(completion.ids) == settings.new_tokens for completion in done)

    return decode


def usual(settings: BenchmarkSettings, config: GPT2Config, device: torch.device, dtype: torch.dtype) -> Decode:
    """Return `generate` of transformers, with its cache, greedy."""
    model = gpt2_of_transformers(settings, config).to(device, dtype).eval()

    def decode(prompts: Sequence[Sequence[int]]) -> None:
        ids = torch.tensor(prompts, device=device)
        length = {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)

    return decode
