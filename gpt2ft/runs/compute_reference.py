"""The offline pass of DPO: what the reference says to every reply of a recipe, computed before any training."""

from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import check_agreement, start_accelerator
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.errors import SettingsError
from gpt2ft.runs.train import check, model_of, set_up
from gpt2ft.runs.train_dpo import PreferenceTuning
from gpt2ft.settings.scripts import DPOSettings


@watchdog.until_the_end()
def run(settings: DPOSettings) -> None:
    if not settings.dpo.needs_reference:
        raise SettingsError(f"`dpo.loss` = {settings.dpo.loss} needs no reference: there is nothing to compute")
    accelerator = start_accelerator(settings.training.precision, deterministic=settings.training.deterministic)
    task = PreferenceTuning(settings)
    stage = set_up(settings, task, accelerator)
    if settings.looks_only:
        return
    contents = [part.content() for part in (stage.corpus, stage.held_out) if part]
    check_agreement(accelerator, 0, *contents)
    model = model_of(stage)
    check(model, stage.plan, stage.policy, settings, verbose=accelerator.is_main_process)
    signals = SignalHandler()
    with signals.listening():
        task.ready(stage, model, signals)
    accelerator.end_training()
