"""End of a run: exported models, sample replies, and the commands to go on with."""

import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2ft import checkpoint
from gpt2ft.checkpoint import TrainState
from gpt2ft.command_line import words_to_start
from gpt2ft.model.lora import trainable_parameters
from gpt2ft.runs.export import write_adapter_folder, write_folder
from gpt2ft.runs.loaded_model import LoadedModel, is_adapter, load_model, plain_model, with_trained_weights
from gpt2ft.runs.model_card import Card, evaluations
from gpt2ft.runs.output import Output
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.settings.sections import CorpusSettings
from gpt2ft.text.display import fit
from gpt2ft.training.strategy import Strategy
from gpt2ft.training.tracking import line_digests
from gpt2ft.wording import counted


def finish(
    setup: RunSetup, output: Output, strategy: Strategy, manifest: dict[str, Any], state: TrainState, transcript: str
) -> None:
    """Export the trained model and print its sample replies; all processes call it together."""
    model = strategy.full_model()
    if model is None:
        return
    manifest = manifest | {"finished": asdict(state), "metrics": line_digests(output.metrics)}
    output.write_manifest(manifest)
    export(output, setup.settings, replace(setup.loaded, gpt2=model), state, manifest)
    print(transcript)
    if comparison := compared_with_start(output.metrics):
        print(fit(comparison, 4))
    if state.step < setup.steps:
        print(fit(early_end(state, setup.steps, output.best), 4))
    print(f"finished: {output.model}")
    for command in next_commands(setup.settings, setup.loaded, output):
        print(f"next: {command}")


def compared_with_start(metrics: Path) -> str | None:
    """Return a line on the first and the last evaluation of a run, None where it has not two.

    Args:
        metrics: metrics.jsonl, which a run keeps when it is resumed.
    """
    found = list(evaluations(metrics).values())
    if len(found) < 2:
        return None
    start, end = ({name: math.nan if value is None else value for name, value in found[i].items()} for i in (0, -1))
    steps = f"from step {start['step']} to step {end['step']}"
    line = f"{steps}: held-out loss {start['eval/loss']:.4f} -> {end['eval/loss']:.4f}"
    if "eval/stopped" in start and "eval/stopped" in end:
        line += f", sample replies that end by themselves {start['eval/stopped']:.0%} -> {end['eval/stopped']:.0%}"
    return line


def early_end(state: TrainState, steps: int, best: Path) -> str:
    """Return a line that says why a run has ended before its last step, and where its best model is."""
    evaluations = counted(state.evaluations_since_best, "evaluation")
    where = "none was finite" if state.best_step is None else f"the best, of step {state.best_step}, is in {best}"
    return f"ended early, after step {state.step} of {steps}: {evaluations} without a better held-out loss; {where}"


def export(
    output: Output, settings: RunSettings, loaded: LoadedModel, state: TrainState, manifest: Mapping[str, Any]
) -> None:
    """Write `best/` where evaluation ran, `adapter/` for LoRA, and `model/` last: it makes the run finished.

    An adapter is loaded onto a plain model: where the run started from another adapter, that is `start/`.
    """
    config, tokenizer = loaded.gpt2.config, loaded.tokenizer
    card = Card(manifest, output.metrics, replace(config, vocab_size=len(tokenizer)), state.step)

    def in_float32(trained: Mapping[str, Tensor]) -> LoadedModel:
        return with_trained_weights(settings, trained, loaded.digest)

    if state.best_step is not None:
        folder = checkpoint.step_folder(output.checkpoints, state.best_step)
        try:
            checkpoint.verify(folder)
            best = checkpoint.read_weights(folder)
            best = plain_model(in_float32(best)).weights() if settings.lora.rank else best
            write_folder(output.best, best, config, tokenizer, card=replace(card, step=state.best_step).text("hf"))
        except checkpoint.CheckpointError as error:
            print(f"warning: best/ is not written: {error}", file=sys.stderr)
    merged = trainable_parameters(loaded.gpt2)
    if settings.lora.rank:
        adapted = in_float32(merged)
        merged = plain_model(adapted).weights()
        base = settings.model.path
        if is_adapter(base):
            start = load_model(settings.model, settings.training.seed)
            write_folder(output.start, start.weights(), config, tokenizer)
            base = str(output.start)
        write_adapter_folder(
            output.adapter, replace(loaded, gpt2=adapted.gpt2), settings, merged, base, card.text("adapter")
        )
    write_folder(output.model, merged, config, tokenizer, card=card.text("hf"))


def next_commands(settings: RunSettings, loaded: LoadedModel, output: Output) -> Iterator[str]:
    """Yield the command that chats with the model, and the one that compares it with its start on the held-out data."""
    yield shlex.join([*words_to_start("chat"), str(output.folder)])
    data = settings.data
    if not data.eval or (isinstance(settings, DPOSettings) and settings.dpo.loss == "kto"):
        return  # labelled replies are neither conversations nor pairs
    start = [] if settings.model.random_init else [settings.model.path]
    words = [*words_to_start("evaluate"), *start, str(output.folder), "--data", *data.eval]
    for name, field in CorpusSettings.model_fields.items():
        value = getattr(data, name)
        if value != field.default:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    if data.max_length < loaded.gpt2.config.n_positions:
        words += ["--max_length", str(data.max_length)]
    if isinstance(settings, DPOSettings):
        words += ["--pairs", settings.dpo.pairs]
    yield shlex.join([*words, "--output", str(output.folder / "report")])
