"""Each launch that would train on less than it looks like ends with one sentence that names what to use instead."""

import pytest
from silent_launches import SILENT, Outcome, launch, problem

SAMPLE = ("srun without torchrun", "a key of FSDP misspelt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.campaign) for name in SILENT]
)
def test_a_silent_launch_is_refused(name, tmp_path):
    assert problem(SILENT[name], launch(SILENT[name], tmp_path)) is None


def test_what_is_not_refused_is_seen():
    silent = SILENT[SAMPLE[0]]
    assert problem(silent, Outcome(0, 1.0, [], "", False))
    assert problem(silent, Outcome(1, 1.0, [silent.said], "", True))
    assert problem(silent, Outcome(1, 1.0, ["something else"], "", False))
    assert problem(silent, Outcome(1, 1.0, [silent.said] * 2, "", False))
    assert problem(silent, Outcome(1, 1.0, [silent.said], "", False)) is None
