"""A run that cannot be tracked is refused before anything of it is loaded or written."""

import importlib.util

import pytest

from gpt2ft.data.reading import DataError
from gpt2ft.errors import SettingsError
from gpt2ft.settings.scripts import SFTSettings


@pytest.fixture
def start(monkeypatch, tmp_path, one_thread):
    """Starts a run of data that do not exist, where no tracker is installed."""
    from accelerate.state import AcceleratorState, GradientState

    from gpt2ft.runs.train import train
    from gpt2ft.runs.train_sft import FineTuning

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))

    def start(**settings):
        settings = SFTSettings(
            model={"path": "quickstart"},
            data={"train": ["nosuch.jsonl"], "max_length": 256},
            output=str(tmp_path / "run"),
            **settings,
        )
        train(settings, FineTuning(settings))

    return start


def test_nothing_is_loaded_without_the_tracker(start, tmp_path):
    with pytest.raises(SettingsError, match="pip install wandb"):
        start(tracking=["tensorboard", "wandb"])
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_only_looked_at_needs_none(start):
    with pytest.raises(DataError, match="nosuch"):
        start(tracking=["wandb"], dry_run=True)
