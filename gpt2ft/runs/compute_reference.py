"""Reference pass of DPO on its own: log-probs of every reply of a recipe under its model at step 0, before training."""

from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import start_accelerator
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.errors import SettingsError
from gpt2ft.runs.identity import check_settings, facts_of
from gpt2ft.runs.run_setup import cast_to_precision, run_preflight_checks, set_up, target_log_probs
from gpt2ft.runs.train_dpo import PreferenceTuning
from gpt2ft.settings.scripts import DPOSettings


@watchdog.announce_end()
def run(settings: DPOSettings) -> None:
    if not settings.dpo.needs_reference:
        raise SettingsError(f"`dpo.loss` = {settings.dpo.loss} needs no reference: there is nothing to compute")
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
    accelerator.end_training()
