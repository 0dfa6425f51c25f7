"""Duration of a run, told beforehand from the time that its largest stream takes."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2ft.runs.run_setup import RunSetup

FORWARD = 1 / 3  # share of the forward pass in a training step
UNITS = ((1, "s", 90), (60, "min", 90), (3600, "h", 48))  # seconds, name, and how many of it are still told in it


def estimate_seconds(setup: "RunSetup", seconds_per_stream: float, done: int) -> float:
    """Return about how long a run still takes, without samples and saving.

    Args:
        seconds_per_stream: of one stream forward, backward and through the optimizer.
        done: steps.
    """
    plan, eval_plan, processes = setup.plan, setup.eval_plan, setup.accelerator.num_processes
    steps = setup.steps - done
    streams = steps * math.ceil(plan.streams_per_step / processes)
    if eval_plan is not None:
        evaluations = 1 + steps / (setup.settings.training.eval_every or plan.steps_per_epoch)
        cost = FORWARD * eval_plan.capacity / plan.capacity
        streams += evaluations * math.ceil(len(eval_plan.streams) / processes) * cost
    return streams * seconds_per_stream


def spoken(seconds: float) -> str:
    """Return a duration in its largest fitting unit: `40 s`, `5 min`, `3 h`, `12 days`."""
    for size, name, most in UNITS:
        if seconds < most * size:
            return f"{max(1, round(seconds / size))} {name}"
    return f"{seconds / 86400:,.0f} days"
