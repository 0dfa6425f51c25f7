"""All that is wrong on the command line is said at once, by name, with exit code 2."""

import pytest
from answers import keys

from gpt2ft.errors import SettingsError
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.parsing import parse_recipe, parse_script
from gpt2ft.settings.recipes import read_recipe
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.sections import RENAMED
from gpt2ft.settings.using import ChatSettings, ExportSettings, ServeSettings


def test_everything_wrong_on_the_command_line_is_said_at_once(problems):
    wrong = ["--training.steps", "many", "--optimizer.learning_rate", "-1", "--model.attention", "felx", "--output"]
    said = problems(
        "stray", "--traning.seed", "3", *wrong, "--data.max-lenght=9", "--zzz", "--training.epochs", "1", "2"
    )
    assert all(line.startswith("command line: ") for line in said)
    lines = dict(zip(keys(said), said, strict=True))
    expected = {
        "stray": "no setting",
        "traning.seed": "(did you mean `training.seed`?)",
        "data.max_lenght": "(did you mean `data.max_length`?)",
        "zzz": "no setting `zzz`",
        "model.attention": "but is 'felx'",
        "training.steps": "but is 'many'",
        "training.epochs": "but is [1, 2]",
        "optimizer.learning_rate": "but is -1",
        "output": "but is missing",
    }
    assert list(lines) == list(expected)
    assert [key for key, found in expected.items() if not lines[key].endswith(found)] == []


@pytest.mark.parametrize(
    "words",
    [
        ["--training.steps", "1.5"],
        ["--training.steps", "0"],
        ["--training.steps"],
        ["--training.steps", "1", "2"],
        ["--optimizer.learning_rate", "nan"],
        ["--optimizer.learning_rate", "-inf"],
        ["--dry_run", "maybe"],
        ["--dry_run", "true", "false"],
        ["--dry_run=None"],
        ["--output="],
        ["--data.train="],
        ["--dry_run="],
        ["--training", "3"],
        ["--lora.targets", "q", "w"],
        ["--data.max_length=None"],
    ],
)
def test_a_value_that_does_not_fit(problems, words):
    (said,) = problems(*words)
    assert keys([said])[0].startswith(words[0].removeprefix("--").partition("=")[0])


@pytest.mark.parametrize(
    ("words", "takes"), [(["--training.steps", "1", "2"], "one"), (["--dry_run", "maybe"], "true")]
)
def test_a_value_too_many_may_look_like_a_recipe(refused, words, takes):
    (said,) = refused(parse_recipe, SFTSettings, "quickstart", words)
    assert f"'{words[-1]}'" in said
    assert f"`{words[0]}`, which takes {takes}" in said


def test_a_setting_of_another_script_is_said_to_be_its_own(problems):
    (said,) = problems("--dpo.beta", "1")
    assert "`gpt2ft dpo`" in said


def test_a_word_too_many(problems, refused):
    assert keys(problems("another")) == ["another"]
    assert keys(refused(parse_script, ChatSettings, "model", ["runs/a", "runs/b"])) == ["model"]


def test_a_setting_without_its_dashes_or_with_long_ones(parse, refused):
    assert parse("—training.steps", "3").training.steps == 3
    (said,) = refused(parse_recipe, SFTSettings, "quickstart", ["training.steps=3"])
    assert "`--training.steps=3`" in said


def test_a_model_that_is_given_twice(refused):
    (said,) = refused(parse_script, ChatSettings, "model", ["runs/a", "--model", "runs/b"])
    assert keys([said]) == ["model"]
    assert "runs/a" in said
    assert "runs/b" in said


def test_what_must_be_given_is_named_with_its_choices(refused):
    said = refused(parse_script, ExportSettings, "model", [])
    assert keys(said) == ["format", "output"]
    assert "hf, adapter or gguf" in said[0]


def test_settings_that_must_be_given_are_all_named(refused):
    assert keys(refused(parse_script, EvaluateSettings, "model", ["--beta", "x"])) == ["data", "beta"]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_answered_with_its_new_name(refused, tmp_path, old, new):
    (said,) = refused(parse_script, ServeSettings, "model", [f"--{old.replace('_', '-')}", "3"])
    assert keys([said]) == [old]
    assert f"`{new}`" in said
    (tmp_path / "serve.yaml").write_text(f"{old}: 3\n")
    with pytest.raises(SettingsError, match=rf"serve\.yaml.*`{old}`.*`{new}`"):
        read_recipe(ServeSettings, tmp_path / "serve.yaml")


def test_a_name_that_another_script_has_renamed_is_unknown_to_this_one(problems):
    (said,) = problems(f"--{next(iter(RENAMED))}", "3")
    assert "called" not in said


@pytest.mark.parametrize(
    "wrong",
    [
        ["--traning.steps", "1"],
        ["--training.steps", "x"],
        ["nosuch"],
        ["--data.train"],
        ["--output"],
        ["quickstart", "x"],
    ],
)
def test_one_process_of_a_machine_speaks(wrong, refused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refused(parse_recipe, SFTSettings, "quickstart", wrong) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refused(parse_recipe, SFTSettings, "quickstart", wrong) != []
