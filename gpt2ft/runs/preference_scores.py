"""Scores of a model on held-out preferences, by the objective of its run, against what the run started from."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt2ft.data.chunks import Chunks
from gpt2ft.data.plan import Plan
from gpt2ft.distributed.accelerator import autocast
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.model.attention import Backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.pretrained import ModelError
from gpt2ft.objectives.dpo import DPO
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.runs.loaded_model import LoadedModel, find_model, load_model
from gpt2ft.runs.train_dpo import store_for
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.training.evaluate import evaluate_objective
from gpt2ft.training.reference_pass import attach_reference, attach_tails

ALWAYS = ("likelier", "chosen_length", "rejected_length")  # measured without a reference and without a run


def on_device(loaded: LoadedModel, backend: Backend, accelerator: Any) -> TargetLogProbs:
    return TargetLogProbs(loaded.gpt2, len(loaded.tokenizer), backend).to(accelerator.device)


def score_preferences(
    settings: EvaluateSettings,
    loaded: LoadedModel,
    home: Path | None,
    trained: RunSettings | None,
    plan: Plan,
    accelerator: Any,
    backend: Backend,
) -> dict[str, Any]:
    """Return the share of pairs whose better reply is rewarded more, or is likelier where there is no reference.

    The loss is that of the run, and without one of pairs DPO's as published; its name stands beside it as `objective`.
    """
    reference = _reference(settings, loaded, home, trained)
    own = trained.dpo if isinstance(trained, DPOSettings) else None
    if own and not PREFERENCE_LOSSES[own.loss].of_pairs:
        own = PreferenceSettings(beta=own.beta)
    objective = own or PreferenceSettings(loss="sigmoid" if reference else "simpo")
    objective = objective.model_copy(update={"beta": settings.beta or objective.beta})
    if reference is not None:
        model = on_device(reference, backend, accelerator)
        store = store_for(reference, model, accelerator, settings.cache)
        signals = SignalHandler()
        with signals.listening():
            attach_reference([plan], store, model, accelerator, signals)
        if objective.ld_alpha < 1:
            attach_tails([plan], store, accelerator)
        model.cpu()
    # Rewards are changes from the reference where there is one, whether the loss reads it or not.
    rewards = objective if objective.needs_reference or not reference else PreferenceSettings(beta=objective.beta)
    with autocast(accelerator):
        model = on_device(loaded, backend, accelerator)
        found = evaluate_objective(model, plan, DPO(rewards), accelerator)
        if rewards is not objective:
            found["loss"] = evaluate_objective(model, plan, DPO(objective), accelerator)["loss"]
    if reference is None and own is None:
        found = {name: found[name] for name in ALWAYS}
    else:
        found |= {"objective": objective.loss, "beta": objective.beta}
    if reference is not None:
        found |= {"reference": reference.source, "reference_weights": reference.digest}
    counts = {"pairs": plan.chunks.pairs, "compared_replies": plan.chunks.replies}
    return found | {name: int(count.sum()) for name, count in counts.items()} | {
        "prompts": len(np.unique(plan.chunks.all_rows, axis=0)), "longer": _longer_is_better(plan.chunks),
    }  # fmt: skip


def _longer_is_better(chunks: Chunks) -> float:
    """Return the accuracy of preferring the longer reply, whatever it says; a tie counts one half."""
    right = 0.0
    for number in range(len(chunks)):
        tree = chunks.tree(number)
        chosen, rejected = tree.lengths[tree.pairs].T
        right += float(((np.sign(chosen - rejected) + 1) / 2).sum())
    return right / int(chunks.pairs.sum())


def _reference(
    settings: EvaluateSettings, loaded: LoadedModel, home: Path | None, trained: RunSettings | None
) -> LoadedModel | None:
    """Return the model that rewards are measured against, if there is one.

    Raises:
        ModelError: if it is not what the run started from, or knows other ids.
    """
    if settings.reference is not None:
        found, _ = find_model(settings.reference)
    elif isinstance(trained, DPOSettings):
        found = load_model(trained.model, trained.training.seed)
        manifest = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
        if manifest["identity"]["initial_weights"] != found.digest:
            raise ModelError(
                f"{trained.model.path} has changed since {home} was trained from it: name what it was with "
                "`--reference`"
            )
    else:
        return None
    if found.tokenizer.digest != loaded.tokenizer.digest:
        raise ModelError(f"the reference {found.source} must have the tokenizer of {loaded.source}, but has another")
    return found


def describe_preferences(found: dict[str, Any]) -> str:
    """Return the scores as lines for people."""
    lines = [
        f"pairs     {found['pairs']:,} of {found['compared_replies']:,} replies to {found['prompts']:,} prompts",
        f"likelier  {found['likelier']:.1%} of chosen replies have the higher log-prob per token",
        f"longer    {found['longer']:.1%} of chosen replies are longer: the accuracy of counting tokens",
    ]
    if "objective" in found:
        against = f"against {found['reference']}" if "reference" in found else "per token, without a reference"
        lines += [
            f"accuracy  {found['accuracy']:.1%} of chosen replies have the higher reward {against}",
            f"margin    {found['margin']:.4f} (chosen {found['reward_chosen']:.4f}, rejected "
            f"{found['reward_rejected']:.4f}; beta {found['beta']:g})",
            f"loss      {found['loss']:.4f} by {found['objective']}",
        ]
    else:
        lines.append("rewards   none: they need `--reference`, the model that this one was trained from")
    return "\n".join(lines)
