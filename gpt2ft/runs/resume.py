"""Resume point of a run: the newest checkpoint of the same run, or the start."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2ft import checkpoint
from gpt2ft.checkpoint import CheckpointError, TrainState
from gpt2ft.data.plan import Plan
from gpt2ft.distributed import launch_checks, watchdog
from gpt2ft.distributed.accelerator import load_scaler, once_a_machine, precision_of, raise_together
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.errors import SettingsError
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import load_trainable_parameters, trainable_parameters
from gpt2ft.runs.duration import estimate_seconds, spoken
from gpt2ft.runs.identity import facts_of, identity_of
from gpt2ft.runs.output import Output
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.text.display import print_row
from gpt2ft.training.memory_probe import explain_out_of_memory, memory_advice, probe_memory
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.strategy import Strategy, prepare

CONTENT = {  # of an identity: what its digests are of
    "tokenised_data": "the training data have changed",
    "held_out_data": "the held-out data have changed",
    "initial_weights": "the weights that it started from have changed",
}


@dataclass(frozen=True)
class ResumePoint:
    """State to continue from, and the checkpoint with its weights: None at the start."""

    state: TrainState
    checkpoint: Path | None


def find_resume_point(setup: RunSetup, output: Output) -> ResumePoint:
    """Return the newest whole checkpoint, on which all processes agree; the start if there is none or none is wanted.

    Raises:
        SettingsError: if the checkpoint belongs to a run that trains on other things or in another way.
        CheckpointError: if there are checkpoints, but all are damaged.
        LaunchError: if the processes do not find the same checkpoint or the same data.
    """
    resume_point = _newest(setup, output) if output.continues(setup.settings) else ResumePoint(TrainState(), None)
    check_agreement(setup.accelerator, facts_of(setup) | {"step": resume_point.state.step})
    return resume_point


def _newest(setup: RunSetup, output: Output) -> ResumePoint:
    is_main = setup.is_main
    found = once_a_machine(setup.accelerator, lambda: checkpoint.find_newest(output.checkpoints, verbose=is_main))
    if found is None:
        return ResumePoint(TrainState(), None)
    state, saved = checkpoint.read_state(found)
    now = identity_of(setup)
    of_content = [words for name, words in CONTENT.items() if saved.get(name) != now[name]]
    changed = ", ".join(of_content) or checkpoint.difference(saved, now)
    if changed:
        raise SettingsError(
            f"the run in {output.folder} cannot be continued: {changed}; "
            "restore it, or pass `--resume never` to train anew"
        )
    if setup.is_main:
        print_row("resuming", str(found))
    return ResumePoint(state, found)


def prepare_strategy(setup: RunSetup, model: TargetLogProbs, resume_point: ResumePoint) -> Strategy:
    """Load the checkpoint's weights, wrap model and optimizer, probe the memory, load the moments.

    In this order: wrapping may shard the weights, and an optimizer has no moments before its first update, which is the
    probe's.

    Raises:
        CheckpointError: if the checkpoint holds the weights of another run.
        DoesNotFit: if the largest stream needs more memory than there is.
    """
    settings, accelerator, state = setup.settings, setup.accelerator, resume_point.state
    if resume_point.checkpoint is not None:
        try:
            load_trainable_parameters(model.gpt2, checkpoint.read_weights(resume_point.checkpoint))
        except ValueError as error:
            raise CheckpointError(
                f"{resume_point.checkpoint} does not hold the weights of this run: {error}"
            ) from error
    is_fused = accelerator.device.type == "cuda"
    optimizer = adamw(model.gpt2, settings.optimizer, is_fused, settings.lora.plus_ratio)
    is_sharded = launch_checks.strategy() != "ddp"
    streams = settings.training.model_copy(update={"tokens_per_micro_batch": setup.plan.capacity})
    longest = settings.data.max_length * (2 if setup.plan.pair_capacity else 1)  # the two replies of a pair
    advice = memory_advice(streams, longest, bool(settings.lora.rank), is_sharded)
    with explain_out_of_memory(advice):
        strategy = prepare(accelerator, model, optimizer, settings.training.max_grad_norm)
        for stream in streams_to_probe(setup.plan, accelerator.device.type, precision_of(accelerator)):
            started = time.perf_counter()
            peak = probe_memory(strategy, accelerator, setup.plan.stream(stream))
    if setup.is_main:
        each = " on each process" if accelerator.num_processes > 1 else ""
        takes = spoken(estimate_seconds(setup, time.perf_counter() - started, state.step))
        print_row(
            "probed", f"the largest stream, peak memory {peak / 2**30:.2f} GiB{each}; the run takes about {takes}"
        )
    moments = checkpoint.read_moments(resume_point.checkpoint) if resume_point.checkpoint and state.updates else None
    strategy.load_moments(moments, state.updates)
    load_scaler(accelerator, state.scaler)  # which the probe has moved
    return strategy


def streams_to_probe(plan: Plan, device_type: str, precision: str) -> list[list[int]]:
    """Return the streams that the probe takes, as the plan has them; the largest comes last.

    On CUDA it comes twice: the first time compiles kernels. In halves on a CPU the next seven go before it: products
    are kept by their shapes, which differ from stream to stream.
    """
    if device_type == "cuda":
        return [plan.streams[0]] * 2
    return [*reversed(plan.streams[: 1 if precision == "no" else 8])]


def checkpoint_writer(setup: RunSetup, output: Output, strategy: Strategy) -> Callable[[TrainState], None]:
    """Return a function that saves a state with the current weights and moments; all processes call it together."""
    identity, training = identity_of(setup), setup.settings.training
    for_verification = training.steps_to_keep(setup.steps)

    def save(state: TrainState) -> None:
        watchdog.mark_progress("saving")  # one call may write a large file
        model, moments, problem = strategy.full_model(), strategy.moments(), None
        if model is not None:
            try:
                checkpoint.save(output.checkpoints, trainable_parameters(model), moments, state, identity)
                checkpoint.prune(output.checkpoints, training.keep_checkpoints, state.best_step, for_verification)
            except OSError as error:
                problem = error
        raise_together(setup.accelerator, problem)

    return save
