"""The training loop.

    for each step
        set the learning rate; add up the normalizer over all streams and processes
        for each of this process's streams
            log-probs = model(stream); backward of loss sum / normalizer
        update; log; save and stop after a signal; evaluate, and end if that has got no better for too long; save

It knows streams, log-probs and the interface of an objective; neither SFT nor DPO, nor how processes share the model.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from gpt2ft.checkpoint import TrainState
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import (
    as_sums,
    device_of_sums,
    device_sum,
    loss_scale,
    on_device,
    scaler_state,
    sum_and_any,
)
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.errors import Gpt2ftError
from gpt2ft.objectives.objective import Objective
from gpt2ft.random import seed_for
from gpt2ft.settings.training import OptimizerSettings, TrainingSettings
from gpt2ft.training.evaluate import EvaluationInterrupted, with_baseline
from gpt2ft.training.metric_sums import MetricSums
from gpt2ft.training.optimizer import learning_rate, set_learning_rate
from gpt2ft.training.prefetch import BatchSource, step_streams
from gpt2ft.training.strategy import Strategy
from gpt2ft.training.tracking import Tracker
from gpt2ft.wording import counted


class TrainingDiverged(Gpt2ftError):
    """Too many steps in a row without a finite gradient."""

    exit_code = 1


class OutOfPatience(Exception):
    """The end of a run before its last step: its held-out loss has got no better. All processes raise it together."""

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.state = state  # which is saved


@dataclass(frozen=True)
class LoopInputs:
    """Everything that the loop works with and never replaces."""

    accelerator: Any
    strategy: Strategy  # model and optimizer, prepared
    objective: Objective
    batches: BatchSource
    steps: int
    training: TrainingSettings
    optimization: OptimizerSettings
    tracker: Tracker
    evaluate: Callable[[int], float | None]  # steps done -> held-out loss, None without held-out data
    save: Callable[[TrainState], None]
    signals: SignalHandler = field(default_factory=SignalHandler)


def fit(inputs: LoopInputs, state: TrainState) -> TrainState:
    """Train from `state` to the last step, or until `patience` is at its end; return the state after it.

    Raises:
        Preempted: after a signal on any process, once the step under way is saved.
        TrainingDiverged: after `max_skipped_steps` steps in a row without a finite gradient.
    """
    try:
        return train_steps(inputs, state)
    except OutOfPatience as end:
        return end.state


def train_steps(inputs: LoopInputs, state: TrainState) -> TrainState:
    """Train as `fit` does; raise OutOfPatience where that ends the run early."""
    accelerator, objective, strategy = inputs.accelerator, inputs.objective, inputs.strategy
    model, device = strategy.model, device_of_sums(accelerator)
    model.train()
    sums, state = MetricSums(device, objective.metric_names, state.sums), replace(state, sums={})
    state = evaluate_if_due(inputs, state, sums, is_resumed=True)  # a signal may have cut it short before the resume
    saved_at = time.monotonic()
    for step, counts, streams in step_streams(accelerator, objective, inputs.batches, range(state.step, inputs.steps)):
        watchdog.mark_progress("step", step)
        # Before the backward pass, because DeepSpeed updates the weights within it.
        set_learning_rate(strategy.optimizer, learning_rate(step, inputs.steps, inputs.optimization))
        # A step is sum / normalizer over all its streams on all processes, so every loss is scaled by the same number.
        counts = device_sum(accelerator, on_device(accelerator, *counts))
        scale = loss_scale(accelerator, counts[0])
        step_sums = torch.zeros(1 + len(objective.metric_names), dtype=torch.float64, device=device)
        for number, stream in with_baseline(inputs, streams):
            with accelerator.accumulate(model):  # DDP exchanges gradients at the last one alone
                # One seed a micro-batch: dropout is the same on any number of processes, and after a resume.
                torch.manual_seed(seed_for(inputs.training.seed, "dropout", step, number))
                log_probs = model(stream)
                loss = objective.loss(log_probs, stream)
                accelerator.backward(loss * scale)
                step_sums += as_sums(accelerator, loss.detach()[None], objective.metrics(log_probs.detach(), stream))
        grad_norm = strategy.update()  # skipped unless the norm is finite, which is the same on all processes
        state = state.after_step(updated=math.isfinite(grad_norm), scaler=scaler_state(accelerator))
        inputs.tracker.advance()
        stop_if_diverged(inputs, state)
        # One process may have the signal, or the time, alone, but all must do the same after the same step.
        flags = inputs.signals.was_signalled(), is_time_to_save(inputs, saved_at)
        step_sums, (is_told_to_stop, is_time) = sum_and_any(accelerator, step_sums, *flags)
        sums.add(step_sums, counts, grad_norm)
        if is_due(inputs, state.step, inputs.training.log_every):
            log_metrics(inputs, state, sums, steps_left=inputs.steps - state.step)
        if is_told_to_stop:
            save_and_stop(inputs, state, sums)
        # Evaluated first, so that the checkpoint knows the result and whether it is the best.
        state = evaluate_if_due(inputs, state, sums)
        if is_save_due(inputs, state) or is_time:
            saved_at = save(inputs, state, sums)
    return state


def log_metrics(inputs: LoopInputs, state: TrainState, sums: MetricSums, steps_left: int) -> None:
    """Log the means since the last call, on the main process."""
    metrics, seconds_per_step = sums.take()
    rate = learning_rate(state.step - 1, inputs.steps, inputs.optimization)
    metrics |= {"learning_rate": rate, "skipped_steps": state.step - state.updates, **state.scaler}
    metrics = {f"train/{name}": value for name, value in metrics.items()} | inputs.batches.position(state.step)
    inputs.tracker.log(state.step, metrics)
    inputs.tracker.show(state.step, metrics, seconds_per_step * steps_left)


def evaluate_if_due(inputs: LoopInputs, state: TrainState, sums: MetricSums, is_resumed: bool = False) -> TrainState:
    """Return the state after the evaluation that is due after its step, or the same state where none is.

    Args:
        is_resumed: there is a checkpoint of this step already, should a signal cut the evaluation short; that it does
            not know the result is made up for.

    Raises:
        OutOfPatience: if the run ends here.
    """
    if state.step and state.evaluated_step != state.step and is_due(inputs, state.step, inputs.training.eval_every):
        try:
            with sums.paused():
                loss = inputs.evaluate(state.step)
        except EvaluationInterrupted:
            save_and_stop(inputs, state, sums, is_saved=is_resumed)
        state = state.after_evaluation(loss)
        if is_resumed and is_save_due(inputs, state):
            save(inputs, state, sums)
    end_if_out_of_patience(inputs, state, sums)
    return state


def end_if_out_of_patience(inputs: LoopInputs, state: TrainState, sums: MetricSums) -> None:
    """Log and save as after a last step, and raise OutOfPatience, where too many evaluations were not better."""
    patience = inputs.training.patience
    if patience is None or state.evaluations_since_best < patience or state.step == inputs.steps:
        return
    if sums.updates:  # since the last line
        log_metrics(inputs, state, sums, steps_left=0)
    save(inputs, state, sums)
    raise OutOfPatience(state)


def save(inputs: LoopInputs, state: TrainState, sums: MetricSums) -> float:
    """Save, and return the time; all processes call it together."""
    with sums.paused():
        inputs.save(replace(state, sums=sums.to_json()))
    return time.monotonic()


def save_and_stop(inputs: LoopInputs, state: TrainState, sums: MetricSums, is_saved: bool = False) -> NoReturn:
    """Save and end the run; all processes come here together."""
    if not is_saved:
        save(inputs, state, sums)
    raise Preempted(f"told to stop, and has saved step {state.step}")


def stop_if_diverged(inputs: LoopInputs, state: TrainState) -> None:
    """Raise TrainingDiverged after too many steps in a row without a finite gradient."""
    if state.skipped_in_a_row >= inputs.training.max_skipped_steps:
        raise TrainingDiverged(
            f"the gradient was not finite in {counted(state.skipped_in_a_row, 'step')} in a row, the last was step "
            f"{state.step - 1}: lower `optimizer.learning_rate` or look at the data of these steps"
        )


def is_save_due(inputs: LoopInputs, state: TrainState) -> bool:
    """Return True every `save_every` steps, by default after each evaluation, and where a checkpoint is to be kept."""
    every, kept = inputs.training.save_every or inputs.training.eval_every, inputs.training.steps_to_keep(inputs.steps)
    return is_due(inputs, state.step, every) or state.step in {state.best_step, *kept}


def is_time_to_save(inputs: LoopInputs, saved_at: float) -> bool:
    """Return True if a kill would cost too much time. Bits do not depend on it: a run resumes from any step alike."""
    return time.monotonic() - saved_at > inputs.training.seconds_between_saves


def is_due(inputs: LoopInputs, step: int, every: int | None) -> bool:
    """Return True if something done `every` steps is due after `step` steps; the last step is never left out.

    Args:
        every: None for whenever an epoch ends.
    """
    return step == inputs.steps or (step % every == 0 if every else inputs.batches.ends_epoch(step))
