"""The settings of each script: its help, what must hold between them, and that a mistake is answered at once."""

import re
from importlib.metadata import version

import pytest
from answers import keys
from processes import run

from gpt2ft import __main__ as main_module
from gpt2ft.settings.measuring import BenchmarkSettings, EvaluateSettings, SampleSettings, VerifySettings
from gpt2ft.settings.parsing import parse_recipe, parse_script
from gpt2ft.settings.recipes import RECIPES
from gpt2ft.settings.scripts import DPOSettings, SFTSettings
from gpt2ft.settings.sections import names_of
from gpt2ft.settings.using import ChatSettings, ExportSettings, ServeSettings

LAUNCH = RECIPES.parent
RUN_AND_LIST_MODULES = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as exit:
    heavy = {"torch", "accelerate", "datasets", "numpy", "pyarrow", "tiktoken"} & set(sys.modules)
    print(f"exit {exit.code}, heavy imports: {sorted(heavy)}")
"""


def run_script(script, *words, **environment):
    """The last line of what a script prints, and all of it, with the code it ends with and what it imported."""
    done = run(["python", "-W", "error", "-c", RUN_AND_LIST_MODULES, LAUNCH / script, *words], code=None, **environment)
    return done.stdout.splitlines()[-1], done.printed


# --- the command line of each ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.py")))
def test_help_names_every_setting_and_imports_nothing_heavy(script):
    end, said = run_script(script, "--help", COLUMNS="200")
    assert end == "exit 0, heavy imports: []"
    assert script in said
    if script == "sft.py":
        assert "[RECIPE]" in said
        assert "recipe quickstart" in said
        for name in ("--training.steps", "--data.max_length", "--optimizer.learning_rate", "--resume", "--dry_run"):
            assert name in said
        assert "Optimizer steps" in said
        rate = parse_recipe(SFTSettings, "quickstart", []).optimizer.learning_rate
        assert f"(default: {rate:g})" in said  # the recipe's, not the class's
    if script == "evaluate.py":
        assert "(required)" in said


def help_of(script, width, monkeypatch, capsys, *words):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit, match="0"):
        main_module.run_script(script, [*words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("script", main_module.SCRIPTS)
def test_help_can_be_read_at_any_width(script, width, monkeypatch, capsys):
    said = help_of(script, width, monkeypatch, capsys)
    lines = said.splitlines()
    assert max(map(len, lines)) <= width
    usage, purpose = lines[0], " ".join(lines).replace("  ", " ")
    assert usage.startswith("usage: ")
    called = main_module.SCRIPTS[script]
    assert f"[{'RECIPE' if called.recipe else called.positional.upper()}" in usage
    assert main_module.SCRIPTS[script].purpose in purpose
    assert not re.search(r"(?m)^  --.*\w\n +\w[^{]*}", said)  # no choice is broken at the end of a line
    assert not re.search(r"default: *\)|\(default: none\)|None|\(default: false\)", said)
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(names) == sorted(f"--{name}" for name in names_of(main_module.SCRIPTS[script].settings))  # each once
    for line in lines:  # a setting and its meaning have columns of their own; what follows hangs below the meaning
        assert not line.startswith(" ") or re.match(r"  \S|    +\S", line), line


def test_help_shows_recipes_and_the_most_used_settings_first(monkeypatch, capsys):
    said = help_of("sft", 80, monkeypatch, capsys)
    assert said.index("YAML file of your own") < said.index("recipes\n") < said.index("most used\n")
    assert re.search(r"\n  oasst-gpt2 +GPT-2 small \(124M\) becomes a chat model", said)
    assert "oasst-gpt2-dpo" not in said
    most_used = said.partition("most used\n")[2].partition("\n\n")[0]
    assert 8 <= most_used.count("\n  --") + 1 <= 12
    assert "--data.train NAME ..." in most_used
    assert "oasst-gpt2-dpo" in help_of("dpo", 80, monkeypatch, capsys)


def test_help_shows_what_belongs_together(monkeypatch, capsys):
    said = help_of("sft", 80, monkeypatch, capsys)
    groups = {block.partition("\n")[0]: block for block in said.split("\n\n")}
    for name in ("eval_every", "patience", "sample_tokens"):
        assert f"--training.{name} " in groups["training, evaluation"]
    assert "--training.save_minutes " in groups["training, checkpoints"]
    assert "--data.columns " in groups["data, how sources are read"]
    assert all(block.count("\n  --") <= 12 for block in groups.values())
    for script in ("sft", "dpo"):
        first = help_of(script, 80, monkeypatch, capsys).partition("most used\n")[2].partition("\n\n")[0]
        assert "--optimizer.learning_rate" in first


def test_a_group_names_settings_of_its_section():
    """Each in one group at most."""
    for script in main_module.SCRIPTS.values():
        for field in script.settings.model_fields.values():
            grouped = [name for group in getattr(field.annotation, "groups", {}).values() for name in group]
            assert len(set(grouped)) == len(grouped)
            assert not grouped or set(grouped) <= field.annotation.model_fields.keys()


def test_help_is_that_of_the_recipe_that_is_named(monkeypatch, capsys):
    said = help_of("sft", 80, monkeypatch, capsys, "oasst-gpt2-lora")
    assert "recipe oasst-gpt2-lora" in " ".join(said.split())
    assert re.search(r"--lora.rank N .*?\(default: 16\)", said, re.DOTALL)


def test_scripts_that_share_settings_say_what_each_does(monkeypatch, capsys):
    reference, dpo = (help_of(script, 160, monkeypatch, capsys) for script in ("reference", "dpo"))
    assert "trains nothing" in reference
    assert "trains nothing" not in dpo.partition("recipes\n")[0]


@pytest.mark.parametrize("words", [["sft", "--version"], ["chat", "runs/a", "--version"], ["--version"]])
def test_every_script_says_its_version(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpt2ft", *words])
    with pytest.raises(SystemExit, match="0"):
        main_module.main()
    assert capsys.readouterr().out == f"gpt2ft {version('gpt2ft')}\n"


@pytest.mark.parametrize("word", ["chatt", "caht", "train"])
def test_a_script_that_does_not_exist(word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpt2ft", word])
    with pytest.raises(SystemExit, match="2"):
        main_module.main()
    assert ("did you mean `chat`" in capsys.readouterr().err) == (word != "train")


@pytest.mark.parametrize("wrong", [["--traning.steps", "1"], ["nosuch"], ["--data.train"]])
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(wrong):
    end, said = run_script("sft.py", *wrong)
    assert end == "exit 2, heavy imports: []"
    assert "Traceback" not in said


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_sound(recipe):
    kind = DPOSettings if "dpo" in recipe.stem else SFTSettings
    data = ["--data.train", "mine.jsonl"] if recipe.stem.startswith("my-data") else []  # which they leave open
    settings = parse_recipe(kind, "", [recipe.stem, *data])
    assert settings == parse_recipe(kind, "", [str(recipe), *data])
    assert settings.output == f"runs/{recipe.stem}"


@pytest.mark.parametrize(
    "kind",
    [
        SFTSettings,
        DPOSettings,
        EvaluateSettings,
        BenchmarkSettings,
        ChatSettings,
        ExportSettings,
        ServeSettings,
        VerifySettings,
    ],
)
def test_every_setting_has_its_help(kind):
    sections = [field.annotation for field in kind.model_fields.values() if hasattr(field.annotation, "model_fields")]
    assert all(section.__doc__ for section in (kind, *sections))
    for section in (kind, *sections):
        leaves = {name: field for name, field in section.model_fields.items() if field.annotation not in sections}
        assert [name for name, field in leaves.items() if not field.description] == []


# --- what must hold between settings --------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_all_named(problems):
    recipe = """
