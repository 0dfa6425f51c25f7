"""The loop. It knows streams, log-probs and an objective, and nothing of what is being trained for."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from gpt2ft.checkpoint import TrainState
from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import global_sum, loss_scale
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.errors import Gpt2ftError
from gpt2ft.objectives.objective import Objective
from gpt2ft.random import seed_for
from gpt2ft.settings.sections import OptimizerSettings, TrainingSettings
from gpt2ft.stream import TokenStream
from gpt2ft.training.evaluate import EvaluationInterrupted
from gpt2ft.training.optimizer import learning_rate, set_learning_rate
from gpt2ft.training.strategy import Strategy
from gpt2ft.training.tracking import Tracker


class TrainingDiverged(Gpt2ftError):
    """Too many steps in a row without a finite gradient."""

    exit_code = 1


@dataclass(frozen=True)
class LoopInputs:
    """What the loop is handed."""

    accelerator: Any
    strategy: Strategy  # model and optimizer, prepared
    objective: Objective
    batches: Plan
    steps: int
    training: TrainingSettings
    optimization: OptimizerSettings
    tracker: Tracker
    evaluate: Callable[[int], float | None]  # steps done -> held-out loss, None without held-out data
    save: Callable[[TrainState], None]
    signals: SignalHandler = field(default_factory=SignalHandler)


def fit(job: LoopInputs, state: TrainState) -> TrainState:
    """Trains from `state` to the last step.

    Raises:
        Preempted: once the step that was under way is saved.
        TrainingDiverged: if it makes no sense to go on.
    """
    model = job.strategy.model
    model.train()
    recent = Recent(job)
    state = evaluated(job, state, recent, is_saved=True)  # a run that was told to stop may have left it undone
    for step, streams in step_streams(job, state.step):
        rate = learning_rate(step, job.steps, job.optimization)
        set_learning_rate(job.strategy.optimizer, rate)
        watchdog.at("counting", step)
        counted = sum(job.objective.normalizer(stream) for _, stream in streams)
        tokens = sum(stream.num_tokens for _, stream in streams)
        counted, tokens = global_sum(job.accelerator, counted, tokens)
        scale = loss_scale(job.accelerator, counted)
        step_loss = torch.zeros((), device=job.accelerator.device)
        measured = torch.zeros(len(job.objective.metric_names), dtype=torch.float64, device=job.accelerator.device)
        for number, stream in streams:
            with job.accelerator.accumulate(model):
                torch.manual_seed(seed_for(job.training.seed, "dropout", step, number))
                watchdog.at("forward")
                log_probs = model(stream)
                loss = job.objective.loss(log_probs, stream)
                watchdog.at("backward")
                job.accelerator.backward(loss * scale)
                step_loss += loss.detach()
                measured += job.objective.metrics(log_probs.detach(), stream)
        watchdog.at("update")
        norm = job.strategy.update()
        state = state.after_step(updated=math.isfinite(norm))
        recent.add(step_loss, measured, counted, tokens, norm)
        job.tracker.advance()
        if state.skipped_in_a_row >= job.training.max_skipped_steps:
            raise TrainingDiverged(
                f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, the last was step {step}: "
                "lower `optimizer.learning_rate` or look at the data of these steps"
            )
        if is_due(state.step, job.training.log_every, job.steps):
            recent.log(state, rate)
        watchdog.at("end of the step")
        if any(global_sum(job.accelerator, float(bool(job.signals)))):  # wherever the signal has arrived
            stop(job, state)
        state = evaluated(job, state, recent)
        save_every = job.training.save_every or job.training.eval_every or job.batches.steps_per_epoch
        if is_due(state.step, save_every, job.steps) or state.best_step == state.step:
            with recent.paused():
                job.save(state)
    return state


def evaluated(job: LoopInputs, state: TrainState, recent: "Recent", is_saved: bool = False) -> TrainState:
    """The state after the evaluation that is due after its step, if there is one.

    Args:
        is_saved: whether there is a checkpoint of this step already.
    """
    every = job.training.eval_every or job.batches.steps_per_epoch
    if state.step == 0 or state.evaluated_step == state.step or not is_due(state.step, every, job.steps):
        return state
    try:
        with recent.paused():
            loss = job.evaluate(state.step)
    except EvaluationInterrupted:
        stop(job, state, is_saved)
    return state.after_evaluation(loss)


def stop(job: LoopInputs, state: TrainState, is_saved: bool = False) -> NoReturn:
    """Saves and ends the run; all processes come here together."""
    if not is_saved:
        job.save(state)
    raise Preempted(f"told to stop, and has saved step {state.step}")


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done `every` steps is due after `step` steps; the last step is never left out."""
    return step % every == 0 or step == last


