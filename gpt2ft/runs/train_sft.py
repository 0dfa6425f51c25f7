"""Supervised fine-tuning: the loss of every assistant turn, on everything above it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from gpt2ft.data.corpus import Corpus
from gpt2ft.data.plan import ChunkingRule, Conversations, Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.objective import Objective
from gpt2ft.objectives.sft import SFT
from gpt2ft.runs.progress import EvalResult, Evaluator
from gpt2ft.runs.samples import Sample, Turns
from gpt2ft.runs.train import RunSetup, train
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.training.evaluate import evaluate, total


@watchdog.until_the_end()
def run(settings: SFTSettings) -> None:
    train(settings, FineTuning(settings))


class FineTuning:
    """SFT as a task: it needs nothing but the conversations."""

    preferences = False

    def __init__(self, settings: SFTSettings, objective: Objective | None = None) -> None:
        self.settings = settings
        self.objective = objective or SFT()

    def cutting(self, for_training: bool) -> ChunkingRule:
        """Evaluation counts every message once."""
        data = self.settings.data
        weight = data.message_weight if for_training else "once"
        return Conversations(weight, data.max_length, self.settings.training.tokens_per_micro_batch)

    def ready(self, stage: RunSetup, model: TargetLogProbs, signals: SignalHandler) -> dict[str, Any]:
        return {}

    def check_start(self, stage: RunSetup, model: TargetLogProbs, step: int) -> None:
        pass

    def before(self, stage: RunSetup, prompts: list[Turns]) -> list[Sample]:
        return []

    def score(self, stage: RunSetup) -> Evaluator:
        byte_lengths = stage.policy.tokenizer.byte_lengths()

        def scoring(model: nn.Module, held_out: Corpus, plan: Plan, was_signalled: Callable[[], bool]) -> EvalResult:
            scores = evaluate(model, plan, byte_lengths, stage.accelerator, was_signalled)
            score = total(scores)
            metrics = score.figures()
            if len(scores) > 1:
                scored = [pair for pair in zip(held_out.stores, scores, strict=True) if pair[1].tokens]
                metrics |= {f"loss/{store.source}": part.nats_per_token for store, part in scored}
            line = (
                f"held-out loss {score.nats_per_token:.4f} nats/token, perplexity {score.perplexity:,.2f}, "
                f"{score.bits_per_byte:.4f} bits/byte"
            )
            return EvalResult(score.nats_per_token, metrics, line)

        return scoring