data: {max_length: 300, eval: [a], eval_fraction: 0.1}
model: {random_init: true}
lora: {rank: 4}
"""
    said = problems("--training.tokens_per_micro_batch", "200", recipe=recipe)
    assert keys(said) == [
        "data.train",
        "data.eval",
        "training.tokens_per_micro_batch",
        "training.tokens_per_micro_batch",
        "model.random_init",
    ]
    assert "300" in said[2]
    assert "200" in said[2]
    assert keys(problems("--training.eval_every", "3")) == ["training.eval_every"]


def test_the_temperature_ends_at_two_in_the_api_alone(refused):
    assert parse_script(ChatSettings, "model", ["--temperature", "3"]).temperature == 3
    assert parse_script(ServeSettings, "model", ["--temperature", "2"]).temperature == 2
    assert keys(refused(parse_script, ServeSettings, "model", ["--temperature", "3"])) == ["temperature"]


def test_what_is_verified_is_one_folder_or_two(refused):
    assert parse_script(VerifySettings, "paths", []).paths == ()
    assert parse_script(VerifySettings, "paths", ["a", "b", "--steps", "5"]).paths == ("a", "b")
    assert keys(refused(parse_script, VerifySettings, "paths", ["a", "b", "c"])) == ["paths"]


def test_what_is_sampled_is_pairs_or_conversations():
    given = {"data": ("a",), "output": "b.jsonl"}
    assert keys(SampleSettings(**given, best=True, pairs="all").problems()) == ["pairs"]
    assert keys(SampleSettings(**given, best=True).problems()) == []
    assert keys(SampleSettings(**given, columns="prompt").problems()) == ["columns"]
    assert keys(SampleSettings(**given | {"output": "b.txt"}).problems()) == ["output"]


def test_a_chat_has_a_seed_and_a_server_takes_that_of_its_requests(refused):
    assert parse_script(ChatSettings, "model", ["--seed", "3"]).seed == 3
    assert keys(refused(parse_script, ChatSettings, "model", ["--seed", "-1"])) == ["seed"]
    assert keys(refused(parse_script, ServeSettings, "model", ["--seed", "3"])) == ["seed"]


@pytest.mark.parametrize("kind", [ChatSettings, ServeSettings, EvaluateSettings])
def test_random_weights_need_the_name_of_a_shape(kind):
    data = {"data": ("a",)} if kind is EvaluateSettings else {}
    assert keys(kind(random_init=True, **data).problems()) == ["random_init"]
    assert keys(kind(random_init=True, model="quickstart", **data).problems()) == []


def test_a_topic_is_words():
    (said,) = EvaluateSettings(data=("a",), topic=("tea", "two words")).problems()
    assert keys([said]) == ["topic"]
    assert "'two words'" in said


def test_what_would_be_ignored_without_a_topic_is_refused():
    assert keys(EvaluateSettings(data=("a",), topic_prompts=5).problems()) == ["topic"]


def test_what_would_be_ignored_without_pairs_is_refused():
    assert keys(EvaluateSettings(data=("a",), beta=0.5).problems()) == ["pairs"]
