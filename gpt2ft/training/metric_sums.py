"""Sums of the metrics of a run, from one logged line to the next. They are divided only where they are logged."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpt2ft.distributed.accelerator import global_sum


class MetricSums:
    """Loss, metrics, tokens and seconds of the steps since the sums were last taken.

    Losses and metrics are this process's share and stay on the device until they are taken: reading them in every step
    would have the CPU wait for the GPU. Normalizers and tokens are those of all processes.
    """

    def __init__(self, accelerator: Any, metric_names: Sequence[str]) -> None:
        self.accelerator = accelerator
        self.metric_names = metric_names
        self._begin()

    def _begin(self) -> None:
        device = self.accelerator.device
        self.loss = torch.zeros((), device=device)
        self.metrics = torch.zeros(len(self.metric_names), dtype=torch.float64, device=device)
        self.steps = self.updates = 0
        self.normalizer = self.tokens = self.grad_norms = 0.0
        self.seconds, self.running_since = 0.0, time.perf_counter()

    def add(self, loss: Tensor, metrics: Tensor, normalizer: float, tokens: float, grad_norm: float) -> None:
        """Add one step.

        A step whose gradient was not finite has changed no weight, and its loss may not be finite either: it adds its
        tokens alone.

        Args:
            loss: sum of this process's losses, a scalar.
            metrics: sums of this process's metrics [M].
            tokens: of all streams, those that are repeated as context left out.
            grad_norm: before clipping.
        """
        self.steps += 1
        self.tokens += tokens
        if math.isfinite(grad_norm):
            self.updates += 1
            self.loss += loss
            self.metrics += metrics
            self.normalizer += normalizer
            self.grad_norms += grad_norm

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

        All processes call it together. Where no step had a finite gradient, means are NaN.
        """
        totals = global_sum(self.accelerator, float(self.loss), *self.metrics.tolist())
        seconds = self.seconds + time.perf_counter() - self.running_since
        names = ("loss", *self.metric_names)
        means = [total / self.normalizer if self.normalizer else math.nan for total in totals]
        metrics = dict(zip(names, means, strict=True)) | {
            "grad_norm": self.grad_norms / self.updates if self.updates else math.nan,
            "tokens_per_second": self.tokens / seconds,
        }
        seconds_per_step = seconds / self.steps
        self._begin()
        return metrics, seconds_per_step
