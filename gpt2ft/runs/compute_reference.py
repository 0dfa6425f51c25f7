"""Reference pass of DPO on its own: log-probs of every reply of a recipe under its model at step 0, before training."""

from typing import Any

import numpy as np

from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import start_accelerator
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.errors import SettingsError
from gpt2ft.files import user_path, write_json
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.pretrained import ModelError
from gpt2ft.report import reference
from gpt2ft.report.reference import MOST_LISTED, StoredPairs
from gpt2ft.runs.identity import check_settings, facts_of
from gpt2ft.runs.loaded_model import find_model
from gpt2ft.runs.run_setup import RunSetup, cast_to_precision, run_preflight_checks, set_up, target_log_probs
from gpt2ft.runs.train_dpo import PreferenceTuning, store_for
from gpt2ft.settings.scripts import ReferenceSettings
from gpt2ft.text.display import escape_control_characters
from gpt2ft.training.reference_pass import attach_reference
from gpt2ft.training.reference_store import reply_keys


@watchdog.announce_end()
def run(settings: ReferenceSettings) -> None:
    if not settings.dpo.needs_reference:
        raise SettingsError(f"`dpo.loss` = {settings.dpo.loss} needs no reference: there is nothing to compute")
    if settings.report and user_path(settings.report).exists():
        raise SettingsError(f"`report` = {settings.report} must not exist yet, but does: name another, or remove it")
    accelerator = start_accelerator(settings.training.precision, deterministic=settings.training.deterministic)
    check_settings(accelerator, settings)
    task = PreferenceTuning(settings)
    setup = set_up(settings, task, accelerator)
    if settings.looks_only:
        return
    check_agreement(accelerator, facts_of(setup))
    in_float32 = target_log_probs(setup)
    run_preflight_checks(setup, in_float32)
    model = cast_to_precision(setup, in_float32)
    signals = SignalHandler()
    with signals.listening():
        task.prepare_reference(setup, model, signals)
        if settings.report:
            found = _report(setup, settings, model, signals)
            if accelerator.is_main_process:
                print(escape_control_characters("\n".join(reference.lines(found))))
                user_path(settings.report).parent.mkdir(parents=True, exist_ok=True)
                write_json(user_path(settings.report), found)
                print(f"written to {settings.report}")
    accelerator.end_training()


def _report(
    setup: RunSetup, settings: ReferenceSettings, model: TargetLogProbs, signals: SignalHandler
) -> dict[str, Any]:
    """Return what the log-probs of the training pairs tell, of the start and of later models."""
    plan, cache = setup.plan, settings.data.cache
    stored, texts = _stored_pairs(setup)
    keys = reply_keys(plan).keys
    start = store_for(setup.loaded, model, setup.accelerator, cache).read_tokens(keys) if settings.later else []
    later, rows = None, []
    for name in settings.later:
        loaded, _ = find_model(name)
        if loaded.tokenizer.digest != setup.loaded.tokenizer.digest:
            raise ModelError(f"{name} must have the tokenizer of {setup.loaded.source}, but has another")
        policy = TargetLogProbs(
            loaded.gpt2, len(loaded.tokenizer), model.backend, compiles=model.compiled is not None
        ).to(setup.accelerator.device)
        store = store_for(loaded, policy, setup.accelerator, cache)
        attach_reference([plan], store, policy, setup.accelerator, signals)
        later = plan.reference
        rows.append({"model": name, "divergence": reference.divergence(start, store.read_tokens(keys))})
    found = reference.figures(stored, settings.margin, later)
    suspicious = np.flatnonzero(stored.likely_mislabelled(settings.margin))
    worst = suspicious[np.argsort(stored.per_token[suspicious])][:MOST_LISTED]
    found["suspicious"] = [texts(pair) | {"difference": float(stored.per_token[pair])} for pair in worst.tolist()]
    return found | ({"later": rows} if rows else {})


def _stored_pairs(setup: RunSetup) -> tuple[StoredPairs, Any]:
    """Return the pairs of the plan, and a function from the number of one to its texts."""
    chunks, asked = setup.plan.chunks, reply_keys(setup.plan)
    places = [(index, *pair) for index in range(len(chunks)) for pair in chunks.tree(index).pairs.tolist()]

    def texts(pair: int) -> dict[str, str]:
        index, chosen, rejected = places[pair]
        tree, tokenizer = chunks.tree(index), setup.loaded.tokenizer
        nodes = {"prompt": int(tree.parents[chosen]), "chosen": chosen, "rejected": rejected}
        ids = {name: tree.tokens[tree.starts[node] + 1 :][: tree.lengths[node] - 1] for name, node in nodes.items()}
        return {name: tokenizer.decode(part[part != tokenizer.end_id].tolist()) for name, part in ids.items()}

    return StoredPairs(asked.pairs, np.array(asked.tokens), setup.plan.reference.copy()), texts
