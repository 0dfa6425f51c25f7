"""The keys of records and of messages: which tell how much a turn is learnt, which only describe, and the rule for all
others. A key that no layout reads and that does not describe must be empty, or the record is refused."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from gpt2ft.conversation import Role
from gpt2ft.data.reading import Malformed, Record, of, show, value
from gpt2ft.settings.sections import FilterSettings

# 1 or true: learn it. 0 or false: do not. Between them: learn it by that weight. (OpenAI, Mistral and OpenChat: weight;
# ms-swift: loss and loss_scale; XTuner: loss; axolotl: train and training; scikit-learn and Keras: sample_weight.)
MARKS = (
    "learn", "loss", "loss_scale", "loss_weight", "sample_weight", "train", "train_on_turn", "trainable", "training",
    "weight",
)  # fmt: skip
PASS_OVER = "where it says nothing of the kind, name it in `data.ignore_keys`"
LEAST_WEIGHT = 1e-6  # above 0; far smaller ones would be lost in float32
RECORD_MARKS = (*MARKS, "label", "kto_tag")  # KTO: the whole record is good or bad
FILTERED = ("deleted", "lang", "language", "review_result")
READ_OF_ALL = RECORD_MARKS + FILTERED

_COUNT = ("n", "num")  # the first word
_DESCRIBING_WORDS = """
    id ids idx index indices uuid guid identifier hash md sha checksum fingerprint source sources origin dataset
    datasets corpus subset dump url urls uri path file filename title author authors annotator annotators contributor
    license licence version revision name names ip header
    date dates datetime time timestamp at created updated added year language languages lang locale country state
    model models engine provider generator temperature
    category categories subcategory topic topics subtopic subject subjects domain genre type kind tag tags keyword
    keywords difficulty complexity
    score scores rating ratings rank ranks reward rewards margin quality similarity distance confidence probability
    perplexity toxicity toxic moderation detoxify redacted synthetic vote votes upvotes downvotes likes views
    count counts counter length lengths size turn
    meta metadata attributes usage level unnamed
"""
_DESCRIBING = frozenset(_DESCRIBING_WORDS.split())
_MEANING_WORDS = """
    image images photo picture audio audios video videos document documents attachment
    learn loss mask masked train trainable training kto
"""
_MEANING = frozenset(_MEANING_WORDS.split())
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PAIR = ("chosen", "rejected")
_EMPTY = ("", "[]", "{}", "null")


@lru_cache(4096)
def describes(key: str) -> bool:
    """Return true for a key that only describes, by its last word (`prompt_id`, `createdAt`) or as a number of things.

    Of `rating_chosen` and the like the word before is the last. The path of an image stands for the image, and what
    speaks of training is a mark (`kto_tag`).
    """
    words = [word for word in map(str.lower, _WORD.findall(key)) if word not in _PAIR]
    if not words or not _MEANING.isdisjoint(words):
        return False
    return words[-1] in _DESCRIBING or (words[0] in _COUNT and len(words) > 1)


def is_empty(value: Any) -> bool:
    """Return true for null, blank text, and lists and objects that hold nothing else, also where text spells them."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif found is not None and (not isinstance(found, str) or found.strip() not in _EMPTY):
            return False
    return True


def unread(record: Record, read: Collection[str]) -> list[str]:
    """Return the keys outside `read` that hold something and do not only describe."""
    return [key for key in record if key not in read and not describes(key) and not is_empty(record[key])]


def refuse_unread(message: Record, read: Collection[str]) -> None:
    """Raise Malformed if a message holds content that would be lost; its `name` tells apart several who speak."""
    refuse_keys(message, unread(message, read) + ([] if is_empty(message.get("name")) else ["name"]))


def refuse_keys(record: Record, keys: Sequence[str]) -> None:
    """Raise Malformed if there are any such keys, with all their names: they can then be ignored at once."""
    if keys:
        others = ", ".join(f"`{key}`" for key in keys[1:])
        raise Malformed(
            f"`{keys[0]}` must be empty or absent, as it is not read and would be lost, but is {show(record[keys[0]])}"
            f"{of(record)}{others and f', and so with {others}'}; name in `data.ignore_keys` what only describes",
            "key that is not read",
        )


