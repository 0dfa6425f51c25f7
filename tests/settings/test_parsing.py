"""The order in which sources of settings win; all that is wrong in one is said at once, by name, with exit code 2."""

import re

import pytest

from gpt2ft.errors import SettingsError
from gpt2ft.settings.measuring import BenchmarkSettings, EvaluateSettings
from gpt2ft.settings.parsing import parse_recipe, parse_script
from gpt2ft.settings.recipes import RECIPES, read_recipe, to_yaml
from gpt2ft.settings.scripts import DPOSettings, SFTSettings
from gpt2ft.settings.sections import RENAMED
from gpt2ft.settings.using import ChatSettings, ExportSettings, ServeSettings

OF_THE_SCRIPT = {"kind": SFTSettings, "default_recipe": "quickstart"}


def keys(lines):
    """The setting that each line names first."""
    return [line.split("`")[1] for line in lines]


# --- which source wins ----------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_recipe_and_that_over_the_default(parse):
    recipe = "data: {train: [a.jsonl]}\ntraining: {steps: 5, seed: 7}\noptimizer: {learning_rate: 1.0e-3}\n"
    settings = parse("--training.steps", "9", "--model.path", "distilgpt2", recipe=recipe)
    assert settings.training.steps == 9
    assert settings.model.path == "distilgpt2"
    assert settings.training.seed == 7
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.training.micro_batches_per_step == SFTSettings().training.micro_batches_per_step


def test_none_on_the_command_line_takes_back_what_the_recipe_set(parse):
    recipe = "data: {train: [a.jsonl]}\ntraining: {steps: 5}\n"
    assert parse("--training.steps", "None", recipe=recipe).training.steps is None


def test_of_a_setting_given_twice_the_last_one_counts(parse):
    assert parse("--training.steps", "3", "--show", "1", "--training.steps=4").training.steps == 4


def test_the_output_is_named_after_the_recipe_unless_it_is_given(parse):
    recipe = "data: {train: [a.jsonl]}\noutput: elsewhere\n"
    assert parse().output == "runs/mine"
    assert parse(recipe=recipe).output == "elsewhere"
    assert parse("--output", "here", recipe=recipe).output == "here"


def test_without_a_recipe_it_is_the_quickstart():
    settings = parse_recipe(**OF_THE_SCRIPT, arguments=["--training.steps", "3"])
    assert settings.output == "runs/quickstart"
    assert settings.data.train == ("quickstart", "quickstart:more")
    assert settings.training.steps == 3
    assert parse_recipe(**OF_THE_SCRIPT, arguments=[]) == parse_recipe(SFTSettings, "other", ["quickstart"])


def test_a_script_without_recipes_takes_its_first_argument_bare():
    assert parse_script(EvaluateSettings, "model", ["runs/a", "--data", "b", "c"]).data == ("b", "c")
    assert parse_script(EvaluateSettings, "model", ["runs/a", "--data", "b"]).model == "runs/a"
    assert parse_script(EvaluateSettings, "model", ["--data", "b"]).model is None
    assert parse_script(BenchmarkSettings, "what", ["sft", "--steps", "2"]).steps == 2


@pytest.mark.parametrize(
    "words",
    [
        ["runs/a", "--seed", "3", "--random_init"],
        ["--seed", "3", "runs/a", "--random_init"],
        ["--seed", "3", "--random_init", "runs/a"],
        ["--random_init", "--seed=3", "runs/a"],
        ["--random_init", "true", "--seed", "3", "runs/a"],
        ["--random_init", "--seed", "3", "--model", "runs/a"],
    ],
)
def test_a_word_without_a_setting_may_stand_anywhere(words):
    settings = parse_script(ChatSettings, "model", words)
    assert (settings.model, settings.seed, settings.random_init) == ("runs/a", 3, True)


def test_a_recipe_may_stand_anywhere_but_at_the_end_of_a_list(refused):
    for words in (["single-topic", "--dry_run"], ["--dry_run", "single-topic"], ["--show", "1", "single-topic"]):
        assert parse_recipe(**OF_THE_SCRIPT, arguments=words).output == "runs/single-topic"
    (said,) = refused(parse_recipe, **OF_THE_SCRIPT, arguments=["--data.train", "a.jsonl", "single-topic"])
    assert "`single-topic`" in said
    assert "`data.train`" in said
    assert parse_recipe(**OF_THE_SCRIPT, arguments=["--data.train", "quickstart"]).data.train == ("quickstart",)


def test_the_resolved_recipe_gives_the_same_settings(parse, tmp_path):
    words = ["--data.train", "no", "1_000", "~", "ünï: code", "--data.eval", "12:30", "--training.eval_every", "4"]
    settings = parse(*words, "--optimizer.learning_rate", "2e-05", "--optimizer.epsilon", "1e-30")
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings), encoding="utf-8")
    assert parse_recipe(SFTSettings, "", [str(tmp_path / "recipe.yaml")]) == settings
    assert read_recipe(SFTSettings, tmp_path / "recipe.yaml") == settings
    assert settings.data.train == ("no", "1_000", "~", "ünï: code")


