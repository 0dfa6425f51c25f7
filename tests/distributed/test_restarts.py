"""A restart is told from a new start by what launchers count and by names that only one launch has."""

import pytest

from gpt2ft.distributed.restarts import is_restart_of, launch

VARIABLES = (
    *("GPT2FT_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@pytest.fixture
def started(monkeypatch):
    """started(NAME="value"): this process has these variables of launchers and no others."""

    def start(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


def test_what_nobody_launched_is_never_a_restart(started):
    started()
    assert launch() == {}
    assert not is_restart_of({"slurm": "7", "torchrun": "a", "GPT2FT_RUN_ID": "mine"})


@pytest.mark.parametrize(
    ("first", "count"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_RESTART_COUNT": "1"}),
        ({"TORCHELASTIC_RUN_ID": "b5c1"}, {"TORCHELASTIC_RESTART_COUNT": "2"}),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        ({"GPT2FT_RUN_ID": "mine"}, {}),
    ],
)
def test_a_counted_start_of_the_same_launch_is_one(started, first, count):
    started(**first)
    noted = launch()
    assert noted
    if count:
        assert not is_restart_of(noted)  # the same command once more, in the same job
    started(**first, **count)
    assert is_restart_of(noted)
    assert not is_restart_of({})
    assert not is_restart_of({giver: f"not {name}" for giver, name in noted.items()})


def test_a_job_that_slurm_queued_again_is_one_for_torchrun_too(started):
    started(SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="7", TORCHELASTIC_RESTART_COUNT="0")
    noted = launch()
    started(SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="7", TORCHELASTIC_RESTART_COUNT="0", SLURM_RESTART_COUNT="1")
    assert is_restart_of(noted)
