"""Tables of a report as plain text: the figures in short for the terminal, and all that stand on the page."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpt2ft.report.intervals import FEWEST
from gpt2ft.report.schema import Report
from gpt2ft.text.display import escape_control_characters


@dataclass(frozen=True)
class Figure:
    """One row: its label, where it stands in each model's report, how it is written."""

    label: str
    path: tuple[str, ...]
    form: str = "%"  # a format, % for a share
    better: int = 0  # 1 if more is better, -1 if less is
    paired: str = ""  # name of the difference from the first model, measured in pairs
    is_compared: bool = True

    def write(self, value: float, sign: str = "") -> str:
        """Return a number as text; `sign` "+" shows that of a difference."""
        if self.form == "%":
            return f"{100 * value:{sign}.{1 if 0 < abs(value) < 0.0995 else 0}f}"
        form = self.form.removeprefix("+") if sign else self.form
        return f"{value:{sign}{form if abs(value) < 1e6 else '.3g'}}"


@dataclass(frozen=True)
class Cell:
    """What is measured of one model, its interval, and its difference from the first model."""

    value: str
    interval: str = ""
    difference: str = ""  # with a star if chance alone does not explain it
    verdict: str = ""  # of a difference with a star: better, worse or changed


@dataclass(frozen=True)
class Table:
    """A column for each model, and rows of cells; None where nothing was measured."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    note: str = ""


NATS = Figure("held-out loss, nats/token", ("held_out", "total", "nats_per_token"), ".3f", -1, "nats_per_token")
PERPLEXITY = Figure("held-out perplexity", ("held_out", "total", "perplexity"), ",.1f", is_compared=False)
BITS = Figure("held-out loss, bits/byte", ("held_out", "total", "bits_per_byte"), ".3f", -1, "bits_per_byte")
ENDS = Figure("ends by itself, %", ("replies", "ends_by_itself"), "%", 1)
WORDS = Figure("words in a reply", ("replies", "words"), ",.1f")
REPEATED = Figure("repeated 4-grams, %", ("replies", "repeated_4grams"), "%", -1)
DISTINCT_2 = Figure("distinct-2", ("replies", "distinct_2"), ".2f", 1)
EARLIER = Figure("uses the earlier turn, %", ("replies", "uses_earlier_turn"), "%", 1)
OBEYS = Figure("obeys instructions, %", ("replies", "obeys"), "%", 1)
ON_TOPIC = Figure("on the topic, %", ("replies", "on_topic"), "%", 1)
ACCURACY = Figure("preference accuracy, %", ("preferences", "accuracy"), "%", 1)
BY_HEART = Figure("8-grams of training, %", ("learnt_by_heart", "grams_8"), "%", -1)
REPLIES = [
    ENDS,
    Figure("cut at the longest length, %", ("replies", "cut"), "%", -1),
    Figure("empty, %", ("replies", "empty"), "%", -1),
    WORDS,
    REPEATED,
    Figure("longest repeat, words", ("replies", "longest_repeat"), ",.1f", -1),
    Figure("distinct-1", ("replies", "distinct_1"), ".2f", 1),
    DISTINCT_2,
    Figure("writes the user's turn, %", ("replies", "writes_user_turn"), "%", -1),
    Figure("copies the prompt, %", ("replies", "copies_prompt"), "%", -1),
    EARLIER,
    OBEYS,
    ON_TOPIC,
]
PREFERENCES = [  # changes are those from each model's own reference, and a margin grows with its beta: not compared
    Figure("pairs", ("preferences", "pairs"), ",.0f", is_compared=False),
    ACCURACY,
    Figure("chosen reply likelier per token, %", ("preferences", "likelier"), "%", 1),
    Figure("what choosing the longer reply would get, %", ("preferences", "longer"), is_compared=False),
    Figure("margin of the rewards", ("preferences", "margin"), ".3f", is_compared=False),
    Figure("both replies less likely than before, %", ("preferences", "both_fall"), is_compared=False),
    Figure(
        "change of chosen log-probs, nats/token", ("preferences", "chosen_change_per_token"), "+.3f", is_compared=False
    ),
    Figure(
        "change of rejected log-probs, nats/token",
        ("preferences", "rejected_change_per_token"),
        "+.3f",
        is_compared=False,
    ),
    Figure("measured against", ("preferences", "reference")),
]
MEMORY = [
    BY_HEART,
    Figure("13-grams of training, %", ("learnt_by_heart", "grams_13"), "%", -1),
]
TRAINING = [
    Figure("steps", ("training", "steps"), ",.0f", is_compared=False),
    Figure("supervised tokens, %", ("training", "supervised_share"), is_compared=False),
    Figure("repeated tokens, %", ("training", "repeated_share"), is_compared=False),
    Figure("fill of the streams, %", ("training", "fill"), is_compared=False),
    Figure("sources", ("training", "sources")),
    Figure("dropped", ("training", "dropped")),
]


def same_tokens(report: Report) -> bool:
    """Return True if all models count the same tokens, so that losses per token can be compared."""
    return len({model["tokenizer"] for model in report["models"] if "tokenizer" in model}) < 2


def measured(values: Any, path: Iterable[str]) -> Any:
    """Return what stands at a path of keys, None where one is absent."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def number(value: Any) -> float | None:
    """Return a plain number or the value of an estimate, None for anything else."""
    value = value["value"] if isinstance(value, Mapping) and "value" in value else value
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def in_short(report: Report) -> Table:
    """Return the dozen figures that tell most."""
    nats = replace(NATS, is_compared=same_tokens(report))
    figures = [
        nats,
        PERPLEXITY,
        BITS,
        *_plain_texts(report),
        ENDS,
        WORDS,
        REPEATED,
        DISTINCT_2,
        EARLIER,
        OBEYS,
        ON_TOPIC,
    ]
    return _table(report, "In short", [*figures, ACCURACY, BY_HEART])


