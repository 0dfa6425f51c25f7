"""Supervised fine-tuning: learn every assistant turn, given the turns above it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from gpt2ft.data.chunks import ChunkingRule, ConversationTrees
from gpt2ft.data.corpus import Corpus
from gpt2ft.data.kinds import LEARNT
from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.objective import Objective
from gpt2ft.objectives.sft import SFT
from gpt2ft.runs.evaluation import EvalResult, Evaluator
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.runs.samples import Sample, Turns
from gpt2ft.runs.train import train
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.training.evaluate import evaluate_by_source, sum_over_sources


@watchdog.announce_end()
def run(settings: SFTSettings) -> None:
    train(settings, FineTuning(settings))


class FineTuning:
    """SFT as a task: it has no reference."""

    def __init__(self, settings: SFTSettings, objective: Objective | None = None) -> None:
        self.settings = settings
        self.objective = objective or SFT()

    def chunking(self, capacity: int, for_training: bool) -> ChunkingRule:
        """Evaluation counts every message once."""
        data = self.settings.data
        weight = data.message_weight if for_training else "once"
        return ConversationTrees(weight, data.max_length, capacity, LEARNT[data.train_on])

    def prepare_reference(self, setup: RunSetup, model: TargetLogProbs, signals: SignalHandler) -> dict[str, Any]:
        return {}

    def check_start(self, setup: RunSetup, model: TargetLogProbs, step: int) -> float:
        return 0.0

    def samples_at_start(self, setup: RunSetup, prompts: list[Turns]) -> list[Sample]:
        return []

    def evaluator(self, setup: RunSetup) -> Evaluator:
        byte_lengths = setup.loaded.tokenizer.byte_lengths()

        def evaluate(model: nn.Module, held_out: Corpus, plan: Plan, was_signalled: Callable[[], bool]) -> EvalResult:
            losses = evaluate_by_source(model, plan, byte_lengths, setup.accelerator, was_signalled)
            total = sum_over_sources(losses)
            metrics = total.metrics()
            if len(losses) > 1:
                by_source = zip(held_out.stores, losses, strict=True)
                metrics |= {f"loss/{store.source}": loss.nats_per_token for store, loss in by_source if loss.tokens}
            line = (
                f"held-out loss {total.nats_per_token:.4f} nats/token, perplexity {total.perplexity:,.2f}, "
                f"{total.bits_per_byte:.4f} bits/byte"
            )
            return EvalResult(total.nats_per_token, metrics, line)

        return evaluate
