"""Fixtures that tests of settings share: a recipe of their own, parsed with words of the command line."""

import pytest

from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.scripts import SFTSettings


@pytest.fixture
def parse(tmp_path):
    """parse(*words, recipe=text): the settings of a training run; the recipe says no more than it must."""

    def parse(*words, recipe="data: {train: [a.jsonl], max_length: 256}\n"):
        file = tmp_path / "mine.yaml"
        file.write_text(recipe, encoding="utf-8")
        return parse_recipe(SFTSettings, "quickstart", [str(file), *words])

    return parse


@pytest.fixture
def refused(capsys):
    """refused(function, *arguments): what is said, by line, where the exit code is 2 and every line is an error."""

    def refused(function, *arguments, **named):
        with pytest.raises(SystemExit) as exit:
            function(*arguments, **named)
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert all(line.startswith("error: ") for line in err.splitlines())
        return [line.removeprefix("error: ") for line in err.splitlines()]

    return refused


@pytest.fixture
def problems(parse, refused):
    """problems(*words, recipe=text): what is said of such a training run, by line."""
    return lambda *words, **recipe: refused(parse, *words, **recipe)
