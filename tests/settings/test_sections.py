"""Contents of the sections themselves: filters apart from the rest, ranges, mixing weights, renamed settings."""

import pytest

from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.sections import RENAMED, FilterSettings, SamplingSettings, split_mixing_weight
from gpt2ft.settings.training import DataSettings
from gpt2ft.settings.using import ServeSettings


def test_the_filters_are_taken_out_of_whatever_holds_them():
    given = {"languages": ("en",), "max_rank": 1, "reviewed_only": False, "on_error": "skip", "ignore_keys": ("a",)}
    for settings in (DataSettings(train=("a",), **given), EvaluateSettings(data=("a",), cache="b", **given)):
        assert type(settings.filters) is FilterSettings
        assert settings.filters == FilterSettings(**given)


def test_a_renamed_setting_exists_by_its_new_name_alone():
    assert set(RENAMED.values()) <= set(ServeSettings.model_fields)
    assert not set(RENAMED) & set(ServeSettings.model_fields)


# --- ranges of the sampling settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("inf"), float("nan"), 10**400, "hot"]),
        ("top_k", [-1, 1.5, "many"]),
        ("top_p", [0, 1.01]),
        ("min_p", [-1, 1.5]),
        ("repetition_penalty", [0, float("inf")]),
        ("seed", [0.5, "x"]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"1 validation error for SamplingSettings\n{name}\n"):
            SamplingSettings(**{name: value})


def test_all_values_out_of_range_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)3 validation errors.*\ntemperature\n.*\ntop_k\n.*\nseed\n"):
        SamplingSettings(temperature=-1, top_k=-1, seed="x")


def test_the_ends_of_the_ranges_are_allowed():
    SamplingSettings(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=-5)
    SamplingSettings(temperature=5, top_k=10**9, top_p=1e-9, min_p=1, repetition_penalty=1e-9, seed=2**70)


# --- mixing weights of data sources ---------------------------------------------------------------------------------


def test_a_source_may_have_a_mixing_weight(tmp_path):
    assert split_mixing_weight("oasst1@0.5") == ("oasst1", 0.5)
    assert split_mixing_weight("a.jsonl@2") == ("a.jsonl", 2)
    assert split_mixing_weight("oasst1") == ("oasst1", 1.0)
    assert split_mixing_weight("me@home.jsonl") == ("me@home.jsonl", 1.0)
    folder = tmp_path / "all@2"
    folder.mkdir()
    assert split_mixing_weight(str(folder)) == (str(folder), 1.0)


def test_mixing_weights_that_make_no_sense_and_sources_named_twice():
    data = {"train": ("oasst1@0", "oasst1", "b@101", "d@0.5"), "eval": ("c@0.5",), "max_length": 256}
    twice, zero, large, held_out = SFTSettings(data=data).problems()
    assert "`data.train`" in twice
    assert "oasst1" in twice
    assert "2 times" in twice
    assert ("`data.train`" in zero, "oasst1@0" in zero) == (True, True)
    assert ("`data.train`" in large, "b@101" in large) == (True, True)
    assert ("`data.eval`" in held_out, "c@0.5" in held_out) == (True, True)
