"""Help of a script: how it is called, the recipes that it takes, and every setting, the most used first."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from gpt2ft.command_line import program_name
from gpt2ft.settings.sections import Section, field_of, is_section, names_of

WIDEST_TEXT = 100  # columns; longer lines are hard to read
LISTS = "NAME ... takes several words, and none where none follows."
FLAGS = "A setting that is shown without a value is a flag: --{flag} turns it on, --{flag} false off."


@dataclass(frozen=True)
class Usage:
    """Everything that the help of a script says.

    Attributes:
        purpose: of the script; by default that of its settings.
        positional: the word that stands without a setting.
        default_recipe, recipe: the one that is taken where none is named, and the one whose values are `defaults`.
        recipes: name and meaning of each.
    """

    kind: type[Section]
    purpose: str | None
    positional: str
    default_recipe: str = ""
    defaults: Section | None = None
    recipe: str = ""
    recipes: tuple[tuple[str, str], ...] = ()


def help_text(usage: Usage) -> str:
    """Return the help, as wide as the terminal."""
    width = shutil.get_terminal_size().columns
    names = list(names_of(usage.kind))
    required = [_row(usage, name)[0] for name in names if field_of(usage.kind, name).is_required()]
    words = ["usage:", program_name(), f"[{usage.positional}]", *required, "[--SETTING VALUE ...]"]
    most_used = [name for name in usage.kind.most_used if name in names]
    kinds = {name: field_of(usage.kind, name).annotation for name in names}
    grammar = [FLAGS.format(flag=name) for name in names if kinds[name] is bool][:1]
    grammar += [LISTS] if any(get_origin(kind) is tuple for kind in kinds.values()) else []
    blocks = [
        _usage(words, width),
        _fill(usage.purpose or usage.kind.__doc__ or "", width),
        *_about_recipes(usage, width),
        _fill(" ".join(grammar), width),
    ]
    for title, group in _groups(usage.kind, names, most_used):
        blocks.append(_table(title, [_row(usage, name) for name in group], width) if group else "")
    return "\n\n".join(block for block in blocks if block)


def overview(purposes: Mapping[str, str]) -> str:
    """Return the help of the package: each script and what it is for."""
    scripts = _table("scripts", list(purposes.items()), shutil.get_terminal_size().columns)
    return f"usage: gpt2ft SCRIPT ...\n\n{scripts}\n\n`gpt2ft SCRIPT --help` lists the settings of a script."


def _about_recipes(usage: Usage, width: int) -> Iterator[str]:
    if not usage.recipes:
        return
    yield _fill(
        f"RECIPE is a name from this list or a YAML file of your own; without one it is {usage.default_recipe}. "
        f"Settings change what it says; the defaults below are those of the recipe {usage.recipe}.",
        width,
    )
    yield _table("recipes", usage.recipes, width)


def _groups(kind: type[Section], names: Sequence[str], most_used: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the settings by group, each once."""
    rest = [name for name in names if name not in most_used]
    if most_used:
        yield "most used", list(most_used)
    yield "others" if most_used else "settings", [name for name in rest if "." not in name]
    for section, field in kind.model_fields.items():
        if is_section(field.annotation):
            groups = field.annotation.groups
            placed = {f"{section}.{name}": title for title, group in groups.items() for name in group}
            for title in ("", *groups):
                own = [name for name in rest if name.startswith(f"{section}.") and placed.get(name, "") == title]
                meaning = " ".join((field.annotation.__doc__ or "").split())
                yield f"{section}, {title}" if title else f"{section}: {meaning}", own


def _row(usage: Usage, name: str) -> tuple[str, str]:
    field = field_of(usage.kind, name)
    return f"--{name} {_shape(field.annotation)}".rstrip(), f"{_meaning(field)} {_default(usage, name)}".strip()


def _meaning(field: Any) -> str:
    return " ".join((field.description or "").split())


def _shape(kind: Any) -> str:
    """Return a value as help shows it: its choices, or one word for what it is; nothing for a flag."""
    if kind is bool:
        return ""
    if get_origin(kind) is Annotated:
        return _shape(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return f"{'NAME' if item is str else _shape(item)} ..."
    given = [part for part in get_args(kind) if part is not type(None)]
    return _shape(given[0]) if given else {int: "N", float: "X"}.get(kind, "TEXT")


def _default(usage: Usage, name: str) -> str:
    """Return a default in brackets, unless it is nothing: off, empty, or told by the meaning."""
    field = field_of(usage.kind, name)
    if field.is_required():
        return "(required)"
    value = field.get_default()
    if usage.defaults is not None:
        value = usage.defaults
        for part in name.split("."):
            value = getattr(value, part)
    if value is None or value is False or value in ((), ""):
        return ""
    words = value if isinstance(value, tuple) else [str(value).lower() if value is True else value]
    return f"(default: {' '.join(f'{word:g}' if isinstance(word, float) else str(word) for word in words)})"


def _fill(text: str, width: int) -> str:
    return textwrap.fill(" ".join(text.split()), min(width, WIDEST_TEXT), break_on_hyphens=False)


def _usage(words: Sequence[str], width: int) -> str:
    """Return the words of a usage line, none of them apart on two lines."""
    whole = " ".join(word.replace(" ", "\u00a0") for word in words)
    filled = textwrap.fill(whole, width, subsequent_indent=" " * len("usage: "), break_on_hyphens=False)
    return filled.replace("\u00a0", " ")


def _table(title: str, rows: Sequence[tuple[str, str]], width: int) -> str:
    """Return two columns under a title; a left cell that is too long has a line of its own."""
    longest = max(len(left) for left, _ in rows)
    column = min(longest + 4, max(24, width // 4))
    lines = [_fill(title, width)]
    for left, right in rows:
        indent = " " * column
        text = textwrap.wrap(right, min(width - column, WIDEST_TEXT), break_on_hyphens=False)
        if len(left) + 4 > column:
            words = left.replace(",", ", ") if len(left) + 2 > width else left  # so that no choice stands on two lines
            wrapped = textwrap.wrap(words, width, initial_indent="  ", subsequent_indent="    ")
            lines += [line.replace(", ", ",") for line in wrapped]
            lines += [f"{indent}{line}" for line in text]
        else:
            lines.append(f"  {left:<{column - 2}}{text[0] if text else ''}")
            lines += [f"{indent}{line}" for line in text[1:]]
    return "\n".join(lines)
