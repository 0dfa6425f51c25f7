"""Processes that were told different things are told apart before anything makes one of them wait for another."""

from types import SimpleNamespace

import accelerate.utils
import pytest

from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.runs import train
from gpt2ft.runs.identity import check_settings
from gpt2ft.settings.scripts import SFTSettings


@pytest.fixture
def compare(monkeypatch):
    """compare(settings, of two processes): what the second finds."""

    def compare(*settings):
        gathered = []
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda facts: gathered.extend(facts) or list(gathered))
        for told in settings:
            check_settings(SimpleNamespace(num_processes=2), SFTSettings(**told))

    return compare


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"data": {"train": ["quickstart", "quickstart:more"]}}, "data.train"),  # one digest more to wait for
        ({"data": {"eval": ["quickstart:held_out"]}}, "data.eval"),
        ({"resume": "never"}, "resume"),
        ({"dry_run": True}, "dry_run"),
        ({"training": {"log_every": 3}}, "training.log_every"),
    ],
)
def test_a_setting_that_differs_is_named(told, named, compare):
    with pytest.raises(LaunchError, match=f"`{named}`"):
        compare({}, told)


def test_each_machine_may_have_folders_of_its_own(compare):
    compare({"output": "/here/run"}, {"output": "/there/run", "data": {"cache": "/scratch"}})


def test_a_run_compares_them_before_it_does_anything(monkeypatch, run_sft, tmp_path):
    def refuse(accelerator, settings):
        raise LaunchError("all processes must train the same run")

    monkeypatch.setattr(train, "check_settings", refuse)
    with pytest.raises(LaunchError):
        run_sft(tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()
