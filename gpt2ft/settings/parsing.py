"""Read settings: defaults <- YAML recipe <- command line, checked before anything heavy is imported.

    accelerate launch launch/sft.py [RECIPE] [--section.key value ...]

All problems of one source are reported together, an unknown setting with the one that is meant. pydantic checks the
values of both sources. Nothing here imports torch.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from gpt2ft.errors import SettingsError, fail, is_first_on_machine
from gpt2ft.settings.sections import Section, field_of, names_of

Settings = TypeVar("Settings", bound=Section)
Values = dict[str, Any]  # of settings, still to be checked
SWITCHES = ("true", "false", "yes", "no", "on", "off", "1", "0")  # what may follow a flag
_NAME = re.compile(r"[-–—]{1,2}[A-Za-z][\w.-]*(=.*)?", re.DOTALL)  # long dashes come from pages that are copied from


def parse_recipe(
    kind: type[Settings], default_recipe: str, arguments: Sequence[str], purpose: str | None = None
) -> Settings:
    """Return the settings of a training run; exits with 2 and all problems if there are any.

    Args:
        arguments: of the script. The first that is neither a setting nor a value is the name or path of a recipe.
        purpose: of the script, for its help.
    """
    from gpt2ft.settings.recipes import list_recipes, read_recipe  # by no script that takes none

    try:
        words = sort_words(kind, arguments)
        refuse_problems(_without_dashes(kind, words.loose))
        file = _recipe_of(kind, words, default_recipe)
        defaults = read_recipe(kind, file)
        if wants_help(arguments):
            from gpt2ft.settings.help import Usage, help_text

            usage = Usage(kind, purpose, "RECIPE", default_recipe, defaults, file.stem, tuple(list_recipes(kind)))
            end_with(help_text(usage))
        problems = [f"command line: `{word}` belongs to no setting" for word in words.loose[1:]]
        problems += () if words.loose else _recipes_among_values(kind, words.values)
        settings = with_values(kind, words, defaults, problems)
        if getattr(settings, "output", "") is None:
            settings = settings.model_copy(update={"output": f"runs/{file.stem}"})
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_script(
    kind: type[Settings], positional: str, arguments: Sequence[str], purpose: str | None = None
) -> Settings:
    """Return the settings of a script without recipes; exits with 2 and all problems if there are any.

    Args:
        positional: the setting that a word gives which is neither a setting nor a value.
        purpose: of the script, for its help.
    """
    try:
        takes_many = _is_list(kind, positional)
        if wants_help(arguments):
            from gpt2ft.settings.help import Usage, help_text

            end_with(help_text(Usage(kind, purpose, positional.upper() + " ..." * takes_many)))
        words = sort_words(kind, arguments, most_loose=len(arguments) if takes_many else 1)
        refuse_problems(_without_dashes(kind, words.loose))
        if words.loose:
            given = [*words.loose, *_as_list(words.values.get(positional, ()))]
            words.values[positional] = given if takes_many or len(given) > 1 else given[0]
        settings = with_values(kind, words)
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def refuse_problems(problems: Iterable[str]) -> None:
    """Raise SettingsError with all problems, if there are any."""
    if found := list(problems):
        raise SettingsError("\n".join(found))


def wants_help(arguments: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def end_with(text: str) -> None:
    """Print a text, once on each machine, and end the script."""
    if is_first_on_machine():
        print(text)
    sys.exit(0)


# --- the command line -----------------------------------------------------------------------------------------------


class Missing:
    """The value of a setting that is named and given none."""

    def __str__(self) -> str:
        return "missing"


@dataclass(frozen=True)
class Words:
    """Command line, sorted.

    Attributes:
        values: by dotted name, still to be checked.
        loose: words that are neither settings nor their values.
        follows: the setting before the first of them, empty if there is none.
        unknown: names of settings that there are not.
    """

    values: Values
    loose: list[str]
    unknown: list[str]
    follows: str = ""


def sort_words(kind: type[Section], arguments: Sequence[str], most_loose: int = 1) -> Words:
    """Sort the words of a command line.

    A list takes all words up to the next setting, and those of each time that it is named; of any other setting named
    twice the last one counts. A flag takes a word that switches it, others one word.

    Args:
        most_loose: words that may stand anywhere without a setting; further ones are taken to belong to the setting
            before them, where they are refused.
    """
    known = {*names_of(kind)}
    given: dict[str, list[str]] = {}
    loose, unknown, name, follows = [], [], "", ""
    for word in arguments:
        if _is_name(word):
            name, is_attached, value = word.lstrip("-–—").partition("=")
            name = name.replace("-", "_")
            if name not in known:
                unknown.append(name)
            elif not _is_list(kind, name) or name not in given:
                given[name] = []
            if name in known and is_attached:
                given[name].append(value)
        elif name in unknown:
            continue
        elif name and _takes(kind, name, given[name], word):
            given[name].append(word)
        elif not name or len(loose) < most_loose:
            follows = follows if loose else name
            loose.append(word)
        else:
            given[name].append(word)
    return Words({name: _value(kind, name, values) for name, values in given.items()}, loose, unknown, follows)


def _recipe_of(kind: type[Section], words: Words, default_recipe: str) -> Path:
    """Return the file of the recipe that is named; where there is none the name may have been meant as a value."""
    from gpt2ft.settings.recipes import find_recipe

    try:
        return find_recipe(kind, words.loose[0] if words.loose else default_recipe)
    except SettingsError as error:
        if not words.follows:
            raise
        takes = "true or false" if field_of(kind, words.follows).annotation is bool else "one value"
        raise SettingsError(f"{error}; it follows `--{words.follows}`, which takes {takes}") from error


def with_values(
    kind: type[Settings], words: Words, defaults: Settings | None = None, problems: Iterable[str] = ()
) -> Settings:
    """Return the settings of a command line, over `defaults`.

    Raises:
        SettingsError: with `problems`, every setting that does not exist and every value that does not fit.
    """
    problems = [*problems, *_unknown_settings(kind, words.unknown)]
    values = _by_section(words.values)
    if defaults is not None:
        from gpt2ft.settings.layers import over

        below = defaults.model_dump(exclude_unset=True)
        values = below | over(below, values)
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        from gpt2ft.settings.refusals import explain

        problems += explain(kind, "command line", error)
    refuse_problems(problems)
    return settings


def _unknown_settings(kind: type[Section], unknown: Sequence[str]) -> Iterator[str]:
    for name in unknown:
        from gpt2ft.settings.refusals import no_setting

        yield f"command line: {no_setting(kind, name)}"


def _by_section(values: Values) -> Values:
    """Return values with dotted names as a recipe would hold them."""
    sections: Values = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = sections
        for section in path:
            place = place.setdefault(section, {})
        place[last] = value
    return sections


def _is_name(word: str) -> bool:
    return _NAME.fullmatch(word) is not None and word not in ("-inf", "-nan")


def _is_list(kind: type[Section], name: str) -> bool:
    annotation = field_of(kind, name).annotation
    return any(get_origin(part) is tuple for part in (annotation, *get_args(annotation)))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _takes(kind: type[Section], name: str, values: Sequence[str], word: str) -> bool:
    """Return True if a word that follows a setting is sure to be its value."""
    if field_of(kind, name).annotation is bool:
        return not values and word.lower() in SWITCHES
    return not values or _is_list(kind, name)


def _value(kind: type[Section], name: str, words: list[str]) -> Any:
    """Return what pydantic is to read of the words that follow the name of a setting."""
    if "" in words:
        return Missing()
    if _is_list(kind, name):
        return tuple(words)
    if not words:
        return True if field_of(kind, name).annotation is bool else Missing()
    return words[0] if len(words) == 1 else words


def _without_dashes(kind: type[Section], loose: Sequence[str]) -> Iterator[str]:
    for word in loose:
        if word.partition("=")[0] in names_of(kind):
            yield f"command line: `{word}` must begin with dashes: `--{word}`"


def _recipes_among_values(kind: type[Section], values: Values) -> Iterator[str]:
    """Point out a recipe that a list has taken for its last value; the name of bundled data is no recipe there."""
    from gpt2ft.settings.recipes import ENDINGS, list_recipes

    last_of = {name: str(value[-1]) for name, value in values.items() if isinstance(value, tuple) and value}
    names = {name for name, _ in list_recipes(kind)} - {"quickstart"} if last_of else ()
    for name, last in last_of.items():
        if last in names or last.endswith(ENDINGS):
            yield f"command line: `{last}`, the last value of `{name}`, is a recipe: let it stand first"
