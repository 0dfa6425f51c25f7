"""Recipes that build on one another, and data on the command line in the place of a recipe's own."""

import pytest

from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.recipes import read_recipe, to_yaml
from gpt2ft.settings.scripts import DPOSettings, SFTSettings


def parse(*words):
    return parse_recipe(SFTSettings, "quickstart", [str(word) for word in words])


@pytest.fixture
def write(tmp_path):
    """write(name, text): a recipe in a folder of its own."""

    def write(name, text):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


# --- `base` ---------------------------------------------------------------------------------------------------------


def test_a_recipe_says_no_more_than_what_differs_from_its_base(write):
    mine = write("mine", "base: oasst-gpt2\ntraining: {epochs: 7}\nmodel: {dropout: 0.0}\n")
    ours, theirs = parse(mine), parse("oasst-gpt2")
    assert (ours.training.epochs, ours.model.dropout, ours.model.path) == (7, 0.0, "gpt2")
    assert ours.output == "runs/mine"
    assert ours.data == theirs.data
    assert ours.optimizer == theirs.optimizer
    assert parse(mine, "--training.epochs", 2).training.epochs == 2


def test_a_resolved_recipe_is_flat(write):
    mine = write("mine", "base: oasst-gpt2-lora\nlora: {rank: 4}\n")
    resolved = write("resolved", to_yaml(parse(mine)))
    assert "base" not in resolved.read_text(encoding="utf-8").splitlines()
    assert read_recipe(SFTSettings, resolved) == parse(mine)
    assert parse(mine).lora.alpha == 32


def test_a_base_may_be_a_file_beside_the_recipe_and_have_a_base(write, monkeypatch, tmp_path):
    write("lowest", "base: oasst-gpt2\ntraining: {epochs: 7, log_every: 3}\noutput: elsewhere\nresume: never\n")
    write("middle", "base: lowest.yaml\ntraining: {epochs: 8}\n")
    mine = write("mine", "base: ./middle.yaml\noptimizer: {weight_decay: 0}\n")
    monkeypatch.chdir("/")
    settings = parse(mine)
    assert (settings.training.epochs, settings.training.log_every, settings.optimizer.weight_decay) == (8, 3, 0)
    assert (settings.output, settings.resume) == ("runs/mine", "auto")  # of each run alone


def test_a_preference_recipe_may_build_on_another(write):
    settings = parse_recipe(DPOSettings, "", [str(write("mine", "base: quickstart-dpo\ndpo: {beta: 2}\n"))])
    assert (settings.dpo.beta, settings.dpo.pairs) == (2, "best_worst")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base: oasst-gpt\n", ["oasst-gpt", "oasst-gpt2"]),
        ("base: absent.yaml\n", ["absent.yaml"]),
        ("base: mine.yaml\n", ["mine.yaml"]),
        ("base: other.yaml\n", ["other.yaml", "third.yaml"]),
        ("base: [a, b]\n", ["name"]),
        ("base: oasst-gpt2-dpo\n", ["dpo"]),
    ],
)
def test_a_base_that_cannot_be_is_refused_in_one_sentence(write, refused, text, named):
    """Unknown, in a circle, at once or in the end, no name, or for another script."""
    write("other", "base: third.yaml\n")
    write("third", "base: other.yaml\n")
    mine = write("mine", text)
    (said,) = refused(parse, mine)
    assert all(name in said for name in [*named, "mine.yaml"])
    assert said.count("`base`") == ("dpo" not in text)


# --- `--data.train` -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["quickstart", "oasst-gpt2", "oasst-gpt2-medium-lora", "single-topic"])
def test_other_data_replace_what_a_recipe_says_of_its_own(recipe):
    own, data = parse(recipe).data, parse(recipe, "--data.train", "mine.jsonl@0.5", "ours.jsonl").data
    assert own.eval
    assert data.train == ("mine.jsonl@0.5", "ours.jsonl")
    assert (data.eval, data.eval_fraction, data.topic_replies) == ((), None, None)
    assert (data.max_length, data.languages, data.max_rank) == (own.max_length, own.languages, own.max_rank)


def test_however_it_is_written():
    assert parse("quickstart", "--data.train=mine.jsonl").data.eval == ()


@pytest.mark.parametrize(
    ("words", "held_out"),
    [
        (["--data.eval", "held.jsonl"], (("held.jsonl",), 0.0)),
        (["--data.eval_fraction", "0.2"], ((), 0.2)),
        (["--data.eval-fraction=0"], ((), 0.0)),
        (["--data.eval"], ((), 0.0)),
    ],
)
def test_unless_told_otherwise(words, held_out):
    quiet = ["--training.eval_every", "None"]
    data = parse("quickstart", "--data.train", "mine.jsonl", *words, *quiet).data
    assert (data.eval, data.eval_fraction) == held_out
    data = parse("single-topic", "--data.train", "mine.jsonl", "--data.topic_replies", "quickstart:replies").data
    assert data.topic_replies == "quickstart:replies"


def test_held_out_data_named_above_take_the_place_of_those_below(write):
    """Never both: today's three tries were the hub's retries, then missing data, then two settings at once."""
    assert parse("quickstart", "--data.eval_fraction", "0.1").data.eval == ()
    share = write("share", "data: {train: [a.jsonl], eval_fraction: 0.1}\n")
    assert parse(share, "--data.eval", "b.jsonl").data.eval_fraction == 0
    assert parse(share, "--data.train", "b.jsonl").data.eval_fraction == 0.1
    nothing = write("nothing", "data: {train: [a.jsonl]}\n")
    assert parse(nothing, "--data.train", "b.jsonl").data.eval_fraction == 0


@pytest.mark.parametrize("train", [["oasst1"], ["oasst2@0.5"], ["oasst2:validation"], ["oasst1", "mine.jsonl"]])
def test_what_a_recipe_says_of_its_own_data_holds_where_they_are_among_the_new(train):
    own, data = parse("oasst-gpt2").data, parse("oasst-gpt2", "--data.train", *train).data
    assert (data.train, data.eval, data.eval_fraction) == (tuple(train), own.eval, own.eval_fraction)


def test_a_recipe_with_data_of_its_own_replaces_those_of_its_base_likewise(write):
    data = parse(write("mine", "base: single-topic\ndata: {train: [mine.jsonl], max_length: 128}\n")).data
    assert (data.train, data.eval, data.eval_fraction) == (("mine.jsonl",), (), None)
    assert (data.topic_replies, data.max_length) == (None, 128)


def test_passes_asked_for_are_made_whatever_number_of_steps_stands_below(write):
    below = write("below", "data: {train: [a.jsonl]}\ntraining: {steps: 5}\n")
    above = write("above", "base: below.yaml\ntraining: {epochs: 3}\n")
    assert (parse(above).training.steps, parse(above).training.epochs) == (None, 3)
    assert parse(below, "--training.min_steps", 50).training.steps is None
    assert parse(below, "--training.epochs", 2, "--training.steps", 7).training.steps == 7
    assert parse(above, "--training.steps", 7).training.steps == 7
