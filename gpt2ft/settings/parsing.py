"""Read settings: defaults <- YAML recipe <- command line, checked before anything heavy is imported.

    accelerate launch launch/sft.py [RECIPE] [--section.key value ...]

RECIPE is the name of a file in launch/recipes or a path to one, and may build on another (layers.py). All problems of
one source are reported together, an unknown setting with the nearest known one. tyro knows the grammar of the command
line and writes the help; pydantic checks the values of both sources. Nothing here imports torch.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import tyro
import yaml
from pydantic import ValidationError
from tyro import constructors

from gpt2ft.command_line import program_name
from gpt2ft.errors import SettingsError, fail, is_first_on_machine
from gpt2ft.settings.layers import over
from gpt2ft.settings.sections import RENAMED, Section

_CLONE = Path(__file__).resolve().parents[2] / "launch" / "recipes"
RECIPES = _CLONE if _CLONE.is_dir() else Path(__file__).resolve().parents[1] / "recipes"  # of an installed package

_NOT_GIVEN = object()  # of a setting without a default

Settings = TypeVar("Settings", bound=Section)


def refuse_problems(problems: Iterable[str]) -> None:
    """Raise SettingsError with all problems, if there are any."""
    if found := list(problems):
        raise SettingsError("\n".join(found))


def parse_recipe(kind: type[Settings], default_recipe: str, arguments: Sequence[str]) -> Settings:
    """Return the settings of a training run; exits with 2 and all problems if there are any.

    Args:
        arguments: of the script. The first is the name or path of a recipe, unless it is a setting.
    """
    try:
        arguments = list(arguments)
        recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default_recipe
        file = _recipe_file(recipe)
        below = read_recipe(kind, file)
        settings = parse_flags(kind, arguments, below, recipe=file.stem)
        sections = over(below.model_dump(exclude_unset=True), _given(settings, arguments))
        settings = kind.model_validate(settings.model_dump() | sections)
        if getattr(settings, "output", "") is None:
            settings = settings.model_copy(update={"output": f"runs/{file.stem}"})
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_script(kind: type[Settings], positional: str, arguments: Sequence[str]) -> Settings:
    """Return the settings of a script without recipes; exits with 2 and all problems if there are any.

    Args:
        positional: the setting that the first argument gives, if it stands without a name.
    """
    try:
        arguments = list(arguments)
        if arguments and not arguments[0].startswith("-"):
            arguments.insert(0, f"--{positional}")
        settings = parse_flags(kind, arguments)
        refuse_problems(settings.problems())
        return settings
    except SettingsError as error:
        fail(str(error))


def parse_flags(
    kind: type[Settings], arguments: Sequence[str], defaults: Settings | None = None, recipe: str = ""
) -> Settings:
    """Return the settings on the command line, over `defaults`.

    Raises:
        SettingsError: naming every setting that does not exist and every value that does not fit.
    """
    program, description = program_name(), inspect.getdoc(kind) or ""
    if recipe:
        program, description = f"{program} [RECIPE]", f"{description}\n\nDefaults are those of the recipe {recipe}."
    registry = constructors.ConstructorRegistry()
    registry.struct_rule(_section_of_words)
    values, unknown = tyro.cli(
        kind,
        args=arguments,
        prog=program,
        description=description,
        default=tyro.MISSING_NONPROP if defaults is None else defaults,
        return_unknown_args=True,
        registry=registry,
        use_underscores=True,
        console_outputs=is_first_on_machine(),
    )
    problems = list(_unknown_words(kind, unknown))
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        problems += explain(kind, "command line", error)
    refuse_problems(problems)
    return settings


def read_recipe(kind: type[Settings], file: Path) -> Settings:
    """Return the settings in a recipe.

    Raises:
        SettingsError: naming the file and every key that does not fit.
    """
    values = read_layers(file)
    if "dpo" in values and "dpo" not in kind.model_fields:
        raise SettingsError(f"{file} is a recipe for launch/reference.py and launch/dpo.py: it has a section `dpo`")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(explain(kind, str(file), error))) from error


def read_layers(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
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
        raise SettingsError(f"{file}: `base` must be the name or the path of a recipe, but is {base!r}")
    try:
        below = _recipe_file(str(file.parent / base) if _is_path(base) else base)
    except SettingsError as error:
        raise SettingsError(f"{file}: `base`: {error}") from error
    chain = (*above, file)
    if any(below.samefile(other) for other in chain):
        names = ", then ".join(map(str, (*chain[1:], below)))
        raise SettingsError(f"{chain[0]}: `base` must not lead back to a recipe above it, but leads to {names}")
    return over(read_layers(below, chain), values)


def read_sections(file: Path) -> dict[str, Any]:
    """Return what a recipe holds, unchecked.

    Raises:
        SettingsError: if it cannot be read.
    """
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
    """Return the settings as a recipe that gives them again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _is_path(recipe: str) -> bool:
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe


