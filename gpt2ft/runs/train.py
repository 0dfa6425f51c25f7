"""A training run from start to finish: the stages that SFT and DPO share, in their order."""

from contextlib import closing
from typing import Any, Protocol

from gpt2ft.data.chunks import ChunkingRule
from gpt2ft.distributed.accelerator import start_accelerator
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.objective import Objective
from gpt2ft.runs.evaluation import Evaluator, HeldOutEvaluation
from gpt2ft.runs.finish import finish
from gpt2ft.runs.identity import check_settings
from gpt2ft.runs.manifest import manifest_of, starts_until
from gpt2ft.runs.micro_batch import keep_size, with_size_of
from gpt2ft.runs.output import open_output
from gpt2ft.runs.resume import checkpoint_writer, find_resume_point, prepare_strategy
from gpt2ft.runs.run_setup import RunSetup, cast_to_precision, run_preflight_checks, set_up, target_log_probs
from gpt2ft.runs.samples import Sample, Turns, sample_prompts
from gpt2ft.settings.scripts import RunSettings
from gpt2ft.system import training_problem
from gpt2ft.training.fit import LoopInputs, fit
from gpt2ft.training.trackers import check_trackers
from gpt2ft.training.tracking import Tracker


class Task(Protocol):
    """Parts of a run that SFT and DPO do not share."""

    objective: Objective

    def chunking(self, capacity: int, for_training: bool) -> ChunkingRule:
        """Return how trees become chunks that fit the context and streams of so many tokens."""

    def prepare_reference(self, setup: RunSetup, model: TargetLogProbs, signals: SignalHandler) -> dict[str, Any]:
        """Compute the reference by the model at step 0, where the loss needs one; return its entry in the manifest."""

    def check_start(self, setup: RunSetup, model: TargetLogProbs, step: int) -> float:
        """Raise an error unless the model, still as at step 0, agrees with the reference on this step of the plan.

        Return the largest difference of a reply, in nats per token; 0 where there is no reference.
        """

    def evaluator(self, setup: RunSetup) -> Evaluator:
        """Return the function that evaluates held-out data."""

    def samples_at_start(self, setup: RunSetup, prompts: list[Turns]) -> list[Sample]:
        """Return replies of the model at step 0, to be shown beside later ones; none where they are not shown."""


def train(settings: RunSettings, task: Task) -> None:
    """Train from the start or from the newest checkpoint, or only show the plan and the data.

    A model is finished before it is measured: loaded, adapted and cast, then compared with its reference, and only
    then wrapped and moved to where the run stood.
    """
    training = settings.training
    if not settings.looks_only and (problem := training_problem()):
        raise LaunchError(problem)
    accelerator = start_accelerator(training.precision, training.micro_batches_per_step, training.deterministic)
    check_settings(accelerator, settings)
    if accelerator.is_main_process and not settings.looks_only:
        check_trackers(settings.tracking)
    output = open_output(settings, accelerator)
    if output.is_finished_by_this_launch():
        return
    setup = set_up(keep_size(settings, output, accelerator), task, accelerator)
    settings = with_size_of(settings, setup.settings)
    if settings.looks_only:
        return
    in_float32 = target_log_probs(setup)
    run_preflight_checks(setup, in_float32)
    model = cast_to_precision(setup, in_float32)
    resume_point = find_resume_point(setup, output)
    signals = SignalHandler()
    with signals.listening():
        reference = task.prepare_reference(setup, model, signals)
    task.check_start(setup, model, resume_point.state.step)
    prompts = sample_prompts(setup.held_out, setup.loaded, training) if setup.is_main else []
    samples_at_start = task.samples_at_start(setup, prompts)
    strategy = prepare_strategy(setup, model, resume_point)
    starts = starts_until(output.read_manifest(), resume_point.state.step, accelerator)
    given = {"settings": settings.model_dump(mode="json"), "starts": starts}
    manifest = manifest_of(setup, model.backend) | reference | given
    output.begin(settings, manifest, accelerator)
    tracker = Tracker(
        output.folder, resume_point.state, setup.steps, settings.model_dump(mode="json"), active=setup.is_main
    )
    evaluation = HeldOutEvaluation(setup, strategy, task.evaluator(setup), tracker, signals, prompts, samples_at_start)
    inputs = LoopInputs(
        accelerator=accelerator, strategy=strategy, objective=task.objective, batches=setup.plan, steps=setup.steps,
        training=setup.settings.training, optimization=setup.settings.optimizer, tracker=tracker, evaluate=evaluation,
        save=checkpoint_writer(setup, output, strategy), signals=signals,
    )  # fmt: skip
    with closing(tracker), signals.listening():
        if resume_point.checkpoint is None:
            evaluation.at_start()
        state = fit(inputs, resume_point.state)
    finish(setup, output, strategy, manifest, state, evaluation.transcript())
    accelerator.end_training()
