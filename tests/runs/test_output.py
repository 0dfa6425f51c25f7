"""All processes decide alike what becomes of the run that lies in a folder."""

import pytest

from gpt2ft.runs import output
from gpt2ft.settings.scripts import SFTSettings


@pytest.mark.parametrize("knows_it", [True, False])
def test_a_restart_that_one_machine_knows_is_one_for_all(knows_it, accelerator, monkeypatch, tmp_path):
    """Of a launch by torchrun that has no id, only the machine whose launcher has begun the run can tell."""
    monkeypatch.setattr(output, "global_sum", lambda accelerator, *numbers: [number + knows_it for number in numbers])
    settings = SFTSettings(output=str(tmp_path / "run"), resume="never")
    opened = output.open_output(settings, accelerator)
    assert not opened.is_of_this_launch()
    assert opened.continues(settings) is knows_it
    opened.model.mkdir()
    (opened.model / "config.json").write_text("{}")
    assert opened.is_finished_by_this_launch() is knows_it