def step_streams(job: LoopInputs, start: int) -> Iterator[tuple[int, list[tuple[int, TokenStream]]]]:
    """(step, [(micro-batch number in the step, stream on the device), ...]) for this process, built one step ahead."""
    rank, processes, device = job.accelerator.process_index, job.accelerator.num_processes, job.accelerator.device
    pin = device.type == "cuda"

    def build(step: int) -> list[tuple[int, TokenStream]]:
        numbers = range(rank, job.batches.micro_batches_per_step, processes)
        streams = [(number, job.batches.training_stream(step, number)) for number in numbers]
        return [(number, stream.pin_memory() if pin else stream) for number, stream in streams]

    with ThreadPoolExecutor(1, thread_name_prefix="streams") as builder:
        following = builder.submit(build, start) if start < job.steps else None
        for step in range(start, job.steps):
            watchdog.at("waiting for data", step)
            built = following.result()
            following = builder.submit(build, step + 1) if step + 1 < job.steps else None
            yield step, [(number, stream.to(device, non_blocking=True)) for number, stream in built]


class Recent:
    """Sums since the last line of metrics."""

    def __init__(self, job: LoopInputs) -> None:
        self.job = job
        self._clear()

    def _clear(self) -> None:
        device = self.job.accelerator.device
        self.loss = torch.zeros((), device=device)  # of this process, as is what is measured
        self.measured = torch.zeros(len(self.job.objective.metric_names), dtype=torch.float64, device=device)
        self.steps, self.updates = 0, 0
        self.counted, self.tokens, self.norms = 0.0, 0.0, 0.0
        self.seconds, self.since = 0.0, time.perf_counter()

    def add(self, loss: Tensor, measured: Tensor, counted: float, tokens: float, norm: float) -> None:
        """One step: this process's sums; what was counted and read by all; the gradient norm before clipping.

        A step that was skipped adds its tokens alone: its loss is not one.
        """
        self.steps += 1
        self.tokens += tokens
        if math.isfinite(norm):
            self.updates += 1
            self.loss += loss
            self.measured += measured
            self.counted += counted
            self.norms += norm

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is not training out of the speed."""
        self.seconds += time.perf_counter() - self.since
        try:
            yield
        finally:
            self.since = time.perf_counter()

    def log(self, state: TrainState, rate: float) -> None:
        sums = global_sum(self.job.accelerator, float(self.loss), *self.measured.tolist())
        seconds = self.seconds + time.perf_counter() - self.since
        names = ("loss", *self.job.objective.metric_names)
        means = {
            f"train/{name}": total / self.counted if self.counted else math.nan
            for name, total in zip(names, sums, strict=True)
        }
        metrics = means | {
            "train/grad_norm": self.norms / self.updates if self.updates else math.nan,
            "train/learning_rate": rate,
            "train/tokens_per_second": self.tokens / seconds,
            "train/skipped_steps": state.step - state.updates,
        }
        self.job.tracker.log(state.step, metrics)
        self.job.tracker.show(state.step, metrics, seconds / self.steps * (self.job.steps - state.step))
        self._clear()
