"""Numbers of single LoRA targets, as TARGET=NUMBER: what the other targets have is a setting of its own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpt2ft.settings.choices import LORA_TARGETS
from gpt2ft.settings.columns import column_words, keys_and_columns


def per_target(number: type[int] | type[float]) -> Callable[[Any], Any]:
    """Return a reader of TARGET=NUMBER, which are given as words or as a mapping and written in one way and order."""

    def read(given: Any) -> Any:
        is_words = isinstance(given, list | tuple) and all(isinstance(word, str) for word in given)
        if not is_words and not isinstance(given, dict):
            return given  # which is refused as any list is
        found: dict[str, float] = {}
        for target, value in keys_and_columns(column_words(given)):
            try:
                fits = target in LORA_TARGETS and target not in found and 0 < number(value) < math.inf
            except ValueError:
                fits = False
            if not fits:
                known = ", ".join(LORA_TARGETS)
                raise ValueError(f"must be TARGET=NUMBER, as q=16, for some of {known}, but holds {target}={value}")
            found[target] = number(value)
        return tuple(f"{target}={found[target]}" for target in LORA_TARGETS if target in found)

    return read


def by_target(words: Sequence[str]) -> dict[str, str]:
    """Return the numbers of a setting by target."""
    return dict(keys_and_columns(words))
