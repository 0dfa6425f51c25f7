"""Set-up of a run: model and data loaded, laid out in a plan, and checked before anything is trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2ft.data.chunks import chunk
from gpt2ft.data.corpus import Corpus, load_corpora
from gpt2ft.data.plan import Plan
from gpt2ft.data.prefixes import share_prefixes
from gpt2ft.data.sources import Origin
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.accelerator import autocast, once_a_machine, precision_name
from gpt2ft.errors import SettingsError
from gpt2ft.model.attention import Backend, choose_backend
from gpt2ft.model.compiled import choose_compiling
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.data_statistics import FIGURES_FROM, data_statistics
from gpt2ft.runs.describe import Hardware, describe
from gpt2ft.runs.loaded_model import LoadedModel, adapt, load_model
from gpt2ft.runs.micro_batch import find_size
from gpt2ft.runs.show_examples import show_examples, terminal_width
from gpt2ft.settings.scripts import RunSettings
from gpt2ft.text.display import fit, print_row
from gpt2ft.training import preflight
from gpt2ft.training.strategy import cast_frozen

if TYPE_CHECKING:
    from gpt2ft.runs.train import Task


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run loads and plans before its first forward pass."""

    settings: RunSettings  # with what depends on model and plan
    accelerator: Any
    loaded: LoadedModel
    corpus: Corpus
    held_out: Corpus | None
    plan: Plan
    eval_plan: Plan | None
    steps: int
    backend: Backend
    compiles: bool

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def corpora(self) -> list[Corpus]:
        return [corpus for corpus in (self.corpus, self.held_out) if corpus is not None]

    def plans(self) -> list[Plan]:
        return [plan for plan in (self.plan, self.eval_plan) if plan is not None]


def set_up(settings: RunSettings, task: "Task", accelerator: Any) -> RunSetup:
    """Load model and data, lay out the steps, and print what is to be done.

    Raises:
        SettingsError, ModelError, DataError: if the settings do not fit the model, or either cannot be had.
    """
    training = settings.training
    backend = choose_backend(settings.model.attention, accelerator.device, "model.attention")
    strategy = launch_checks.strategy()
    compiles = choose_compiling(training.compile, accelerator.device, backend, strategy, "training.compile")
    loaded = load_start(settings)
    settings = for_model(settings, loaded.gpt2.config.n_embd)
    kind = task.chunking(training.auto_from, for_training=True).kind
    digest = digest_of_sources(accelerator)
    corpus, held_out = load_corpora(settings.data, loaded.tokenizer, training.seed, kind, digest)
    if training.patience and held_out is None:
        raise SettingsError(
            "`training.patience` needs held-out data, but there are too few conversations to spare one: set `data.eval`"
        )
    if training.tokens_per_micro_batch == "auto":
        model = _on_device(loaded, settings, backend, compiles, accelerator)
        hardware = _hardware(settings, accelerator)
        settings = find_size(settings, model, accelerator, hardware, lambda sized: plan_for(corpus, sized, task, True))
    plan = plan_for(corpus, settings, task, for_training=True)
    eval_plan = plan_for(held_out, settings, task, for_training=False) if held_out else None
    steps = training.steps or plan.steps
    settings = for_plan(settings, plan, has_held_out=held_out is not None)
    setup = RunSetup(settings, accelerator, loaded, corpus, held_out, plan, eval_plan, steps, backend, compiles)
    if setup.is_main:
        _print_plan(setup)
    return setup


def load_start(settings: RunSettings) -> LoadedModel:
    """Return the model that a run starts from, with fresh adapters where it trains some.

    Raises:
        SettingsError, ModelError: if the settings do not fit it, or it cannot be had.
    """
    loaded = load_model(settings.model, settings.training.seed)
    check_lengths(settings, loaded)
    return adapt(loaded, settings.lora, settings.training.seed) if settings.lora.rank else loaded


def digest_of_sources(accelerator: Any) -> Callable[[Origin], str]:
    """Return the function that digests where a source comes from, once a machine."""
    return lambda origin: once_a_machine(accelerator, origin.digest)


def _hardware(settings: RunSettings, accelerator: Any) -> Hardware:
    return Hardware(
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        strategy=launch_checks.strategy(),
        precision=precision_name(accelerator),
        activation_checkpointing=settings.training.activation_checkpointing,
    )


def _print_plan(setup: RunSetup) -> None:
    settings, tokenizer = setup.settings, setup.loaded.tokenizer
    for label, text in describe(setup, _hardware(settings, setup.accelerator)):
        print_row(label, text)
    if settings.show:
        print(show_examples(setup.plan, tokenizer, settings.show, width=terminal_width()))
    if settings.dry_run:
        statistics = data_statistics(setup.corpus, setup.held_out, setup.plan, tokenizer)
        print(*(fit(line, FIGURES_FROM) for line in statistics.splitlines()), sep="\n")


