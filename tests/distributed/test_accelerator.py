"""What processes must agree on before they train together."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from gpt2ft.distributed.accelerator import LaunchError, check_agreement


def two_processes(step, data):
    """An accelerator whose other process goes on from `step` with `data`."""
    digest = int(hashlib.sha256("".join(data).encode()).hexdigest()[:12], 16)
    other = torch.tensor([step, digest], dtype=torch.float64)
    return SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=lambda mine: torch.cat([mine, other]))


def test_the_same_step_and_data():
    check_agreement(two_processes(7, ["train", "held out"]), 7, "train", "held out")


@pytest.mark.parametrize(
    ("step", "data", "problem"),
    [
        (6, ["train", "held out"], "the same checkpoints .* step 7"),
        (7, ["other", "held out"], "the same data"),
        (7, ["train", "other"], "the same data"),
    ],
)
def test_other_steps_and_other_data_are_refused(step, data, problem):
    with pytest.raises(LaunchError, match=problem):
        check_agreement(two_processes(step, data), 7, "train", "held out")
