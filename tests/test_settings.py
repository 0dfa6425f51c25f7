"""Settings: which source wins, and that whatever is wrong is said at once, early and in words."""

from pathlib import Path

import pytest
from processes import run

from gpt2ft.settings.parsing import RECIPES, parse_recipe, parse_script, read_yaml, to_yaml
from gpt2ft.settings.scripts import BenchmarkSettings, DPOSettings, EvaluateSettings, SFTSettings
from gpt2ft.settings.sections import split_factor

LAUNCH = RECIPES.parent
SOUND = "data: {train: [a.jsonl], max_length: 256}\n"  # the least a recipe must say


@pytest.fixture
def parse(tmp_path):
    """parse(recipe text, *arguments): the settings of such a training run."""

    def parse(recipe, *arguments):
        file = tmp_path / "mine.yaml"
        file.write_text(recipe, encoding="utf-8")
        return parse_recipe(SFTSettings, "quickstart", [str(file), *arguments])

    return parse


@pytest.fixture
def problems(parse, capsys):
    """problems(recipe text, *arguments): what is said of it, by line, after checking that the exit code is 2."""

    def problems(recipe, *arguments):
        with pytest.raises(SystemExit) as exit:
            parse(recipe, *arguments)
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    return problems


# --- which source wins ----------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_recipe_and_that_over_the_default(parse):
    recipe = SOUND + "training: {steps: 5, seed: 7}\noptimizer: {learning_rate: 1.0e-3}\n"
    settings = parse(recipe, "--training.steps", "9", "--model.path", "distilgpt2")
    assert settings.training.steps == 9
    assert settings.model.path == "distilgpt2"
    assert settings.training.seed == 7
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.training.micro_batches_per_step == SFTSettings().training.micro_batches_per_step


def test_none_on_the_command_line_takes_back_what_the_recipe_set(parse):
    assert parse(SOUND + "training: {steps: 5}\n", "--training.steps", "None").training.steps is None


def test_the_output_is_named_after_the_recipe_unless_it_is_given(parse):
    assert parse(SOUND).output == "runs/mine"
    assert parse(SOUND + "output: elsewhere\n").output == "elsewhere"
    assert parse(SOUND + "output: elsewhere\n", "--output", "here").output == "here"


def test_without_a_recipe_it_is_the_quickstart(capsys):
    settings = parse_recipe(SFTSettings, "quickstart", ["--training.steps", "3"])
    assert settings.output == "runs/quickstart"
    assert settings.data.train == ("quickstart",)
    assert settings.training.steps == 3
    assert parse_recipe(SFTSettings, "quickstart", []) == parse_recipe(SFTSettings, "other", ["quickstart"])


def test_a_script_without_recipes_takes_its_first_argument_bare():
    assert parse_script(EvaluateSettings, "model", ["runs/a", "--data", "b", "c"]).data == ("b", "c")
    assert parse_script(EvaluateSettings, "model", ["runs/a", "--data", "b"]).model == "runs/a"
    assert parse_script(EvaluateSettings, "model", ["--data", "b"]).model is None
    assert parse_script(BenchmarkSettings, "what", ["sft", "--steps", "2"]).steps == 2


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_sound(recipe):
    kind = DPOSettings if "dpo" in recipe.stem else SFTSettings
    settings = parse_recipe(kind, "", [recipe.stem])
    assert settings == parse_recipe(kind, "", [str(recipe)])
    assert settings.output == f"runs/{recipe.stem}"


def test_the_resolved_recipe_gives_the_same_settings(parse, tmp_path):
    arguments = ["--data.train", "no", "1_000", "~", "ünï: code", "--data.eval", "12:30", "--training.eval_every", "4"]
    settings = parse(SOUND, *arguments, "--optimizer.learning_rate", "2e-05", "--optimizer.epsilon", "1e-30")
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings), encoding="utf-8")
    assert parse_recipe(SFTSettings, "", [str(tmp_path / "recipe.yaml")]) == settings
    assert settings.data.train == ("no", "1_000", "~", "ünï: code")


