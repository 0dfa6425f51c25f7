"""Held-out scores and sample replies while a run trains."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from gpt2ft.data.corpus import Corpus
from gpt2ft.data.plan import Plan
from gpt2ft.distributed.accelerator import autocast
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.runs.samples import Sample, Turns, answer, sample_texts
from gpt2ft.text.display import escape_control_characters
from gpt2ft.training.evaluate import EvaluationInterrupted
from gpt2ft.training.strategy import Strategy
from gpt2ft.training.tracking import Tracker


@dataclass(frozen=True)
class EvalResult:
    """Held-out loss, the metrics logged with it, and one line for people."""

    loss: float
    metrics: dict[str, float]
    line: str


Evaluator = Callable[[nn.Module, Corpus, Plan, Callable[[], bool]], EvalResult]


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Held-out loss and sample replies at a step; all processes call it together.

    Attributes:
        prompts: to be answered; on the main process alone.
        samples_at_start: replies of the model at step 0 to the same prompts; none for SFT.
    """

    setup: RunSetup
    strategy: Strategy
    evaluator: Evaluator
    tracker: Tracker
    signals: SignalHandler
    prompts: list[Turns]
    samples_at_start: list[Sample]

    def at_start(self) -> None:
        """Evaluate step 0.

        Raises:
            Preempted: if a signal cuts it short. Nothing has been trained, so that the next start begins with it.
        """
        try:
            self(0)
        except EvaluationInterrupted:
            raise Preempted("told to stop before the first step") from None

    def __call__(self, step: int) -> float | None:
        """Return the held-out loss, logged and printed; None without held-out data."""
        held_out, plan = self.setup.held_out, self.setup.eval_plan
        if held_out is None or plan is None:
            return None
        result = self.evaluator(self.strategy.model, held_out, plan, self.signals.was_signalled)
        samples = self.generate_samples()
        stopped = {"stopped": sum(sample.stopped for sample in samples) / len(samples)} if samples else {}
        metrics = result.metrics | stopped
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        self.tracker.log(step, metrics | self.setup.plan.position(step))
        self.tracker.print_line(f"step {step}: {result.line}")
        for number, text in enumerate(sample_texts(samples, self.samples_at_start)):
            self.tracker.log_text(step, f"samples/{number}", text)
        return result.loss

    def generate_samples(self) -> list[Sample]:
        """Have the main process answer the prompts with the full model; the others, which call too, return none."""
        training, accelerator = self.setup.settings.training, self.setup.accelerator
        if not training.sample_prompts:
            return []
        gpt2 = self.strategy.full_model()
        if gpt2 is None:
            return []
        kept_on = next(gpt2.parameters()).device  # the CPU, where the model is in shards
        with autocast(accelerator):
            loaded = replace(self.setup.loaded, gpt2=gpt2.to(accelerator.device))
            samples = answer(loaded, self.prompts, training.sample_tokens)
        gpt2.to(kept_on)
        return samples

    def transcript(self) -> str:
        """Return new sample replies as text, for the end of the run; all processes call it together."""
        samples = self.generate_samples()
        title = ["\nReplies to prompts it has never seen:"] if samples else []
        return escape_control_characters("\n\n".join([*title, *sample_texts(samples, self.samples_at_start), ""]))
