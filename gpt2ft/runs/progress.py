"""How a run is doing: held-out scores and sample replies while it trains."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gpt2ft.data.corpus import Corpus
from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import autocast
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.runs.loaded_model import LoadedModel
from gpt2ft.runs.samples import Sample, Turns, answer, beside
from gpt2ft.settings.sections import TrainingSettings
from gpt2ft.training.evaluate import EvaluationInterrupted
from gpt2ft.training.strategy import Strategy
from gpt2ft.training.tracking import Tracker


@dataclass(frozen=True)
class EvalResult:
    """The held-out loss, everything that is logged with it, and one line for people."""

    loss: float
    metrics: dict[str, float]
    line: str


Evaluator = Callable[[nn.Module, Corpus, Plan, Callable[[], bool]], EvalResult]


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss and sample replies at a step. All processes call it together."""

    accelerator: Any
    strategy: Strategy
    policy: LoadedModel
    held_out: Corpus | None
    plan: Plan | None
    score: Evaluator
    tracker: Tracker
    training: TrainingSettings
    signals: SignalHandler
    prompts: list[Turns]  # to be answered; none on other processes than the main one
    before: list[Sample]  # what the start answered, where that is of interest

    def of_the_start(self) -> None:
        """Of step 0. If it is cut short, the first step still follows and is saved."""
        with suppress(EvaluationInterrupted):
            self(0)

    def __call__(self, step: int) -> float | None:
        """The held-out loss, logged and said; None without held-out data."""
        if self.held_out is None or self.plan is None:
            return None
        standing = self.score(self.strategy.model, self.held_out, self.plan, self.signals.__bool__)
        samples = self.samples()
        stopped = {"stopped": sum(sample.stopped for sample in samples) / len(samples)} if samples else {}
        metrics = standing.metrics | stopped
        self.tracker.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.tracker.say(f"step {step}: {standing.line}")
        for number, text in enumerate(beside(self.before, samples)):
            self.tracker.text(step, f"samples/{number}", text)
        return standing.loss

    def samples(self) -> list[Sample]:
        """The main process answers, with the whole model; the others have no prompts."""
        if not self.training.sample_prompts:
            return []
        watchdog.at("sample replies", is_long=True)
        gpt2 = self.strategy.whole()
        if gpt2 is None:
            return []
        at_home = next(gpt2.parameters()).device
        with autocast(self.accelerator):
            policy = replace(self.policy, gpt2=gpt2.to(self.accelerator.device))
            samples = answer(policy, self.prompts, self.training.sample_tokens)
        gpt2.to(at_home)
        return samples

    def transcript(self) -> str:
        """All processes ask together."""
        samples = self.samples()
        title = ["\nReplies to prompts it has never seen:"] if samples else []
        return "\n\n".join([*title, *beside(self.before, samples), ""])