# --- values ---------------------------------------------------------------------------------------------------------


def test_what_yaml_makes_of_numbers_does_not_matter(parse):
    """YAML 1.1 reads 2e-5, without a dot, as text."""
    assert parse(SOUND + "optimizer: {learning_rate: 2e-5}\n").optimizer.learning_rate == 2e-5
    assert parse(SOUND, "--optimizer.learning_rate", "2e-5").optimizer.learning_rate == 2e-5
    assert parse(SOUND + "training: {steps: 1_000}\n").training.steps == 1000
    assert parse(SOUND, "--training.steps", "1_000").training.steps == 1000


@pytest.mark.parametrize(("written", "meant"), [("no", False), ("off", False), ("yes", True), ("'no'", False)])
def test_what_yaml_makes_of_booleans_does_not_matter(parse, written, meant):
    assert parse(SOUND + f"model: {{random_init: {written}}}\n").model.random_init is meant


def test_a_name_that_yaml_reads_as_something_else_is_refused(problems):
    """Norway's language code, unquoted, and a folder that is a number."""
    told = problems("data: {train: [a], languages: [no]}\noutput: 2024\n")
    assert len(told) == 2
    assert "`data.languages.0`: input should be a valid string, but is False" in told[0]
    assert "`output`: input should be a valid string, but is 2024" in told[1]


@pytest.mark.parametrize(
    ("arguments", "dry_run"),
    [
        (["--dry_run"], True),
        (["--dry_run", "true"], True),
        (["--dry_run", "True"], True),
        (["--dry_run=true"], True),
        (["--dry-run"], True),
        (["--dry_run", "--model.random_init"], True),
        (["--dry_run", "false"], False),
        (["--dry_run=false"], False),
        (["--dry_run", "false", "--model.random_init"], False),
    ],
)
def test_booleans(parse, arguments, dry_run):
    settings = parse(SOUND, *arguments)
    assert settings.dry_run is dry_run
    assert settings.model.random_init is ("--model.random_init" in arguments)


def test_a_boolean_from_the_recipe_can_be_taken_back(parse):
    assert parse(SOUND + "dry_run: true\n", "--dry_run", "false").dry_run is False


def test_lists(parse):
    recipe = SOUND + "training: {tokens_per_micro_batch: 1024}\n"
    settings = parse(recipe, "--data.train", "b", "c", "--data.eval", "d", "--data.languages", "en", "de")
    assert (settings.data.train, settings.data.eval) == (("b", "c"), ("d",))
    assert settings.data.languages == ("en", "de")
    assert parse("data: {train: [a], eval: [b]}\n", "--data.eval").data.eval == ()


def test_settings_do_not_change_once_they_are_parsed(parse):
    with pytest.raises(ValueError, match="frozen"):
        parse(SOUND).training.steps = 3


# --- what is wrong in a recipe --------------------------------------------------------------------------------------


def test_everything_wrong_in_a_recipe_is_said_at_once(problems, tmp_path):
    recipe = """
data: {train: [a], max_lenght: 3}
training: {steps: many, deterministic: maybe, epochs: 1.5, precision: fp16}
optmizer: {learning_rate: 1}
optimizer: {learning_rate: -1}
"""
    told = problems(recipe)
    assert all(line.startswith(f"error: {tmp_path}/mine.yaml: ") for line in told)
    text = "\n".join(told)
    assert "there is no setting `data.max_lenght` (did you mean `data.max_length`?)" in text
    assert "there is no setting `optmizer` (did you mean `optimizer`?)" in text
    assert "`training.steps`: input should be a valid integer, unable to parse string as an integer, but is '" in text
    assert "`training.deterministic`: input should be a valid boolean" in text
    assert "`training.epochs`: input should be a valid integer" in text
    assert "`training.precision`: input should be 'auto', 'fp32' or 'bf16', but is 'fp16'" in text
    assert "`optimizer.learning_rate`: input should be greater than 0, but is -1" in text
    assert len(told) == 7