# --- values ---------------------------------------------------------------------------------------------------------


def test_numbers_are_written_in_the_same_ways_in_both_sources(parse):
    """YAML 1.1 reads 2e-5, without a dot, as text."""
    recipe = "data: {train: [a.jsonl]}\noptimizer: {learning_rate: 2e-5}\ntraining: {steps: 1_000}\n"
    for settings in (
        parse(recipe=recipe),
        parse("--optimizer.learning_rate", "2e-5", "--training.steps", "1_000"),
    ):
        assert settings.optimizer.learning_rate == 2e-5
        assert settings.training.steps == 1000


@pytest.mark.parametrize(("written", "meant"), [("no", False), ("off", False), ("yes", True), ("'no'", False)])
def test_booleans_in_a_recipe(parse, written, meant):
    recipe = f"data: {{train: [a.jsonl]}}\nmodel: {{random_init: {written}}}\n"
    assert parse(recipe=recipe).model.random_init is meant


@pytest.mark.parametrize(
    ("words", "dry_run"),
    [
        (["--dry_run"], True),
        (["--dry_run", "true"], True),
        (["--dry_run", "True"], True),
        (["--dry_run=true"], True),
        (["--dry-run"], True),
        (["--dry-run=true"], True),
        (["--dry_run", "--model.random_init"], True),
        (["--model.random-init", "--dry_run", "true"], True),
        (["--dry_run", "false"], False),
        (["--dry_run", "False"], False),
        (["--dry_run=false"], False),
        (["--dry_run", "false", "--model.random_init"], False),
    ],
)
def test_booleans_on_the_command_line(parse, words, dry_run):
    settings = parse(*words)
    assert settings.dry_run is dry_run
    assert settings.model.random_init is any("random" in word for word in words)


def test_a_boolean_from_the_recipe_can_be_taken_back(parse):
    assert parse("--dry_run", "false", recipe="data: {train: [a.jsonl]}\ndry_run: true\n").dry_run is False


def test_lists(parse):
    settings = parse("--data.train", "b", "c", "--data.eval", "d", "--data.languages=en", "de")
    assert (settings.data.train, settings.data.eval) == (("b", "c"), ("d",))
    assert settings.data.languages == ("en", "de")
    assert parse("--data.eval", recipe="data: {train: [a], eval: [b]}\n").data.eval == ()
    assert parse("--data.train", "None").data.train == ("None",)
    assert parse("--data.train", "b", "--show", "1", "--data.train=c").data.train == ("b", "c")


@pytest.mark.parametrize("written", ["b", "[b]", "\n  - b"])
def test_a_single_value_is_a_list_of_one(parse, written):
    assert parse(recipe=f"data:\n train: {written}\n").data.train == ("b",)


def test_a_section_without_settings_has_its_defaults(parse):
    assert parse(recipe="data: {train: [a]}\nlora:\n  # rank: 8\ntraining: {steps: none}\n").lora == SFTSettings().lora


def test_a_value_may_look_like_a_setting_after_an_equals_sign():
    assert parse_script(ChatSettings, "model", ["--system=-be brief", "--temperature", "0"]).system == "-be brief"


def test_settings_do_not_change_once_they_are_parsed(parse):
    with pytest.raises(ValueError, match="frozen"):
        parse().training.steps = 3


# --- what is wrong in a recipe --------------------------------------------------------------------------------------


def test_everything_wrong_in_a_recipe_is_said_at_once(problems, tmp_path):
    recipe = """
data: {train: [a], max_lenght: 3}
training: {steps: many, deterministic: maybe, epochs: 1.5, precision: fp8}
optmizer: {learning_rate: 1}
optimizer: {learning_rate: -1}
"""
    said = problems(recipe=recipe)
    assert all(line.startswith(f"{tmp_path}/mine.yaml: ") for line in said)
    lines = dict(zip(keys(said), said, strict=True))
    expected = {
        "data.max_lenght": "(did you mean `data.max_length`?)",
        "optmizer": "(did you mean `optimizer`?)",
        "training.steps": "'many'",
        "training.deterministic": "'maybe'",
        "training.epochs": "1.5",
        "training.precision": "'fp8'",
        "optimizer.learning_rate": "-1",
    }
    assert lines.keys() == expected.keys()
    assert [key for key, found in expected.items() if not lines[key].endswith(found)] == []


def test_a_name_that_yaml_reads_as_something_else_is_refused(problems):
    """Norway's language code, unquoted, and a folder that is a number."""
    said = problems(recipe="data: {train: [a], languages: [no]}\noutput: 2024\n")
    assert keys(said) == ["data.languages", "output"]
    assert said[0].endswith("holds false: write it in quotes")
    assert said[1].endswith("is 2024: write it in quotes")


