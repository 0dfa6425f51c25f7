"""Faults of a reply that are seen without a judge: by them several replies to one prompt are ranked."""

from collections.abc import Callable
from dataclasses import dataclass

from gpt2ft.report.instructions import obeys
from gpt2ft.report.replies import Exchange, copies_prompt, holds_word, num_words, repeated_share, writes_user_turn

MOST_REPEATED = 0.1  # of a reply's runs of four words; good prose stays below 0.05, a loop comes near 1


@dataclass(frozen=True)
class Rules:
    """Conditions on a reply beside those that hold for all.

    Attributes:
        checks: instructions as a prompt would give them; `obeys` knows each.
        max_words: None for no limit.
    """

    checks: tuple[str, ...] = ()
    min_words: int = 0
    max_words: int | None = None


FAULTS: dict[str, Callable[[Exchange, Rules], bool]] = {
    "does not stop": lambda e, _: not e.stopped,
    "repeats itself": lambda e, _: repeated_share(e.reply) > MOST_REPEATED,
    "writes the user's turn": lambda e, _: writes_user_turn(e.reply),
    "copies the prompt": lambda e, _: copies_prompt(e.prompt, e.reply),
    "too short": lambda e, rules: num_words(e.reply) < rules.min_words,
    "too long": lambda e, rules: rules.max_words is not None and num_words(e.reply) > rules.max_words,
    "leaves the topic": lambda e, _: bool(e.topic) and not holds_word(e.reply, e.topic),
    "disobeys the prompt": lambda e, _: obeys(e.prompt, e.reply) is False,
    "fails a check": lambda e, rules: not all(obeys(check, e.reply) for check in rules.checks),
}


def faults(exchange: Exchange, rules: Rules) -> list[str]:
    """Return the names of all faults of a reply; the fewer, the better it is."""
    return [name for name, is_at_fault in FAULTS.items() if is_at_fault(exchange, rules)]