def test_a_key_like_no_other_is_named_without_a_guess(problems):
    assert problems(SOUND + "zzz: 1\n")[0].endswith("there is no setting `zzz`")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("a: [", "is not valid YAML: while parsing"),
        ("a: 1\n\tb: 2", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
        ("", "must hold settings by section, but holds NoneType"),
        ("- a", "must hold settings by section, but holds list"),
        ("training: 3", "`training`: input should be a valid dictionary"),
        ("data: {train: a}", "`data.train`: input should be a valid tuple, but is 'a'"),
        ("optimizer: {learning_rate: .nan}", "`optimizer.learning_rate`: input should be a finite number, but is nan"),
        ("optimizer: {learning_rate: .inf}", "`optimizer.learning_rate`: input should be a finite number, but is inf"),
        ("1: 2", "`1`: keys should be strings"),
    ],
)
def test_a_broken_recipe_is_named_in_one_line(problems, recipe, said):
    told = problems(recipe)
    assert len(told) == 1
    assert told[0].startswith("error: ")
    assert "mine.yaml" in told[0]
    assert said in told[0]


def test_a_recipe_that_is_not_text(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(SFTSettings, "", [str(tmp_path / "binary.yaml")])
    assert "binary.yaml cannot be read: " in capsys.readouterr().err


def test_an_unknown_recipe_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(SFTSettings, "", ["quikstart"])
    said = capsys.readouterr().err
    assert said.startswith("error: there is no recipe 'quikstart' (did you mean `quickstart`?); there are: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["absent.yaml", "some/where", "absent.yml"])
def test_a_missing_recipe_file(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(SFTSettings, "", [name])
    assert capsys.readouterr().err == f"error: the recipe {name} does not exist\n"


# --- what is wrong between settings, and on the command line --------------------------------------------------------


def test_settings_that_contradict_each_other_are_all_named(problems):
    recipe = """
data: {max_length: 300, eval: [a], eval_fraction: 0.1}
model: {attention: flex, attention_dropout: 0.1}
"""
    told = problems(recipe, "--training.tokens_per_micro_batch", "200")
    assert [line.split("`")[1] for line in told] == [
        "data.train",
        "data.eval",
        "training.tokens_per_micro_batch",
        "training.tokens_per_micro_batch",
        "model.attention",
    ]
    assert all(line.startswith("error: ") for line in told)
    assert told[2].endswith("must be at least the longest path of 300 tokens, but is 200")
    assert problems(SOUND, "--training.eval_every", "3") == [
        "error: `training.eval_every` needs held-out data: set `data.eval` or `data.eval_fraction`, or set it to None"
    ]


def test_everything_wrong_on_the_command_line_is_said_at_once(problems):
    wrong = ["--training.steps", "many", "--optimizer.learning_rate", "-1", "--model.attention", "felx"]
    told = problems(SOUND, "--traning.seed", "3", *wrong, "--data.max_lenght=9", "--zzz")
    assert all(line.startswith("error: command line: ") for line in told)
    assert [line.removeprefix("error: command line: ") for line in told] == [
        "there is no setting `traning.seed` (did you mean `training.seed`?)",
        "there is no setting `data.max_lenght` (did you mean `data.max_length`?)",
        "there is no setting `zzz`",
        "`model.attention`: input should be 'auto', 'flex', 'segments' or 'dense', but is 'felx'",
        "`training.steps`: input should be a valid integer, unable to parse string as an integer, but is 'many'",
        "`optimizer.learning_rate`: input should be greater than 0, but is '-1'",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training.steps", "1.5"], "error: command line: `training.steps`: input should be a valid integer"),
        (["--training.steps", "0"], "error: command line: `training.steps`: input should be greater than 0"),
        (["--training.steps"], "Missing value for argument '--training.steps'"),
        (["--training.steps", "1", "2"], "Unrecognized options: 2"),
        (["--optimizer.learning_rate", "nan"], "`optimizer.learning_rate`: input should be a finite number"),
        (["--optimizer.learning_rate", "inf"], "`optimizer.learning_rate`: input should be a finite number"),
        (["--dry_run", "maybe"], "error: command line: `dry_run`: input should be a valid boolean"),
        (["--training", "3"], "there is no setting `training`"),
        (["another"], "Unrecognized options: another"),
    ],
)
def test_a_wrong_command_line_is_named(problems, arguments, said):
    assert said in "\n".join(problems(SOUND, *arguments))


def test_a_setting_that_must_be_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_script(EvaluateSettings, "model", [])
    assert capsys.readouterr().err == "error: command line: `data` must be given\n"


@pytest.mark.parametrize(
    "wrong", [["--traning.steps", "1"], ["--training.steps", "x"], ["nosuch"], ["--data.train"], ["--output"]]
)
def test_only_the_main_process_speaks(wrong, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(SFTSettings, "quickstart", wrong)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(SFTSettings, "quickstart", wrong)
    assert capsys.readouterr() != ("", "")


# --- the scripts themselves -----------------------------------------------------------------------------------------

RUN_AND_LIST_MODULES = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as exit:
    heavy = {"torch", "accelerate", "datasets", "numpy", "pyarrow", "tiktoken"} & set(sys.modules)
    print(f"exit {exit.code}, heavy imports: {sorted(heavy)}")
"""


def run_script(script, *arguments, **environment):
    """The last line of what a script prints, and all of it, with the code it ends with and what it imported."""
    done = run(["python", "-c", RUN_AND_LIST_MODULES, LAUNCH / script, *arguments], code=None, **environment)
    return done.stdout.splitlines()[-1], done.printed


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.py")))
def test_help_names_every_setting_and_imports_nothing_heavy(script):
    end, said = run_script(script, "--help", COLUMNS="200")
    assert end == "exit 0, heavy imports: []"
    assert script in said
    if script == "sft.py":
        assert "[RECIPE]" in said
        assert "Defaults are those of the recipe quickstart." in said
        for name in ("--training.steps", "--data.max_length", "--optimizer.learning_rate", "--resume", "--dry_run"):
            assert name in said
        assert "Optimizer steps; overrides `epochs`." in said
        assert "(default: 0.003)" in said  # the recipe's, not the class's


@pytest.mark.parametrize("wrong", [["--traning.steps", "1"], ["nosuch"], ["--data.train"]])
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(wrong):
    end, said = run_script("sft.py", *wrong)
    assert end == "exit 2, heavy imports: []"
    assert "Traceback" not in said


def test_reading_a_recipe_needs_no_more_than_the_file():
    assert read_yaml(SFTSettings, Path(RECIPES / "quickstart.yaml"))["data"]["train"] == ("quickstart",)


# --- factors of data sources ----------------------------------------------------------------------------------------


def test_a_source_may_have_a_factor(parse):
    data = parse(SOUND, "--data.train", "oasst1@0.5", "me@home.jsonl", "a.jsonl@2").data
    assert [split_factor(source) for source in data.train] == [("oasst1", 0.5), ("me@home.jsonl", 1.0), ("a.jsonl", 2)]


def test_factors_that_make_no_sense_and_sources_named_twice(problems):
    said = problems(SOUND, "--data.train", "oasst1@0", "oasst1", "b@101", "--data.eval", "c@0.5")
    assert said == [
        "error: `data.train` must name each data source once, but names oasst1 2 times",
        "error: the factor of a data source in `data.train` must be above 0 and at most 100, but oasst1@0 has 0",
        "error: the factor of a data source in `data.train` must be above 0 and at most 100, but b@101 has 101",
        "error: `data.eval` counts every message once, so c@0.5 must have no factor: give c",
    ]


def test_a_topic_is_words():
    assert list(EvaluateSettings(data=("a",), topic=("tea", "two words")).problems()) == [
        "`topic` must be single words, but holds 'two words'"
    ]


def test_what_would_be_ignored_without_a_topic_is_refused():
    (said,) = EvaluateSettings(data=("a",), topic_prompts=5).problems()
    assert said.startswith("`topic` must be set where `topic_prompts` or `max_new_tokens` is")
