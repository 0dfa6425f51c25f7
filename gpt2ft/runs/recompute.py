"""Steps of a finished run computed again: by the loop that has trained it, from the checkpoints that it has kept.

A line of metrics.jsonl holds means over the steps since the line before. So stretches are chosen, from a checkpoint or
the start to a line or the next checkpoint, and all lines within them are compared.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gpt2ft import checkpoint
from gpt2ft.checkpoint import TrainState
from gpt2ft.distributed.signals import Preempted
from gpt2ft.model.lora import trainable_parameters
from gpt2ft.runs.resume import ResumePoint, prepare_strategy
from gpt2ft.runs.run_setup import RunSetup, cast_to_precision, load_start, target_log_probs
from gpt2ft.training.fit import LoopInputs, fit
from gpt2ft.training.tracking import as_json

UNREPEATABLE = ("time", "train/tokens_per_second")  # in lines of metrics
Checkpoints = Mapping[int, Path]  # by step
Lines = Mapping[int, Mapping[str, Any]]  # of metrics.jsonl, by step
Deviations = list[tuple[float, str]]  # size, and a sentence about it


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of tensors, and the name of that tensor; infinite where it has no counterpart."""
    sizes = dict.fromkeys(found.keys() | expected.keys(), math.inf)
    for name in found.keys() & expected.keys():
        if found[name].shape == expected[name].shape:
            sizes[name] = float((found[name].detach().cpu() - expected[name]).abs().nan_to_num(math.inf).max())
    worst = max(sizes, key=sizes.__getitem__)
    return sizes[worst], worst


def choose(lines: Iterable[int], saved: Checkpoints, most: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Return stretches of at most `most` steps together: the end of the run if that is near enough, then random ones.

    Args:
        lines: steps after which metrics were logged.
    """
    targets, ends = sorted({*lines, *saved}), dict[int, int]()
    for step in [*targets[-1:], *random.permutation(targets).tolist()]:
        first = max(begin for begin in (0, *saved) if begin < step)
        more = step - max(ends.get(first, first), first)
        if 0 < more <= most:
            ends[first] = step
            most -= more
    return sorted(ends.items())


class Recomputation:
    """A stretch trained again: in the loop it takes the place of tracker and signals, and ends it after the last step.

    Attributes:
        metrics: each number that was compared, equal or not; sizes are relative.
        weights: of each checkpoint on the way the one that differs most, on the main process; sizes are absolute.
    """

    def __init__(self, setup: RunSetup, task: Any, stretch: tuple[int, int], saved: Checkpoints, lines: Lines):
        """Train, as a run that resumes from the checkpoint; all processes call it together."""
        self.first, self.last = self.step, _ = self.logged, _ = stretch
        self.saved, self.written = saved, lines
        self.metrics, self.weights = Deviations(), Deviations()
        start = replace(setup, loaded=load_start(setup.settings))
        model = cast_to_precision(start, target_log_probs(start))
        state = checkpoint.read_state(saved[self.step])[0] if self.step else TrainState()
        with redirect_stdout(StringIO()):  # it tells how long the whole run would take
            self.strategy = prepare_strategy(start, model, ResumePoint(state, saved.get(self.step)))
        training = setup.settings.training.model_copy(update={"patience": None})  # nothing is evaluated
        inputs = LoopInputs(
            accelerator=setup.accelerator, strategy=self.strategy, objective=task.objective, batches=setup.plan,
            steps=setup.steps, training=training, optimization=setup.settings.optimizer, tracker=self,
            evaluate=lambda step: None, save=lambda state: None, signals=self,
        )  # fmt: skip
        with suppress(Preempted):
            fit(inputs, state)
        del self.strategy
        setup.accelerator.free_memory()

    def was_signalled(self) -> bool:
        return self.step >= self.last

    def advance(self) -> None:
        self.step += 1
        if self.step in self.saved and (model := self.strategy.full_model()) is not None:
            folder = self.saved[self.step]
            size, name = largest_difference(trainable_parameters(model), checkpoint.read_weights(folder))
            self.weights.append((size, f"{folder}: `{name}` differs by {size:.2g} from what is computed again"))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Compare a line with the one that was written, if that covers the same steps: `log_every` may have changed."""
        begin, self.logged = self.logged, step
        if step not in self.written or begin != max(other for other in (self.first, *self.written) if other < step):
            return
        for name in sorted(metrics.keys() - UNREPEATABLE):
            then, now = self.written[step].get(name), as_json(metrics[name])
            size = 0.0 if then == now else math.inf
            if size and isinstance(then, int | float) and isinstance(now, int | float):
                size = abs(then - now) / max(abs(then), abs(now))
            self.metrics.append((size, f"step {step}: `{name}` is {then}, but {now} when it is computed again"))

    def show(self, *_: Any) -> None:
        """Show nothing."""
