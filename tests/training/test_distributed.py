"""What processes must agree on before they train together."""

from types import SimpleNamespace

import pytest
import torch

from gpt2ft.training.distributed import LaunchError, check_agreement


def two_processes(step, data):
    """An accelerator whose other process goes on from `step` with `data`."""
    other = torch.tensor([step, int(data[:12], 16)], dtype=torch.float64)
    return SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=lambda mine: torch.cat([mine, other]))


def test_the_same_step_and_data():
    check_agreement(two_processes(7, "ab" * 32), 7, "ab" * 32)


@pytest.mark.parametrize(
    ("step", "data", "problem"), [(6, "ab" * 32, "the same checkpoints .* step 7"), (7, "ac" * 32, "the same data")]
)
def test_other_steps_and_other_data_are_refused(step, data, problem):
    with pytest.raises(LaunchError, match=problem):
        check_agreement(two_processes(step, data), 7, "ab" * 32)