def tables(report: Report) -> list[Table]:
    """Return all tables of the page that have rows."""
    are_same = same_tokens(report)  # without which a place is of other bytes in each model
    unit, name = ("nats_per_token", "nats/token") if are_same else ("bits_per_byte", "bits/byte")
    parts = [("all", ("total",)), ("without overlap with training data", ("clean",))]
    for kind, words in (("by_depth", "turn"), ("by_place", "place"), ("by_source", "source")):
        parts += [(f"{words}: {key}", (kind, key)) for key in _keys(report, "held_out", kind)]
    held_out = [
        Figure(
            label, ("held_out", *path, unit), ".3f", -1, unit if path == ("total",) else "",
            is_compared=are_same or path[0] != "by_place",
        )
        for label, path in parts
    ]  # fmt: skip
    counts = {metric["count"] for model in report["models"] for metric in model.get("replies", {}).values()}
    counts = sorted({min(counts), max(counts)} if counts else ())
    differ = report.get("settings_that_differ", {}).items()
    settings = [(key, [None if value is None else Cell(str(value)) for value in values]) for key, values in differ]
    found = [
        in_short(report),
        _table(report, f"Held-out loss, {name}", held_out),
        replace(_replies(report), note=f"Of {' to '.join(map(str, counts))} replies." if counts else ""),
        _table(report, "Forgotten? Plain text", _plain_texts(report)),
        _table(report, "Preferences on held-out pairs", PREFERENCES),
        replace(_table(report, "Learnt by heart?", MEMORY), note=_overlap(report)),
        _table(report, "What it was trained on", TRAINING),
        Table("Settings that differ", _names(report), settings),
    ]
    return [table for table in found if table.rows or table.note]


def _table(report: Report, title: str, figures: Iterable[Figure]) -> Table:
    return Table(title, _names(report), list(_rows(report, figures)))


def _replies(report: Report) -> Table:
    """Return the table of replies, with those of people in a last column."""
    table, people = _table(report, "How it replies", REPLIES), {"replies": report.get("people", {})}
    if not people["replies"]:
        return table
    of_people = {figure.label: _cell(figure, measured(people, figure.path)) for figure in REPLIES}
    rows = [(label, [*cells, of_people[label]]) for label, cells in table.rows]
    return Table(table.title, [*table.columns, "people"], rows)


def _overlap(report: Report) -> str:
    found = report.get("overlap", {})
    counts = [
        f"{found[key]:,} {words}" for key, words in (("exact", "word for word"), ("near", "nearly")) if key in found
    ]
    held_out = f"Of {found.get('conversations', 0):,} held-out conversations the training data hold a reply of"
    return " ".join([*[f"{held_out} {' and of '.join(counts)}."] * bool(counts), *found.get("problems", ())])


def _names(report: Report) -> list[str]:
    return [model["name"] for model in report["models"]]


