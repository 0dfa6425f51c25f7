"""Sums of the metrics of a run, from one logged line to the next. They are divided only where they are logged."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt2ft.checkpoint import CheckpointError


class MetricSums:
    """Loss, metrics, tokens and seconds of the steps since the sums were last taken, over all processes.

    Losses and metrics stay on the device until they are taken: reading them in every step would have the CPU wait for
    the GPU.

    Args:
        saved: of the checkpoint that a run goes on from, so that its next line is that of a run that was never stopped;
            empty at the start. Speed counts from now on.

    Raises:
        CheckpointError: if they are the sums of other metrics.
    """

    def __init__(self, device: torch.device, metric_names: Sequence[str], saved: Mapping[str, float]) -> None:
        self.device = device
        self.names = ("loss", *metric_names, "normalizer")
        expected = {*self.names, "grad_norms", "updates"}
        if saved and saved.keys() != expected:
            raise CheckpointError(f"`state.sums` must hold {', '.join(sorted(expected))}, but holds {', '.join(saved)}")
        self._begin(saved)

    def _begin(self, saved: Mapping[str, float]) -> None:
        values = [saved.get(name, 0.0) for name in self.names]
        self.sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.updates, self.grad_norms = saved.get("updates", 0.0), saved.get("grad_norms", 0.0)
        self.steps, self.tokens = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        self.seconds, self.running_since = 0.0, time.perf_counter()

    def add(self, sums: Tensor, counts: Tensor, grad_norm: float) -> None:
        """Add one step.

        A step whose gradient was not finite has changed no weight, and its loss may not be finite either: it adds its
        tokens alone.

        Args:
            sums: of losses and of each metric over all processes, float64 [1 + M].
            counts: normalizer and tokens of all processes, float64 [2]; tokens repeated as context are left out.
            grad_norm: before clipping.
        """
        self.steps += 1
        self.tokens += counts[1]
        if math.isfinite(grad_norm):
            self.updates += 1
            self.sums += torch.cat([sums, counts[:1]])
            self.grad_norms += grad_norm

    def to_json(self) -> dict[str, float]:
        """Return what a run that goes on from here must know, the same on any number of processes."""
        sums = dict(zip(self.names, self.sums.tolist(), strict=True))
        return sums | {"grad_norms": self.grad_norms, "updates": self.updates}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the seconds of evaluating and saving out of the training speed."""
        self.seconds += time.perf_counter() - self.running_since
        try:
            yield
        finally:
            self.running_since = time.perf_counter()

    def take(self) -> tuple[dict[str, float], float]:
        """Return the metrics of the steps added, and the seconds per step; then begin anew.

        Where no step had a finite gradient, means are NaN.
        """
        *totals, normalizer = self.sums.tolist()
        seconds = self.seconds + time.perf_counter() - self.running_since
        means = [total / normalizer if normalizer else math.nan for total in totals]
        metrics = dict(zip(self.names, means, strict=False)) | {
            "grad_norm": self.grad_norms / self.updates if self.updates else math.nan,
            "tokens_per_second": float(self.tokens) / seconds,
        }
        seconds_per_step = seconds / max(1, self.steps)  # none since a run went on, to end at once
        self._begin({})
        return metrics, seconds_per_step