def weight_of(message: Record, role: Role) -> float:
    """Return how much a message counts where it is learnt, from 0 to 1: 1 where no mark says otherwise.

    Raises:
        Malformed: if its marks are unclear, or ask for the learning of a turn that is no reply.
    """
    marks = _marks(message, MARKS)
    if role != "assistant" and any(marks.values()):
        key = next(key for key, mark in marks.items() if mark)
        raise Malformed(f"`{key}` must be 0 or absent, as only assistant turns are learnt, but is on a {role} turn")
    return _agreed(message, marks) if role == "assistant" else 1.0


def record_weight(record: Record, classes: Collection[str] = (), compared: bool = False) -> float:
    """Return how much every reply of a record counts, above 0.

    Args:
        classes: marks whose whole numbers are none.
        compared: the replies are compared, and count wholly.

    Raises:
        Malformed: if its marks are unclear, or it is marked as not to be learnt.
    """
    keys = [key for key in RECORD_MARKS if key not in classes or type(record.get(key)) is not int]
    marks = _marks(record, keys, weights=() if compared else MARKS)
    for key, mark in marks.items():
        if not mark:
            kto = "" if key in MARKS else "; launch/dpo.py learns from both with `dpo.loss` = kto"
            raise Malformed(
                f"`{key}` must be true, above 0 or absent, as a record is learnt, but is {show(record[key])}"
                f"{of(record)}{kto}; `data.on_error` = skip leaves such records out and counts them; {PASS_OVER}",
                "marked as bad",
            )
    return _agreed(record, {key: mark for key, mark in marks.items() if key in MARKS})


def refuse_fractions(weights: Iterable[float]) -> None:
    """Raise Malformed if there are weights between 0 and 1 among those of replies to be compared."""
    for weight in weights:
        if 0 < weight < 1:
            raise Malformed(
                f"`weight`, or any other mark of a reply, must be 0 or 1 in preferences, but is {weight:g}: pairs are "
                "weighed by `dpo.pair_weight`"
            )


def _agreed(record: Record, marks: Mapping[str, float]) -> float:
    if len(set(marks.values())) > 1:
        raise Malformed(f"{' and '.join(f'`{key}`' for key in marks)} must agree, but do not{of(record)}")
    return next(iter(marks.values()), 1.0)


def _marks(record: Record, keys: Iterable[str], weights: Collection[str] = MARKS) -> dict[str, float]:
    """Return what each of these marks says, from 0 to 1; those outside `weights` say 0 or 1."""
    found = {}
    for key in keys:
        mark = record.get(key)
        if mark is not None and not is_empty(mark):
            least = LEAST_WEIGHT if key in weights else 1
            if not isinstance(mark, int | float) or not (mark == 0 or least <= mark <= 1):
                between = f", or from {LEAST_WEIGHT:f} to 1 where by a weight" if key in weights else ""
                text = ", which is text: .csv and .tsv hold nothing else, .jsonl does" if isinstance(mark, str) else ""
                raise Malformed(
                    f"`{key}` must be 1 or true where it is to be learnt, 0 or false where not{between}, but is "
                    f"{show(mark)}{text}{of(record)}; {PASS_OVER}"
                )
            found[key] = float(mark)
    return found


def reason_to_drop(record: Record, filters: FilterSettings) -> str | None:
    """Return the first reason, in the order of `REASONS`, for which the filters drop a record or message.

    Raises:
        Malformed: if what they read is no answer.
    """
    if fact_of(record, "deleted"):
        return "deleted"
    language = language_of(record)
    if filters.languages and language and language not in filters.languages:
        return "wrong language"
    return "not reviewed" if filters.reviewed_only and fact_of(record, "review_result") is False else None


def fact_of(record: Record, key: str, kind: type = bool, must_be: str = "true, false or null") -> Any:
    """Return what a key that may be absent or empty says of a record or message; None where it says nothing.

    Raises:
        Malformed: if it is of another type, as all fields of a table in text are.
    """
    if is_empty(record.get(key)):
        return None
    try:
        return value(record, key, kind, must_be)
    except Malformed as malformed:
        raise Malformed(f"{malformed}; {PASS_OVER}") from None


def language_of(record: Record) -> str | None:
    found = (fact_of(record, key, str, "a string or null") for key in ("lang", "language"))
    return next(filter(None, found), None)
