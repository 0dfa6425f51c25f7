"""Nothing that is given is lost: flags given twice, flags and recipes with nothing or the same key twice in them."""

import pytest
from facts import tells

from gpt2ft.settings import strict_yaml
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.parsing import parse_script


@pytest.mark.parametrize(
    ("words", "train"),
    [
        ("--data.train a --data.train b", ("a", "b")),
        ("--data.train a b --data.max_length 64 --data.train=c", ("a", "b", "c")),
        ("--data.train=a --data.train=b", ("a", "b")),
        ("--data.train=a b", ("a", "b")),
    ],
)
def test_a_list_may_be_given_in_parts(words, train, parse):
    assert parse(*words.split()).data.train == train


def test_lists_of_other_names_and_scripts(parse):
    settings = parse(
        "--data.ignore-keys", "a", "--training.steps", "3", "--data.ignore_keys", "b", "--data.columns", "text=x"
    )
    assert (settings.data.ignore_keys, settings.training.steps) == (("a", "b"), 3)
    assert settings.data.columns == ("text=x",)
    evaluation = parse_script(EvaluateSettings, "model", ["runs/a", "--data", "a", "--topic", "tea", "--data", "b"])
    assert (evaluation.model, evaluation.data, evaluation.topic) == ("runs/a", ("a", "b"), ("tea",))


@pytest.mark.parametrize("flag", ["data.train", "data.eval", "data.topic_replies", "model.path", "output"])
def test_nothing_behind_an_equals_sign_is_refused(flag, problems):
    assert any(flag in line for line in problems(f"--{flag}="))


@pytest.mark.parametrize("name", ["", " ", " @0.5"])
def test_a_source_without_a_name_is_refused(name, problems):
    """It would be the current folder."""
    assert any(tells(line, "`data.train` must") for line in problems("--data.train", name, "a.jsonl"))
    assert any(tells(line, "`data.train`") for line in problems(recipe=f'data: {{train: ["{name}"]}}\n'))


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ("prompt", "`data.columns` must be KEY=COLUMN ... prompt"),
        ("prompt=", "`data.columns` must be KEY=COLUMN ... prompt"),
        ("=question", "`data.columns` must be KEY=COLUMN ... question"),
        ("prompt=a,prompt=b", "`data.columns` must name each key once ... prompt"),
        ("prompt=a,completion=a", "`data.columns` must name each column once ... a"),
    ],
)
def test_columns_that_mean_nothing(columns, facts, problems):
    assert any(tells(line, facts) for line in problems("--data.columns", columns))


def test_a_repeated_key_of_a_recipe_is_refused(problems):
    """The last would hold alone, and silently."""
    twice = "data: {train: [a.jsonl]}\ntraining:\n  steps: 3\n  seed: 1\n  steps: 4\n"
    assert any(tells(line, "mine.yaml ... `steps` ... line 5") for line in problems(recipe=twice))
    sections = "data: {train: [a.jsonl]}\ndata: {train: [b.jsonl]}\n"
    assert any(tells(line, "mine.yaml ... `data` ... line 2") for line in problems(recipe=sections))


def test_keys_of_other_mappings_may_be_the_same(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: {x: 3}\nc:\n  <<: *a\n  x: 4\nd: [{x: 1}, {x: 2}]\n"
    (tmp_path / "t.yaml").write_text(text)
    assert strict_yaml.load(tmp_path / "t.yaml") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 3}, "c": {"x": 4, "y": 2}, "d": [{"x": 1}, {"x": 2}],
    }  # fmt: skip
