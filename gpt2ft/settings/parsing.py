"""Settings: defaults <- YAML recipe <- command line, checked before anything heavy is imported.

    accelerate launch launch/sft.py [RECIPE] [--section.key value ...]

RECIPE is the name of a file in launch/recipes or a path to one. All problems of one source are reported
together, an unknown key with the nearest known one. Nothing here imports torch.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError

from gpt2ft.command_line import program_name
from gpt2ft.errors import SettingsError, fail, speaks_for_its_machine
from gpt2ft.settings.sections import Section

_CLONE = Path(__file__).resolve().parents[2] / "launch" / "recipes"
RECIPES = _CLONE if _CLONE.is_dir() else Path(__file__).resolve().parents[1] / "recipes"  # of an installed package

Settings = TypeVar("Settings", bound=Section)


def refuse_problems(problems: Iterable[str]) -> None:
    """Raises SettingsError with all problems, if there are any."""
    if found := list(problems):
        raise SettingsError("\n".join(found))


def parse_recipe(kind: type[Settings], default_recipe: str, arguments: Sequence[str]) -> Settings:
    """Settings of a training run from the arguments of its script; exits with 2 and all problems if there are any."""
    try:
        arguments = list(arguments)
        recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default_recipe
        file = _recipe_file(recipe)
        settings = parse_flags(kind, arguments, defaults=read_yaml(kind, file), recipe=file.stem)
        if getattr(settings, "output", "") is None:
            settings = settings.model_copy(update={"output": f"runs/{file.stem}"})
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_script(kind: type[Settings], first: str, arguments: Sequence[str]) -> Settings:
    """Settings of a script without recipes, whose first bare argument stands for the setting `first`."""
    try:
        arguments = list(arguments)
        if arguments and not arguments[0].startswith("-"):
            arguments.insert(0, f"--{first}")
        settings = parse_flags(kind, arguments)
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_flags(
    kind: type[Settings], arguments: Sequence[str], defaults: dict[str, Any] | None = None, recipe: str = ""
) -> Settings:
    """The command line over `defaults`.

    Raises:
        SettingsError: naming every setting that does not exist and every value that does not fit.
    """
    import tyro

    arguments = _normal_booleans(kind, arguments)
    if not {"-h", "--help"} & set(arguments) and (problems := list(_flag_problems(kind, arguments, defaults or {}))):
        raise SettingsError("\n".join(problems))
    base = kind(**defaults) if defaults is not None else None
    program, description = program_name(), (kind.__doc__ or "").strip()
    if recipe:
        program, description = f"{program} [RECIPE]", f"{description}\n\nDefaults are those of the recipe {recipe}."
    return tyro.cli(
        kind,
        args=arguments,
        prog=program,
        description=description,
        default=tyro.MISSING_NONPROP if base is None else base,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        console_outputs=speaks_for_its_machine(),
    )


def read_yaml(kind: type[Section], file: Path) -> dict[str, Any]:
    """The values in a recipe, checked.

    Raises:
        SettingsError: naming the file and every key that does not fit.
    """
    values = read_sections(file)
    if "dpo" in values and "dpo" not in kind.model_fields:
        raise SettingsError(f"{file} is a recipe for launch/reference.py and launch/dpo.py: it has a section `dpo`")
    try:
        return kind.model_validate(values).model_dump()
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(kind, str(file), error))) from error


def read_sections(file: Path) -> dict[str, Any]:
    """What a recipe holds, unchecked.

    Raises:
        SettingsError: if it cannot be read.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold settings by section, but holds {type(values).__name__}")
    return values


def to_yaml(settings: Section) -> str:
    """The settings as a recipe that gives them again."""
    import yaml

    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _recipe_file(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        if Path(recipe).is_file():
            return Path(recipe)
        raise SettingsError(f"the recipe {recipe} does not exist")
    file = RECIPES / f"{recipe}.yaml"
    if file.is_file():
        return file
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise SettingsError(f"there is no recipe {recipe!r}{nearest_name(recipe, names)}; there are: {', '.join(names)}")


def _explain(kind: type[Section], source: str, error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = [*kind.model_fields, *(name for name, _ in _fields(kind))]
            yield f"{source}: there is no setting `{key}`{nearest_name(key, known)}"
        elif problem["type"] == "missing":
            yield f"{source}: `{key}` must be given"
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            yield f"{source}: `{key}`: {message}, but is {problem['input']!r}"


def nearest_name(name: str, known: Sequence[str]) -> str:
    """` (did you mean `x`?)` for the known name most like `name`; empty if none is."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean `{nearest[0]}`?)" if nearest else ""


def _fields(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name, with its type."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation


def _flag_problems(kind: type[Section], arguments: Sequence[str], defaults: dict[str, Any]) -> Iterator[str]:
    """Unknown names and values that do not fit, all of them: tyro ends at the first. The shape is left to tyro."""
    words: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            words[name] = [value] if equals else []
        elif words:
            words[name].append(argument)
    known = dict(_fields(kind))
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in defaults.items()}
    for name, given in words.items():
        *sections, key = name.split(".")
        is_list = name in known and get_origin(known[name]) is tuple
        if name not in known:
            yield f"command line: there is no setting `{name}`{nearest_name(name, list(known))}"
        elif is_list or len(given) == 1:
            section = values.setdefault(sections[0], {}) if sections else values
            section[key] = given if is_list else None if given == ["None"] else given[0]
    try:
        kind.model_validate(values)
    except ValidationError as error:
        yield from _explain(kind, "command line", error)


def _normal_booleans(kind: type[Section], arguments: Sequence[str]) -> list[str]:
    """A bare `--flag` becomes `--flag True`; `true` and `false` become Python's."""
    flags = {f"--{name}" for name, annotation in _fields(kind) if annotation is bool}
    normal: list[str] = []
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):  # --dry-run is --dry_run
            name = "--" + name[2:].replace("-", "_")
            argument = name + equals + value
        if name in flags and equals:
            normal += [name, value.capitalize()]
        elif normal and normal[-1] in flags:
            normal.append(argument.capitalize())
        else:
            normal.append(argument)
            if argument in flags and following.startswith("--"):
                normal.append("True")
    return normal
