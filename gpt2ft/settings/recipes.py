"""Recipes: settings in YAML, by section, in launch/recipes or in a file of one's own; one may build on another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from gpt2ft.command_line import words_to_start
from gpt2ft.errors import SettingsError, reason
from gpt2ft.settings import strict_yaml
from gpt2ft.settings.layers import over
from gpt2ft.settings.sections import Section

_CLONE = Path(__file__).resolve().parents[2] / "launch" / "recipes"
RECIPES = _CLONE if _CLONE.is_dir() else Path(__file__).resolve().parents[1] / "recipes"  # of an installed package
ENDINGS = (".yaml", ".yml")

Settings = TypeVar("Settings", bound=Section)


def find_recipe(kind: type[Section], recipe: str) -> Path:
    """Return the file of a recipe, which is a name in launch/recipes or a path.

    Raises:
        SettingsError: if there is none; with the nearest one, or what was named instead.
    """
    file, named = Path(recipe), RECIPES / f"{recipe}.yaml"
    if "/" not in recipe and named.is_file():
        return named
    if file.is_file() and file.suffix.lower() in (*ENDINGS, ""):
        return file
    from gpt2ft.settings.refusals import no_recipe

    raise SettingsError(no_recipe(kind, recipe))


def list_recipes(kind: type[Section]) -> Iterator[tuple[str, str]]:
    """Yield each recipe in launch/recipes that a script takes, with the first sentence of its comment."""
    for file in sorted(RECIPES.glob("*.yaml"), key=lambda file: file.stem):
        if ("dpo" in read_layers(kind, file)) == ("dpo" in kind.model_fields):
            yield file.stem, _first_sentence(file.read_text(encoding="utf-8"))


def _first_sentence(recipe: str) -> str:
    lines = []
    for line in recipe.splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# ").strip())
    first, end, _ = " ".join(lines).partition(". ")
    return f"{first}." if end else first


def read_recipe(kind: type[Settings], file: Path) -> Settings:
    """Return the settings in a recipe.

    Raises:
        SettingsError: naming the file and every key that does not fit.
    """
    values = read_layers(kind, file)
    _check_kind(kind, file, values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        from gpt2ft.settings.refusals import explain

        raise SettingsError("\n".join(explain(kind, str(file), error))) from error


def read_layers(kind: type[Section], file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a recipe holds, over the one that it names as its `base`, unchecked.

    Args:
        above: the recipes that build on this one.

    Raises:
        SettingsError: if one of them cannot be read, does not exist or leads back to a recipe above.
    """
    values = read_sections(file)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        from gpt2ft.settings.refusals import shown

        raise SettingsError(f"{file}: `base` must be the name or the path of a recipe, but is {shown(base)}")
    try:
        below = find_recipe(kind, str(file.parent / base) if is_path(base) else base)
    except SettingsError as error:
        raise SettingsError(f"{file}: `base`: {error}") from error
    chain = (*above, file)
    if any(below.samefile(other) for other in chain):
        names = ", then ".join(map(str, (*chain[1:], below)))
        raise SettingsError(f"{chain[0]}: `base` must not lead back to a recipe above it, but leads to {names}")
    return over(read_layers(kind, below, chain), values)


def is_path(recipe: str) -> bool:
    return recipe.endswith(ENDINGS) or "/" in recipe


def read_sections(file: Path) -> dict[str, Any]:
    """Return what a recipe holds, unchecked.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        values = strict_yaml.load(file)
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} must be text in UTF-8, but is not") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        from gpt2ft.settings.refusals import no_yaml

        raise SettingsError(no_yaml(file, error)) from error
    if not isinstance(values, dict):
        from gpt2ft.settings.refusals import shown

        found = "is empty" if values is None else f"holds {shown(values)}"
        raise SettingsError(f"{file} must hold settings by section, as `training: {{epochs: 3}}`, but {found}")
    return values


def _check_kind(kind: type[Section], file: Path, values: dict[str, Any]) -> None:
    """Raise SettingsError if a file holds settings of another script, or of another program."""
    if {"compute_environment", "distributed_type", "num_processes"} & values.keys():
        raise SettingsError(f"{file} is no recipe but for the launcher: `accelerate launch --config_file {file} ...`")
    takes_pairs = "dpo" in kind.model_fields
    scripts = {name: f"`{' '.join(words_to_start(name))}`" for name in ("sft", "reference", "dpo")}
    if "dpo" in values and not takes_pairs:
        scripts = f"{scripts['reference']} and {scripts['dpo']}"
        raise SettingsError(f"{file} is a recipe for {scripts}: it has a section `dpo`")
    if "dpo" not in values and takes_pairs:
        raise SettingsError(f"{file} is a recipe for {scripts['sft']}: it has no section `dpo`")


def to_yaml(settings: Section) -> str:
    """Return the settings as a recipe that gives them again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
