"""All that is wrong in a recipe is said at once, by name, with exit code 2."""

import re

import pytest
from answers import keys

from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.recipes import RECIPES
from gpt2ft.settings.scripts import DPOSettings, SFTSettings


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
        (said,) = refused(parse_recipe, SFTSettings, "quickstart", [str(word)])
        assert expected in said


def test_a_recipe_of_the_other_kind_is_named_as_such(refused):
    (said,) = refused(parse_recipe, SFTSettings, "quickstart", ["quickstart-dpo"])
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
    (said,) = refused(parse_recipe, SFTSettings, "quickstart", ["mine"])
    assert "`mine.yaml`" in said


@pytest.mark.parametrize("name", ["absent.yaml", "some/where", "absent.yml"])
def test_a_missing_recipe_file(name, refused):
    (said,) = refused(parse_recipe, SFTSettings, "", [name])
    assert name in said
