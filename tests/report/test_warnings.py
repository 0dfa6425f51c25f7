"""Each warning is given where its figure is bad, names the model and the figure, and is not given where it is sound."""

import copy

import pytest
from report.made_up import estimate, made_up_report

from gpt2ft.report import warnings
from gpt2ft.report.warnings import warnings_of


@pytest.fixture
def sound():
    """A report that nothing is to be said of."""
    report = copy.deepcopy(made_up_report())
    report["models"] = report["models"][:2]
    report.pop("overlap", None)
    for digest, model in zip("12", report["models"], strict=True):
        model["weights"] = digest * 64
        model["replies"] = {name: metric | estimate(0.0) for name, metric in model["replies"].items()}
    for conversation in report["conversations"]:
        for turn in conversation["turns"]:
            turn["replies"] = turn["replies"][:2]
    report["models"][1]["training"]["curves"]["eval/loss"] = [(0, 2.9), (20, 2.5), (30, 2.501)]
    assert warnings_of(report) == []
    return report


def the_warning(report):
    [sentence] = warnings_of(report)
    return sentence


def test_a_model_that_failed_is_named_with_its_reason(sound):
    sound["models"][1] = {"name": "dpo", "model": "runs/dpo", "failed": "its weights hold NaN"}
    assert the_warning(sound) == "dpo: its weights hold NaN"


def test_the_same_weights_twice(sound):
    sound["models"][1]["weights"] = sound["models"][0]["weights"]
    sound["models"][1]["held_out"]["difference"]["bits_per_byte"] = estimate(0.0, 0.0)
    for conversation in sound["conversations"]:
        for turn in conversation["turns"]:
            turn["replies"] = turn["replies"][:1] * 2
    assert {"quickstart", "sft", "same", "zero"} <= set(the_warning(sound).replace(":", "").split())


@pytest.mark.parametrize("change", ["", " indeed"])
def test_replies_that_hardly_differ(sound, change):
    words = "one two three four five six seven eight nine ten eleven twelve " * 3
    for conversation in sound["conversations"]:
        for turn in conversation["turns"]:
            turn["replies"] = [{"text": text, "stopped": True} for text in (words, words + change)]
    assert "sft hardly differ from those of quickstart: was the right folder given?" in the_warning(sound)


def test_other_vocabularies(sound):
    sound["models"][1]["tokenizer"] = "b" * 64
    assert "nats/token" in the_warning(sound)
    assert "bits/byte can" in the_warning(sound)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("cut", "it has not learnt to stop"),
        ("empty", "empty"),
        ("repeated_4grams", "it loops"),
        ("writes_user_turn", "turn of the user"),
        ("copies_prompt", "copy the prompt"),
    ],
)
def test_bad_habits(sound, metric, words):
    sound["models"][1]["replies"][metric] = estimate(0.62, count=50)
    sentence = the_warning(sound)
    assert sentence.startswith("62 % of the ")
    assert "sft" in sentence
    assert words in sentence


def test_few_replies_and_few_conversations(sound):
    for model in sound["models"]:
        model["replies"]["ends_by_itself"]["count"] = warnings.FEW - 1
    assert "29 replies" in the_warning(sound)
    sound["data"]["conversations"] = 7
    assert "7 held-out conversations" in warnings_of(sound)[1]


@pytest.mark.parametrize(
    ("difference", "words"), [(estimate(0.01), "cannot be told from"), (estimate(0.1), "worse than quickstart")]
)
def test_a_loss_that_is_not_lower(sound, difference, words):
    sound["models"][1]["held_out"]["difference"]["bits_per_byte"] = difference
    assert words in the_warning(sound)


def test_a_held_out_loss_that_rises(sound):
    run = sound["models"][1]
    run["training"]["curves"]["eval/loss"] = [(0, 2.9), (90, 2.5), (180, 2.6), (266, 2.8)]
    assert "since step 90 of 266: `best/` is the better model" in the_warning(sound)
    run["model"] = "runs/sft/best"
    assert warnings_of(sound) == []


def test_text_that_is_forgotten(sound):
    sound["models"][1]["plain_text"]["Gettysburg Address"]["bits_per_byte"] *= 1.12
    assert "sft needs 12 % more bits for Gettysburg Address than" in the_warning(sound)


def test_replies_that_are_recited(sound):
    for model, share in zip(sound["models"], (0.01, 0.3), strict=True):
        model["learnt_by_heart"] = {"grams_13": estimate(share, count=500)}
    assert "30 % of the runs of 13 words" in the_warning(sound)
    sound["models"][0]["learnt_by_heart"]["grams_13"] = estimate(0.3, count=500)
    assert warnings_of(sound) == []  # said anyway
    sound["models"][0]["training"] = sound["models"][1]["training"]
    assert sum("it recites" in warning for warning in warnings_of(sound)) == 2  # each of its own run's data


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_held_out_data_that_were_trained_on(sound, kind):
    sound["overlap"] = {"conversations": 100, kind: 5}
    assert "5 of 100 held-out conversations" in the_warning(sound)
    sound["overlap"] = {"conversations": 100, kind: 1}
    assert warnings_of(sound) == []


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"chosen_change_per_token": -0.4}, "fell by 0.40 nats/token in sft: usual in DPO up to 0.2"),
        ({"both_fall": 0.8}, "in 80 % of the pairs"),
        ({"accuracy": 0.6, "longer": 0.7}, "tells 60 % of the pairs; length alone tells 70 %"),
        ({"accuracy": 0.6, "longer": 0.3}, "tells 60 % of the pairs; length alone tells 70 %"),
    ],
)
def test_preferences(sound, figures, words):
    sound["models"][1]["preferences"] |= figures
    assert words in the_warning(sound)


def test_a_report_of_one_model_that_measured_nothing_has_no_warnings():
    assert warnings_of({"models": [{"name": "a", "model": "a"}]}) == []


def test_replies_that_people_would_not_have_ended_either(sound):
    sound["people"] = {"cut": {"value": 0.6, "low": 0.5, "high": 0.7, "count": 100}}
    sound["models"][1]["replies"]["cut"]["value"] = 0.75
    assert "raise `max_new_tokens`" in the_warning(sound)
    sound["models"][1]["replies"]["cut"]["value"] = 0.9
    assert any("has not learnt to stop" in sentence for sentence in warnings_of(sound))
