"""Refusals of settings in one grammar: "`key` must be A, but is B", whatever the value and wherever it stands.

Imported where a mistake has been made, and so by no script that runs.
"""

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gpt2ft.command_line import words_to_start
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.recipes import ENDINGS, is_path, list_recipes
from gpt2ft.settings.sections import RENAMED, Section, is_section, names_of
from gpt2ft.settings.suggestions import either, nearest_name, nearest_path, setting_meant
from gpt2ft.settings.training import PreferenceSettings

LIMITS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}


def explain(kind: type[Section], source: str, error: ValidationError) -> Iterator[str]:
    """Yield each fault once, as a sentence.

    Args:
        source: of the settings, as a person would look for it: a file, or the command line.
    """
    said = set()
    for problem in error.errors(include_url=False):
        path, field = _find(kind, problem["loc"])
        key = ".".join(path)
        if field is None:
            sentence = no_setting(kind, key)
        elif problem["type"] == "missing":
            sentence = f"`{key}` must be given: {_meaning(field)}"
        elif problem["type"] == "value_error":
            sentence = f"`{key}` {problem['ctx']['error']}"
        elif (
            isinstance(problem["input"], list) and not is_section(field.annotation) and len(path) == len(problem["loc"])
        ):
            sentence = f"`{key}` must be a single value, in quotes if it has spaces, but is {shown(problem['input'])}"
        else:
            sentence = f"`{key}` must be {_requirement(field)}, but {_found(problem, path)}"
        if sentence not in said:
            said.add(sentence)
            yield f"{source}: {sentence}"


def no_setting(kind: type[Section], name: str) -> str:
    """Say that there is no setting of this name, and which may be meant."""
    known = [*names_of(kind)]
    if RENAMED.get(name) in known:
        return f"the setting `{name}` is called `{RENAMED[name]}` now"
    if is_section(getattr(kind.model_fields.get(name), "annotation", None)):
        meant = setting_meant(name, known) or f": its settings begin with `{name}.`"
        return f"`{name}` is a section, not a setting{meant}"
    if name.startswith("dpo.") and "dpo" not in kind.model_fields:
        return f"there is no setting `{name}` here: it belongs to `{' '.join(words_to_start('dpo'))}`"
    sections = [section for section in kind.model_fields if section not in known]
    meant = setting_meant(name, known, sections)
    of_dpo = [f"dpo.{field}" for field in PreferenceSettings.model_fields]
    if not meant and "training" in kind.model_fields and (meant := setting_meant(name, of_dpo)):
        return f"there is no setting `{name}` here: it belongs to `{' '.join(words_to_start('dpo'))}`{meant}"
    return f"there is no setting `{name}`{meant}"


def no_recipe(kind: type[Section], recipe: str) -> str:
    """Say that there is no such recipe, and what is meant, or what it is that is named."""
    file = Path(recipe)
    if (file / "recipe.yaml").is_file():
        return f"{recipe} is a run and not a recipe: {file / 'recipe.yaml'} is its recipe"
    if file.is_dir():
        return f"{recipe} is a folder and not a recipe, which is a file that ends in .yaml"
    if file.is_file():
        return f"{recipe} is not a recipe, which ends in .yaml; data are given by `--data.train {recipe}`"
    if recipe in PUBLISHED_MODELS:
        return f"{recipe} is a model and not a recipe: give it by `--model.path {recipe}`"
    beside = [other for other in sorted(file.parent.glob("*")) if other.suffix in ENDINGS]
    if is_path(recipe):
        return f"the recipe {recipe} does not exist{nearest_path(recipe, beside)}"
    names = [name for name, _ in list_recipes(kind)]
    meant = nearest_name(recipe, names) or nearest_path(recipe, beside)
    return f"there is no recipe {recipe!r}{meant}; there are: {', '.join(names)}"


def no_yaml(file: Path, error: Exception) -> str:
    """Say where a file ends to be YAML, with the line and its usual fault."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{file} is not valid YAML: a key, a date or a character in it cannot be read"
    lines = file.read_text(encoding="utf-8").splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if mark.line >= len(lines) - 1 and not line[mark.column :].strip():
        return f"{file} is not valid YAML: a bracket or a quote is open at its end, in line {mark.line + 1}"
    if "\t" in line[: mark.column + 1]:
        fault = "indent with spaces, not with tabs"
    elif "!" in line:
        fault = "words that begin with ! stand in quotes"
    else:
        fault = "look for indentation, brackets and quotes, here and in the line above"
    return f"{file} is not valid YAML in line {mark.line + 1}, `{line.strip()}`: {fault}"


def shown(value: Any) -> str:
    """Return a value as it would be written, on one line and not too long."""
    if value is None:
        text = "empty"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = "a section"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join('[...]' if isinstance(item, list) else shown(item) for item in value[:9])}]"
    else:
        text = repr(value) if isinstance(value, str) and not _is_number(value) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(text: str) -> bool:
    try:
        return bool(text.strip()) and float(text) is not None
    except ValueError:
        return False


def requirement(kind: Any, limits: tuple[Any, ...] = ()) -> str:
    """Return what a value of a setting must be, in words."""
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        return requirement(kind, tuple(limit for note in notes for limit in getattr(note, "metadata", [note])))
    if get_origin(kind) in (Union, UnionType):
        words = [requirement(part, limits) for part in get_args(kind) if part is not type(None)]
        return f"{', '.join(words)}, or none" if type(None) in get_args(kind) else " or ".join(words)
    if get_origin(kind) is Literal:
        return either(get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return f"a list of {either(get_args(item), 'and') if get_origin(item) is Literal else 'words'}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    ends = {name: end for limit in limits if is_dataclass(limit) for name, end in asdict(limit).items()}
    bounds = " and ".join(f"{LIMITS[name]} {end:g}" for name, end in ends.items() if name in LIMITS)
    return f"{words.get(kind, 'a section with settings of its own')} {bounds}".strip()


def _requirement(field: FieldInfo) -> str:
    return requirement(field.annotation, tuple(field.metadata))


def _meaning(field: FieldInfo) -> str:
    """Return the choices of a setting that is missing, else the first sentence of its help."""
    if get_origin(field.annotation) is Literal:
        return _requirement(field)
    first = " ".join((field.description or "").split()).partition(". ")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def _find(kind: type[Section], place: tuple[Any, ...]) -> tuple[list[str], FieldInfo | None]:
    """Return the names on the way to a fault, up to the setting it belongs to, and that setting if there is one."""
    path, field = [], None
    for part in map(str, place):
        path.append(part)
        field = kind.model_fields.get(part)
        if field is None or not is_section(field.annotation):
            break
        kind = field.annotation
    return path, field


def _found(problem: Any, path: list[str]) -> str:
    is_item = isinstance(problem["loc"][-1], int)  # of a list; else a word may tell which of several types
    found = f"{'holds' if is_item else 'is'} {shown(problem['input'])}"
    if is_item and isinstance(problem["input"], str) and "," in problem["input"]:
        return f"{found}: words are set apart by spaces"
    needs_quotes = problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float)
    return f"{found}: write it in quotes" if needs_quotes else found