def _keys(report: Report, *path: str) -> list[str]:
    return list(dict.fromkeys(key for model in report["models"] for key in measured(model, path) or ()))


def _plain_texts(report: Report) -> list[Figure]:
    names = _keys(report, "plain_text")
    return [Figure(f"{name}, bits/byte", ("plain_text", name, "bits_per_byte"), ".3f", -1) for name in names]


def _rows(report: Report, figures: Iterable[Figure]) -> Iterator[tuple[str, list[Cell | None]]]:
    """Yield the rows of those figures that any model has."""
    for figure in figures:
        first, *others = report["models"]
        start = measured(first, figure.path)
        cells = [_cell(figure, start)]
        for model in others:
            paired = measured(model, ("held_out", "difference", figure.paired))
            cells.append(_cell(figure, measured(model, figure.path), start if figure.is_compared else None, paired))
        if any(cells):
            yield figure.label, cells


def _cell(figure: Figure, value: Any, first: Any = None, paired: Mapping[str, float] | None = None) -> Cell | None:
    """Return a cell. A difference is clear if its interval leaves out 0, or if unpaired intervals share nothing."""
    new, old = number(value), number(first)
    if new is None:
        return Cell(_listed(value)) if value else None
    has_interval = isinstance(value, Mapping)
    interval = f"{figure.write(value['low'])} to {figure.write(value['high'])}" if has_interval else ""
    if old is None:
        return Cell(figure.write(new), interval)
    change, is_clear = new - old, False
    if paired:
        change, is_clear = paired["value"], paired["low"] > 0 or paired["high"] < 0
        interval = (
            f"\N{GREEK CAPITAL LETTER DELTA} {figure.write(paired['low'], '+')} to {figure.write(paired['high'], '+')}"
        )
    elif has_interval:
        is_known = min(value["count"], first["count"]) >= FEWEST
        is_clear = is_known and (value["low"] > first["high"] or value["high"] < first["low"])
    gain = change * figure.better
    verdict = ("better" if gain > 0 else "worse" if gain < 0 else "changed") if is_clear else ""
    return Cell(figure.write(new), interval, figure.write(change, "+") + "*" * is_clear, verdict)


def _listed(values: Any) -> str:
    """Return what is no number as text: a sentence, counts by reason, or sources and their counts."""
    if isinstance(values, str):
        return values
    if isinstance(values, Mapping):
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in values.items() if number(count))
    shown = ("conversations", "tokens", "supervised", "pairs")
    return "; ".join(f"{e.get('source')}: {_listed({key: e[key] for key in shown if key in e})}" for e in values)


def as_terminal(report: Report, width: int = 100) -> str:
    """Return the figures in short as lines of at most `width` characters.

    Models go by letters where a name is too long for its column, and fill several tables where they are many.
    """
    table = in_short(report)
    label = min(max((len(title) for title, _ in table.rows), default=0), width // 4)
    cells = [[f"{cell.value} {cell.difference:>7}".rstrip() if cell else "-" for cell in row] for _, row in table.rows]
    names = [escape_control_characters(" ".join(name.split())) for name in table.columns]
    room = (width - label) // max(1, len(names)) - 2
    column = max(len(cell) for row in [*cells, [" "]] for cell in row)
    column = max(column, min(room, max(map(len, names), default=0)))
    heads, lines = names, []
    if max(map(len, names), default=0) > column:
        heads = [f"[{number}]" for number in range(1, len(names) + 1)]
        lines = [_shortened(f"{head} {name}", width) for head, name in zip(heads, names, strict=True)] + [""]
    a_table = max(1, (width - label) // (column + 2))
    for start in range(0, len(names), a_table):
        part = slice(start, start + a_table)
        lines += [""] * (start > 0) + [" " * label + "".join(f"  {head:>{column}}" for head in heads[part])]
        for (title, _), row in zip(table.rows, cells, strict=True):
            lines.append(f"{_shortened(title, label):<{label}}" + "".join(f"  {cell:>{column}}" for cell in row[part]))
    legend = f"* chance alone does not explain the difference from {heads[0]}" if len(names) > 1 else ""
    return "\n".join([*lines, _shortened(legend, width)]).rstrip()


def _shortened(text: str, width: int) -> str:
    """Return a text without its middle if it is longer than `width`."""
    kept = width - 3
    return text if len(text) <= width else text[: kept - kept // 2] + "..." + text[len(text) - kept // 2 :]
