"""The order in which sources of settings win, and how values are written in each."""

import pytest

from gpt2ft.settings.measuring import BenchmarkSettings, EvaluateSettings
from gpt2ft.settings.parsing import parse_recipe, parse_script
from gpt2ft.settings.recipes import read_recipe, to_yaml
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.using import ChatSettings

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
    settings = parse_recipe(SFTSettings, "quickstart", ["--training.steps", "3"])
    assert settings.output == "runs/quickstart"
    assert settings.data.train == ("quickstart", "quickstart:more")
    assert settings.training.steps == 3
    assert parse_recipe(SFTSettings, "quickstart", []) == parse_recipe(SFTSettings, "other", ["quickstart"])


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
        assert parse_recipe(SFTSettings, "quickstart", words).output == "runs/single-topic"
    (said,) = refused(parse_recipe, SFTSettings, "quickstart", ["--data.train", "a.jsonl", "single-topic"])
    assert "`single-topic`" in said
    assert "`data.train`" in said
    assert parse_recipe(SFTSettings, "quickstart", ["--data.train", "quickstart"]).data.train == ("quickstart",)


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