def check_lengths(settings: RunSettings, loaded: LoadedModel) -> None:
    """Raise SettingsError unless samples and conversations fit the model's context."""
    context = loaded.gpt2.config.n_positions
    if settings.training.sample_tokens >= context - 2:
        raise SettingsError(
            f"`training.sample_tokens` must leave room for a prompt in the model's context of {context}, "
            f"but is {settings.training.sample_tokens}"
        )
    if settings.data.max_length > context:
        raise SettingsError(
            f"`data.max_length` must be at most the model's context of {context}, but is {settings.data.max_length}"
        )


def plan_for(corpus: Corpus, settings: RunSettings, task: "Task", for_training: bool) -> Plan:
    """Lay a corpus out in streams, unchanged where it is held out."""
    training = settings.training
    tokens, micro_batches = training.tokens_per_micro_batch, training.micro_batches_per_step
    chunks = chunk(corpus.stores, corpus.rows, task.chunking(tokens, for_training))
    chunks = share_prefixes(chunks) if settings.data.share_prefixes else chunks
    epochs = None if training.steps else training.epochs
    return Plan(chunks, tokens, micro_batches, training.seed, epochs, training.min_steps)


def for_model(settings: RunSettings, width: int) -> RunSettings:
    """Return the settings with the learning rate and the least number of steps that suit a model of this width."""
    training, optimizer = settings.training.for_width(width), settings.optimizer.for_width(width)
    return settings.model_copy(update={"training": training, "optimizer": optimizer})


def for_plan(settings: RunSettings, plan: Plan, has_held_out: bool) -> RunSettings:
    """Return the settings with times to evaluate and save where epochs are too short for it.

    Small data that are passed over until there are enough steps would be evaluated every few steps: it is done twice
    in the run instead, or ten times where the run may end early.
    """
    training = settings.training
    if plan.epochs is None or plan.epochs == training.epochs:
        return settings
    name = "eval_every" if has_held_out else "save_every"
    every = getattr(training, name) or math.ceil(plan.steps / (10 if training.patience else 2))
    return settings.model_copy(update={"training": training.model_copy(update={name: every})})


def target_log_probs(setup: RunSetup) -> TargetLogProbs:
    """Return the model as training calls it, in float32 and on the device."""
    return _on_device(setup.loaded, setup.settings, setup.backend, setup.compiles, setup.accelerator)


def _on_device(
    loaded: LoadedModel, settings: RunSettings, backend: Backend, compiles: bool, accelerator: Any
) -> TargetLogProbs:
    loaded.gpt2.activation_checkpointing = settings.training.activation_checkpointing
    model = TargetLogProbs(loaded.gpt2, len(loaded.tokenizer), backend, settings.model.neftune_alpha, compiles)
    return model.to(accelerator.device)


def run_preflight_checks(setup: RunSetup, model: TargetLogProbs) -> None:
    """Check supervision, the tied head and the isolation of packed conversations, on the run's own first step.

    Args:
        model: in float32, where packed conversations and single ones differ by rounding alone.

    Raises:
        PreflightError: and nothing is trained.
    """
    plan, tokenizer, data = setup.plan, setup.loaded.tokenizer, setup.settings.data
    last_only = data.train_on == "last" and not data.share_prefixes  # where what is last in one row goes on in another
    turns = 0
    for number, chunks in enumerate(plan.micro_batches(0)):
        found = preflight.check_supervision(
            plan.training_stream(0, number), tokenizer, plan.chunks.chunking.replies_cut_at, last_only
        )
        expected = sum(int((plan.chunks.tree(chunk).weights > 0).sum()) for chunk in chunks)
        if found != expected or (chunks and not found):
            raise preflight.PreflightError(f"{expected} turns of a stream should be supervised, but {found} are")
        turns += found
    preflight.check_tied(model)
    stream = plan.stream(plan.micro_batches(0)[0])
    compiled = preflight.check_compiled(model, stream, autocast(setup.accelerator)) if model.compiled else None
    worst = preflight.check_isolation(model, stream)
    if setup.is_main:
        isolation = f"packed = alone within {worst:.1g} ({model.backend} attention)"
        stops = "1 supervised turn stops" if turns == 1 else f"{turns:,} supervised turns all stop"
        print_row("checked", f"{stops}; {isolation}")
        if compiled:
            print_row("compiled", "blocks = plain within {:.1g}, gradients within {:.1g}".format(*compiled))


def cast_to_precision(setup: RunSetup, in_float32: TargetLogProbs) -> TargetLogProbs:
    """Return the finished model: frozen matrices are cast, in place, to the precision they are multiplied in.

    Nothing changes the model from here on before it is wrapped, so the reference and the checks measure what training
    starts from.
    """
    if setup.settings.lora.rank:
        cast_frozen(setup.accelerator, in_float32.gpt2)
    return in_float32
