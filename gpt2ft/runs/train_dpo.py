"""Direct Preference Optimization: learn which of two replies is better, against the log-probs of step 0.

No second model is in memory: the log-probs of the reference are computed once, before training, and kept.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from torch import nn

from gpt2ft.data.chunks import ChunkingRule
from gpt2ft.data.corpus import Corpus
from gpt2ft.data.labelled_replies import LabelledReplies
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import autocast, precision_of
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.files import cache_root
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.dpo import DPO
from gpt2ft.objectives.kto import KTO
from gpt2ft.objectives.losses import start_loss
from gpt2ft.objectives.objective import Objective
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.runs.evaluation import EvalResult, Evaluator
from gpt2ft.runs.identity import versions
from gpt2ft.runs.loaded_model import LoadedModel
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.runs.samples import Sample, Turns, answer
from gpt2ft.runs.train import train
from gpt2ft.settings.scripts import DPOSettings
from gpt2ft.text.display import print_row
from gpt2ft.text.template import template_digest
from gpt2ft.training import reference_pass
from gpt2ft.training.evaluate import evaluate_objective
from gpt2ft.training.reference_store import ReferenceStore
from gpt2ft.wording import counted


@watchdog.announce_end()
def run(settings: DPOSettings) -> None:
    train(settings, PreferenceTuning(settings))


class PreferenceTuning:
    """DPO as a task: pairs of replies, and their log-probs under the reference."""

    def __init__(self, settings: DPOSettings) -> None:
        self.settings = settings
        self.is_of_pairs = PREFERENCE_LOSSES[settings.dpo.loss].of_pairs
        self.objective: Objective = DPO(settings.dpo) if self.is_of_pairs else KTO(settings.dpo)

    def chunking(self, capacity: int, for_training: bool) -> ChunkingRule:
        """Evaluation counts every pair once."""
        dpo, data = self.settings.dpo, self.settings.data
        if not self.is_of_pairs:
            return LabelledReplies(data.max_length, capacity)
        weight = dpo.pair_weight if for_training else "pair"
        return PreferencePairs(dpo.pairs, weight, data.max_length, capacity, dpo.whole_trees, dpo.is_list_wise)

    def prepare_reference(self, setup: RunSetup, model: TargetLogProbs, signals: SignalHandler) -> dict[str, Any]:
        """Attach the reference to the plans, read from the store; missing log-probs are computed first."""
        if not self.settings.dpo.needs_reference:
            return {}
        store = store_for(setup.loaded, model, setup.accelerator, self.settings.data.cache)
        plans = setup.plans()
        computed = reference_pass.attach_reference(plans, store, model, setup.accelerator, signals)
        if self.settings.dpo.ld_alpha < 1:
            reference_pass.attach_tails(plans, store, setup.accelerator)
        replies = sum(len(plan.reference) for plan in plans)
        if setup.accelerator.is_main_process:
            now = f"{computed:,} of them computed now"
            print_row("reference", f"{counted(replies, 'reply', 'replies')}, {now}; {store.folder}")
        digest = hashlib.sha256(b"".join(plan.reference.tobytes() for plan in plans)).hexdigest()
        of_store = {"folder": str(store.folder), "computed_by": store.computed_by}
        return {"reference": of_store | {"replies": replies, "digest": digest}}

    def check_start(self, setup: RunSetup, model: TargetLogProbs, step: int) -> float:
        if not self.settings.dpo.needs_reference:
            return 0.0
        store = store_for(setup.loaded, model, setup.accelerator, self.settings.data.cache)
        expected = start_loss(self.settings.dpo)
        start = reference_pass.compute_start(model, setup.plan, step, self.objective, setup.accelerator)
        reference_pass.check_start(start, expected, store)
        if setup.accelerator.is_main_process:
            loss = "" if expected is None else f", loss {expected:.4f}"
            print_row("checked", f"the start is the reference within {start.worst:.1g} nats/token{loss}")
        return start.worst

    def samples_at_start(self, setup: RunSetup, prompts: list[Turns]) -> list[Sample]:
        with autocast(setup.accelerator):
            return answer(setup.loaded, prompts, self.settings.training.sample_tokens)

    def evaluator(self, setup: RunSetup) -> Evaluator:
        def evaluate(model: nn.Module, held_out: Corpus, plan: Plan, was_signalled: Callable[[], bool]) -> EvalResult:
            metrics = evaluate_objective(model, plan, self.objective, setup.accelerator, was_signalled)
            right = "pairs the right way round" if self.is_of_pairs else "replies on the side of their label"
            accuracy = f"{metrics['accuracy']:.1%} of {right}, margin {metrics['margin']:.3f}"
            line = f"held-out loss {metrics['loss']:.4f}, {accuracy}"
            return EvalResult(metrics["loss"], metrics, line)

        return evaluate


def store_for(loaded: LoadedModel, model: TargetLogProbs, accelerator: Any, cache: str | None) -> ReferenceStore:
    """Return the store for the log-probs of a finished model, as computed on this device and in this precision."""
    has_frozen = not all(parameter.requires_grad for parameter in model.parameters())
    rounds: bool | str = has_frozen and precision_of(accelerator) != "no"
    if rounds and model.gpt2.wte.weight.requires_grad:
        rounds = "except the table"
    computed_by = {
        "weights": loaded.digest,
        "tokenizer": loaded.tokenizer.digest,
        "template": template_digest(),
        "rounds_frozen_matrices": rounds,
        "precision": precision_of(accelerator),
        "attention": model.backend,
        "device": accelerator.device.type,
    } | ({"blocks": "compiled"} if model.compiled else {})
    return ReferenceStore(cache_root(cache), computed_by, versions())