def test_a_key_like_no_other_is_named_without_a_guess(problems):
    (said,) = problems(recipe="data: {train: [a]}\nzzz: 1\n")
    assert "`zzz`" in said
    assert "mean" not in said


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("a: [", "not valid YAML"),
        ("a: 1\n\tb: 2", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("", "is empty"),
        ("- a", "['a']"),
        ("training: 3", "`training`"),
        ("data: {train: {a: b}}", "`data.train`"),
        ("optimizer: {learning_rate: .nan}", "`optimizer.learning_rate`"),
        ("optimizer: {learning_rate: .inf}", "`optimizer.learning_rate`"),
        ("1: 2", "`1`"),
        ("dpo: {beta: 1}", "gpt2ft dpo"),
        ("compute_environment: LOCAL_MACHINE", "--config_file"),
    ],
)
def test_a_broken_recipe_is_named_in_one_line(problems, recipe, said):
    (line,) = problems(recipe=recipe)
    assert "mine.yaml" in line
    assert said in line


def test_a_recipe_that_is_not_text(refused, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (said,) = refused(parse_recipe, SFTSettings, "", [str(tmp_path / "binary.yaml")])
    assert f"{tmp_path}/binary.yaml" in said


def test_an_unknown_recipe_is_answered_with_the_nearest_and_all(refused):
    (said,) = refused(parse_recipe, SFTSettings, "", ["quikstart"])
    assert "'quikstart' (did you mean `quickstart`?)" in said
    assert all((file.stem in said) == ("dpo" not in file.stem) for file in RECIPES.glob("*.yaml"))


def test_what_is_no_recipe_is_named_as_what_it_is(refused, tmp_path):
    run, data, binary = tmp_path / "run", tmp_path / "mine.jsonl", tmp_path / "folder"
    run.mkdir()
    binary.mkdir()
    (run / "recipe.yaml").write_text("data: {train: [a]}\n")
    data.write_text("{}\n")
    for word, expected in {
        run: f"{run}/recipe.yaml is its recipe",
        data: f"`--data.train {data}`",
        binary: "is a folder",
        "gpt2": "`--model.path gpt2`",
        f"{run}/recipes.yaml": f"(did you mean `{run}/recipe.yaml`?)",
    }.items():
        (said,) = refused(parse_recipe, **OF_THE_SCRIPT, arguments=[str(word)])
        assert expected in said


def test_a_recipe_of_the_other_kind_is_named_as_such(refused):
    (said,) = refused(parse_recipe, **OF_THE_SCRIPT, arguments=["quickstart-dpo"])
    assert "`gpt2ft reference` and `gpt2ft dpo`" in said
    (said,) = refused(parse_recipe, DPOSettings, "quickstart-dpo", ["quickstart"])
    assert "`gpt2ft sft`" in said


@pytest.mark.parametrize(
    ("recipe", "line", "shown"),
    [
        ("a: [1, 2", 1, "open at its end"),
        ("data:\n  train: [a]\n\tmax_length: 3\n", 3, "not with tabs"),
        ("data:\n  train: a: b\n", 2, "`train: a: b`"),
        ("training:\n  epochs: 3\n epochs: 4\n", 3, "`epochs: 4`"),
        ("a: !!python/name:os.getcwd x\n", 1, "stand in quotes"),
        ("a: 'b\n", 2, "open at its end"),
    ],
)
def test_what_is_no_yaml_is_said_by_line_and_in_our_words(problems, recipe, line, shown):
    (said,) = problems(recipe=recipe)
    assert f"line {line}" in said
    assert shown in said
    assert not re.search(r"<|token|scalar|block|mapping|constructor|unicode", said.partition("mine.yaml")[2])


def test_a_recipe_of_ones_own_is_named_with_its_ending(refused, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("data: {train: [a]}\n")
    monkeypatch.chdir(tmp_path)
    (said,) = refused(parse_recipe, **OF_THE_SCRIPT, arguments=["mine"])
    assert "`mine.yaml`" in said


@pytest.mark.parametrize("name", ["absent.yaml", "some/where", "absent.yml"])
def test_a_missing_recipe_file(name, refused):
    (said,) = refused(parse_recipe, SFTSettings, "", [name])
    assert name in said


# --- what is wrong on the command line ------------------------------------------------------------------------------


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
    (said,) = refused(parse_recipe, **OF_THE_SCRIPT, arguments=words)
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
    (said,) = refused(parse_recipe, **OF_THE_SCRIPT, arguments=["training.steps=3"])
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
    assert refused(parse_recipe, **OF_THE_SCRIPT, arguments=wrong) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refused(parse_recipe, **OF_THE_SCRIPT, arguments=wrong) != []
