"""Every command of every README: its script exists, its flags parse, its recipe loads; Python blocks compile."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from processes import ROOT, run

from gpt2ft.__main__ import SCRIPTS
from gpt2ft.settings.parsing import parse_recipe, parse_script

FOLDERS = ("launch", "accelerate_configs", "gpt2ft", "tests")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md"))
ENDS_A_COMMAND = ("|", "||", "&&", ";", "&", "<", ">", ">>", "2>")
PROGRAMS = ("python", "accelerate", "torchrun", "gpt2ft", "pytest")  # by which a command of ours starts


class Command(NamedTuple):
    page: Path
    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of each fenced block."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened = None
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = (number + 1, line.strip().strip("`"))
        else:
            yield *opened, "\n".join(lines[opened[0] - 1 : number - 1])
            opened = None
    assert opened is None, f"{page} leaves a block open"


def commands(page: Path) -> Iterator[Command]:
    """Each command of the blocks that hold commands, and of transcripts the lines after `$ `."""
    for first, language, text in blocks(page):
        if language not in ("", "bash", "sh", "console"):
            continue
        lines = re.sub(r"\\\n", "  ", text).splitlines()
        is_transcript = any(line.startswith("$ ") for line in lines)
        for offset, line in enumerate(lines):
            if is_transcript and not line.startswith("$ "):
                continue
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # a quoted argument of several lines: no command of ours has one
                words = []
            yield from (Command(page, first + offset, part) for part in split(words) if starts_a_command(part))


def split(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    skips = False
    for word in words:
        if word in ENDS_A_COMMAND:
            yield part
            part, skips = [], word in ("<", ">", ">>", "2>")
        elif not skips:
            part.append(word)
    yield part


def starts_a_command(words: list[str]) -> bool:
    return without_variables(words)[:1] in [[program] for program in PROGRAMS]


def without_variables(words: list[str]) -> list[str]:
    position = 0
    while position < len(words) and re.match(r"[A-Z_0-9]+=", words[position]):
        position += 1
    return words[position:]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The name and the arguments of the script of ours that a command starts."""
    words = without_variables(words)
    for position, word in enumerate(words):
        path = re.fullmatch(r"launch/(\w+)\.py", word)
        if path:
            assert (ROOT / word).is_file()
            return path[1], words[position + 1 :]
        if word == "gpt2ft" and (position == 0 or words[position - 1] == "-m"):
            return (words[position + 1], words[position + 2 :]) if len(words) > position + 1 else None
    return None


COMMANDS = [command for page in PAGES for command in commands(page)]
OURS = [command for command in COMMANDS if script_of(command.words)]


def is_a_pattern(words: list[str]) -> bool:
    """A line that shows a grammar and not a command, such as `launch/sft.py [RECIPE]`."""
    return any(re.search(r"\[[A-Z]|\.\.\.|^[A-Z_]{3,}$", word) for word in words)


def test_there_are_pages_and_commands():
    assert len(PAGES) >= 10
    assert len(OURS) >= 40
    assert {script_of(command.words)[0] for command in OURS} == set(SCRIPTS)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_scripts_exist_and_their_flags_parse(command, monkeypatch, capsys):
    name, arguments = script_of(command.words)
    assert name in SCRIPTS, f"{command}: there is no script {name}"
    if is_a_pattern(arguments) or {"-h", "--help"} & set(arguments):
        return
    monkeypatch.chdir(ROOT)
    script = SCRIPTS[name]
    arguments = [word.replace("$W", "tea") if word != "$W" else "tea" for word in arguments]
    try:
        if script.recipe is not None:
            parse_recipe(script.settings, script.recipe, arguments)
        else:
            parse_script(script.settings, script.positional, arguments)
    except SystemExit:
        pytest.fail(f"{command}: {' '.join(command.words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--config_file" in c.words], ids=str)
def test_configs_exist(command):
    file = command.words[command.words.index("--config_file") + 1]
    if file.startswith("accelerate_configs/") and file.endswith(".yaml"):
        assert yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if without_variables(c.words)[0] in ("pytest", "python")], ids=str
)
def test_files_that_python_and_pytest_are_given_exist(command):
    files = [word.partition("::")[0] for word in command.words if re.match(r"tests/[\w/]+(\.py)?(::|$)", word)]
    assert all((ROOT / file).exists() for file in files), files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_python_compiles(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing
    for line, language, block in blocks(page):
        if language == "python":
            compile(textwrap.dedent(block), f"{page}:{line}", "exec")


def fast(command: Command) -> bool:
    """Those that take seconds and need nothing but the package."""
    _, arguments = script_of(command.words)
    return bool({"--help", "-h", "--dry_run", "--show"} & set(arguments)) and not any(
        word.startswith(("oasst", "ultrafeedback", "$", "my-")) or "/" in word for word in arguments
    )


FAST = {tuple(command.words): command for command in OURS if fast(command)}


def test_some_are_run():
    assert len(FAST) >= 2


@pytest.mark.parametrize("command", FAST.values(), ids=str)
def test_those_that_take_seconds_run(command, tmp_path):
    assert run(without_variables(command.words)).stdout