def _recipe_file(recipe: str) -> Path:
    if _is_path(recipe):
        if Path(recipe).is_file():
            return Path(recipe)
        raise SettingsError(f"the recipe {recipe} does not exist")
    file = RECIPES / f"{recipe}.yaml"
    if file.is_file():
        return file
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise SettingsError(f"there is no recipe {recipe!r}{nearest_name(recipe, names)}; there are: {', '.join(names)}")


# --- the command line -----------------------------------------------------------------------------------------------


def _section_of_words(info: constructors.StructTypeInfo) -> constructors.StructConstructorSpec | None:
    """Have tyro give every setting of a section its words, unread, or its default.

    On its own tyro reads one value after the other and ends at the first that does not fit. So it is only asked which
    words belong to which setting, any number of them, and pydantic finds all that is wrong.
    """
    if not _is_section(info.type):
        return None
    fields = []
    for name, field in info.type.model_fields.items():
        kind, default = field.annotation, getattr(info.default, name, field.get_default())
        help_text = field.description or inspect.getdoc(kind) or ""
        if not _is_section(kind):
            kind = _words_for(kind)
        if field.is_required():
            kind, default = Annotated[kind, tyro.conf.arg(help_behavior_hint="(required)")], _NOT_GIVEN
        fields.append(constructors.StructFieldSpec(name, kind, default, " ".join(help_text.split())))
    return constructors.StructConstructorSpec(dict, tuple(fields))


def _words_for(kind: Any) -> Any:
    """Return a type that takes any number of words and is described as tyro describes `kind`."""
    spec = constructors.ConstructorRegistry.get_primitive_spec(constructors.PrimitiveTypeInfo.make(kind, set()))
    metavar = "[{true,false}]" if kind is bool else spec.metavar
    conversions = {"instance_from_str": partial(_value, kind), "str_from_instance": _shown}
    return Annotated[object, replace(spec, nargs="*", choices=None, metavar=metavar, **conversions)]


def _value(kind: Any, words: list[str]) -> Any:
    """Return what pydantic is to read of the words that follow the name of a setting."""
    if get_origin(kind) is tuple:
        return words
    if kind is bool and not words:
        return True
    if words == ["None"]:
        return None
    return words[0] if len(words) == 1 else words


def _shown(default: Any) -> list[str]:
    """Return the words that would give a default."""
    if isinstance(default, tuple):
        return list(default)
    return [str(default).lower() if isinstance(default, bool) else str(default)]


def _given(settings: Section, arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the settings that the command line names, by section."""
    given: dict[str, dict[str, Any]] = {}
    for word in arguments:
        section, _, name = word.removeprefix("--").partition("=")[0].replace("-", "_").partition(".")
        if word.startswith("--") and name:
            given.setdefault(section, {})[name] = getattr(getattr(settings, section), name)
    return given


def _unknown_words(kind: type[Section], words: Sequence[str]) -> Iterator[str]:
    """Explain the words that tyro has found no setting for; those after an unknown name are its values."""
    names = [word for word in words if word.startswith("--")]
    for word in takewhile(lambda word: not word.startswith("--"), words):
        yield f"command line: `{word}` belongs to no setting"
    for name in names:
        name = name[2:].partition("=")[0].replace("-", "_")
        yield f"command line: {_no_setting(name, list(_names(kind)))}"


# --- what is wrong --------------------------------------------------------------------------------------------------


def explain(kind: type[Section], source: str, error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{source}: {_no_setting(key, [*kind.model_fields, *_names(kind)])}"
        elif problem["input"] is _NOT_GIVEN or problem["type"] == "missing":
            yield f"{source}: `{key}` must be given"
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            found = "missing" if problem["input"] == [] else repr(problem["input"])
            yield f"{source}: `{key}`: {message}, but is {found}"


def _no_setting(name: str, known: Sequence[str]) -> str:
    if RENAMED.get(name) in known:
        return f"the setting `{name}` is called `{RENAMED[name]}` now"
    return f"there is no setting `{name}`{nearest_name(name, known)}"


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean `x`?)` for the known name most like `name`; empty if none is."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean `{nearest[0]}`?)" if nearest else ""


def _names(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting."""
    for name, field in kind.model_fields.items():
        if _is_section(field.annotation):
            yield from _names(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
