"""A training run: what SFT and DPO share, in the order in which things can go wrong."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2ft import checkpoint
from gpt2ft.checkpoint import TrainState
from gpt2ft.data.augmentation import Augmentation
from gpt2ft.data.corpus import Corpus, load_corpora
from gpt2ft.data.plan import ChunkingRule, Plan, chunk
from gpt2ft.distributed import launch_checks, watchdog
from gpt2ft.distributed.accelerator import check_agreement, precision_of, raise_together, start_accelerator
from gpt2ft.distributed.shared_folder import check_shared
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.errors import SettingsError
from gpt2ft.model.attention import Backend, default_backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import load_trainable_parameters, trainable_parameters
from gpt2ft.objectives.objective import Objective
from gpt2ft.runs.describe import Hardware, describe, dropped, shares
from gpt2ft.runs.export import write_adapter_folder, write_folder
from gpt2ft.runs.inspection import show, statistics, terminal_width
from gpt2ft.runs.loaded_model import LoadedModel, adapt, is_adapter, load_model, plain_model
from gpt2ft.runs.manifest import command, versions
from gpt2ft.runs.output import Output
from gpt2ft.runs.progress import Evaluation, Evaluator
from gpt2ft.runs.samples import Sample, Turns, held_out_prompts
from gpt2ft.settings.scripts import DPOSettings, RunSettings
from gpt2ft.training import preflight
from gpt2ft.training.fit import LoopInputs, fit
from gpt2ft.training.memory_probe import advice, fits, probe_memory
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.strategy import Strategy, cast_frozen, prepare
from gpt2ft.training.tracking import Tracker


class Task(Protocol):
    """What SFT and DPO do not share."""

    objective: Objective
    preferences: bool  # whether the data are to be read as replies to compare

    def cutting(self, for_training: bool) -> ChunkingRule:
        """How trees become pieces."""

    def ready(self, stage: "RunSetup", model: TargetLogProbs, signals: SignalHandler) -> dict[str, Any]:
        """Makes what must be there before training, by the model as it is at step 0; what the manifest says of it."""

    def check_start(self, stage: "RunSetup", model: TargetLogProbs, step: int) -> None:
        """Raises an error unless the model, still as at step 0, starts from where it should."""

    def score(self, stage: "RunSetup") -> Evaluator:
        """What held-out data are scored by."""

    def before(self, stage: "RunSetup", prompts: list[Turns]) -> list[Sample]:
        """Replies of the model at step 0, to be shown beside later ones."""


@dataclass(frozen=True)
class RunSetup:
    """What a run trains, on what, and where."""

    settings: RunSettings
    accelerator: Any
    policy: LoadedModel
    corpus: Corpus
    held_out: Corpus | None
    plan: Plan
    eval_plan: Plan | None
    steps: int


def set_up(settings: RunSettings, task: Task, accelerator: Any) -> RunSetup:
    """Loads model and data, and says what is to be done."""
    training = settings.training
    policy = load_model(settings.model, training.seed)
    check_length(settings, policy)
    if settings.lora.rank:
        adapt(policy, settings.lora, training.seed)
    corpus, held_out = load_corpora(settings.data, policy.tokenizer, training.seed, task.preferences)
    plan = plan_for(corpus, settings, task.cutting(for_training=True), for_training=True)
    eval_plan = plan_for(held_out, settings, task.cutting(for_training=False), for_training=False) if held_out else None
    steps = training.steps or training.epochs * plan.steps_per_epoch
    stage = RunSetup(settings, accelerator, policy, corpus, held_out, plan, eval_plan, steps)
    if accelerator.is_main_process:
        bf16 = precision_of(accelerator) == "bf16"
        activation_checkpointing = training.activation_checkpointing
        processes, device = accelerator.num_processes, accelerator.device.type
        hardware = Hardware(processes, device, launch_checks.strategy(), bf16, activation_checkpointing)
        print(describe(policy, corpus, held_out, plan, eval_plan, steps, hardware), flush=True)
        if settings.show:
            print(show(plan, policy.tokenizer, settings.show, width=terminal_width()))
        if settings.dry_run:
            print(statistics(corpus, held_out, plan, policy.tokenizer))
    return stage


def model_of(stage: RunSetup) -> TargetLogProbs:
    """The policy as the loop asks it, on the device."""
    policy, settings = stage.policy, stage.settings
    policy.gpt2.activation_checkpointing = settings.training.activation_checkpointing
    model = TargetLogProbs(policy.gpt2, len(policy.tokenizer), backend_for(settings, stage.accelerator.device))
    return model.to(stage.accelerator.device)


def train(settings: RunSettings, task: Task) -> None:
    """Trains from the start or from the newest checkpoint, or only shows the plan and the data."""
    training = settings.training
    accelerator = start_accelerator(training.precision, training.micro_batches_per_step, training.deterministic)
    main, precision = accelerator.is_main_process, precision_of(accelerator)
    output = Output(settings.output)
    if main and not settings.looks_only:
        output.claim(settings)
    accelerator.wait_for_everyone()
    if not settings.looks_only:
        check_shared(accelerator, output.folder)

    stage = set_up(settings, task, accelerator)
    if settings.looks_only:
        return
    policy, corpus, held_out, plan = stage.policy, stage.corpus, stage.held_out, stage.plan
    model = model_of(stage)
    check(model, plan, policy, settings, verbose=main)
    identity = what_must_not_change(stage)
    state, found = (TrainState(), None) if settings.resume == "never" else resume(output, identity, verbose=main)
    contents = [part.content() for part in (corpus, held_out) if part]
    check_agreement(accelerator, state.step, *contents)
    signals = SignalHandler()
    with signals.listening():
        made_ready = task.ready(stage, model, signals)
    if settings.lora.rank:
        cast_frozen(accelerator, policy.gpt2)
    task.check_start(stage, model, state.step)
    longest = training.sample_tokens
    prompts = (
        held_out_prompts(held_out, policy, training.sample_prompts, longest, task.preferences)
        if held_out and main
        else []
    )
    before = task.before(stage, prompts)
    if found:
        try:
            load_trainable_parameters(policy.gpt2, checkpoint.read_weights(found))
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{found} does not hold the weights of this run: {error}") from error
    optimizer = adamw(policy.gpt2, settings.optimizer, fused=accelerator.device.type == "cuda")
    shards = launch_checks.strategy() != "ddp"
    with fits(advice(training, settings.data.max_length, bool(settings.lora.rank), shards)):
        strategy = prepare(accelerator, model, optimizer, training.max_grad_norm)
        probed(stage, strategy)
    moments = checkpoint.read_moments(found) if found and state.updates else None
    strategy.load_moments(moments, state.updates)

    manifest = {
        "command": command(),
        "versions": versions(),
        "processes": accelerator.num_processes,
        "strategy": launch_checks.strategy(),
        "precision": precision,
        "attention": model.backend,
        "identity": identity,
        "sources": [asdict(share) for share in shares(corpus, plan)],
        "dropped": dropped(corpus, plan),
        "dropped_held_out": dropped(held_out, stage.eval_plan) if held_out and stage.eval_plan else {},
        "plan": {
            "streams": len(plan.streams),
            "steps": stage.steps,
            "tokens": plan.tokens,
            "supervised": plan.supervised,
        },
    } | made_ready
    if main:
        output.begin(settings, manifest)
    accelerator.wait_for_everyone()
    tracker = Tracker(output.folder, state.step, stage.steps, settings.model_dump(mode="json"), active=main)
    evaluation = Evaluation(
        accelerator=accelerator,
        strategy=strategy,
        policy=policy,
        held_out=held_out,
        plan=stage.eval_plan,
        score=task.score(stage),
        tracker=tracker,
        training=training,
        signals=signals,
        prompts=prompts,
        before=before,
    )

    def save(state: TrainState) -> None:
        watchdog.at("saving", is_long=True)
        whole, moments, problem = strategy.whole(), strategy.moments(), None
        if whole is not None:
            try:
                checkpoint.save(output.checkpoints, trainable_parameters(whole), moments, state, identity)
                checkpoint.prune(output.checkpoints, training.keep_checkpoints, state.best_step)
            except OSError as error:
                problem = error
        watchdog.at("waiting until it is saved")
        raise_together(accelerator, problem)

    job = LoopInputs(
        accelerator=accelerator,
        strategy=strategy,
        objective=task.objective,
        plan=plan,
        steps=stage.steps,
        training=training,
        optimization=settings.optimizer,
        tracker=tracker,
        evaluate=evaluation,
        save=save,
        signals=signals,
    )
    try:
        with signals.listening():
            if not found:
                evaluation.of_the_start()
            state = fit(job, state)
    finally:
        tracker.close()
    transcript = evaluation.transcript()
    whole = strategy.whole()
    watchdog.at("exporting", is_long=True)
    if whole is not None:
        output.write_manifest(manifest | {"finished": asdict(state)})
        export(output, settings, replace(policy, gpt2=whole), state)
        print(transcript)
        print(f"finished: {output.model}")
        for following in next_commands(settings, policy, output):
            print(f"next: {following}")
    accelerator.end_training()


def probed(stage: RunSetup, strategy: Strategy) -> None:
    """The largest stream once through model and optimizer; says what memory that has taken."""
    accelerator, plan = stage.accelerator, stage.plan
    peak = probe_memory(strategy, accelerator, plan.stream(plan.streams[0]))
    if accelerator.is_main_process:
        each = " on each process" if accelerator.num_processes > 1 else ""
        print(f"probed the largest stream, peak memory {peak / 2**30:.2f} GiB{each}", flush=True)


def check_length(settings: RunSettings, policy: LoadedModel) -> None:
    context = policy.gpt2.config.n_positions
    if settings.training.sample_tokens >= context - 2:
        raise SettingsError(
            f"`training.sample_tokens` must leave room for a prompt in the model's context of {context}, "
            f"but is {settings.training.sample_tokens}"
        )
    if settings.data.max_length > context:
        raise SettingsError(
            f"`data.max_length` must be at most the model's context of {context}, but is {settings.data.max_length}"
        )


def backend_for(settings: RunSettings, device: torch.device) -> Backend:
    chosen = settings.model.attention
    backend = default_backend(device, settings.model.attention_dropout) if chosen == "auto" else chosen
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if backend == "flex" and device.type == "cuda" and not any(name and shutil.which(name) for name in compilers):
        raise SettingsError(
            "FlexAttention needs a C compiler on CUDA, but there is none: install gcc or pass `--model.attention dense`"
        )
    return backend


def plan_for(corpus: Corpus, settings: RunSettings, cutting: ChunkingRule, for_training: bool) -> Plan:
    data, training = settings.data, settings.training
    pieces = chunk(corpus.stores, corpus.rows, cutting)
    augmentation = Augmentation(data.position_jitter, data.prompt_noise, data.max_length) if for_training else None
    micro_batches = training.micro_batches_per_step
    return Plan(pieces, training.tokens_per_micro_batch, micro_batches, training.seed, for_training, augmentation)


def check(model: TargetLogProbs, plan: Plan, policy: LoadedModel, settings: RunSettings, verbose: bool) -> None:
    """Everything that can be known to be wrong before step 1.

    Raises:
        PreflightError: and nothing is trained.
    """
    turns = 0
    cut_at = settings.data.max_length if plan.pair_capacity else None
    for number, pieces in enumerate(plan.micro_batches(0)):
        found = preflight.check_supervision(plan.training_stream(0, number), policy.tokenizer, cut_at)
        expected = sum(int((plan.chunks.tree(piece).weights > 0).sum()) for piece in pieces)
        if found != expected or (pieces and not found):
            raise preflight.PreflightError(f"{expected} turns of a stream should be supervised, but {found} are")
        turns += found
    preflight.check_tied(model)
    worst = preflight.check_isolation(model, plan.stream(plan.micro_batches(0)[0]))
    if verbose:
        isolation = f"packed = alone within {worst:.1g} ({model.backend} attention)"
        print(f"checked   {turns} supervised turns all stop; {isolation}", flush=True)


def what_must_not_change(stage: RunSetup) -> dict[str, Any]:
    """What a run must share with its checkpoint to continue from it."""
    settings, held_out = stage.settings, stage.held_out
    training = {"tokens_per_micro_batch", "micro_batches_per_step", "seed", "max_grad_norm", "deterministic"}
    sections = settings.model_dump(mode="json", exclude={"training", "output", "resume", "dry_run", "show"})
    del sections["data"]["cache"]
    return sections | {
        "training": settings.training.model_dump(mode="json", include=training),
        "steps": stage.steps,
        "precision": precision_of(stage.accelerator),
        "tokenised_data": stage.corpus.identity(),
        "held_out_data": held_out.identity() if held_out else {},
        "initial_weights": stage.policy.digest,
    }


def resume(output: Output, identity: dict, verbose: bool) -> tuple[TrainState, Path | None]:
    """Where to go on from: the newest whole checkpoint and its folder, or the start and None.

    Raises:
        SettingsError: if the checkpoint belongs to a run that trains on other things or in another way.
        CheckpointError: if there are checkpoints, but all are damaged.
    """
    found = checkpoint.find_newest(output.checkpoints, verbose)
    if found is None:
        return TrainState(), None
    state, saved = checkpoint.read_state(found)
    changed = checkpoint.difference(saved, identity)
    if changed:
        raise SettingsError(
            f"the run in {output.folder} cannot be continued: {changed}; "
            "restore it, or pass `--resume never` to train anew"
        )
    if verbose:
        print(f"resuming  {found}", flush=True)
    return state, found


def export(output: Output, settings: RunSettings, policy: LoadedModel, state: TrainState) -> None:
    """Writes `best/` where evaluation ran, `adapter/` for LoRA, and `model/` last: it makes the run finished.

    An adapter needs a whole model to stand on: where the run started from another adapter, that is `start/`.
    """
    config, tokenizer = policy.gpt2.config, policy.tokenizer

    def plain(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return plain_model(settings, trained, policy.digest).weights() if settings.lora.rank else dict(trained)

    if state.best_step is not None:
        folder = checkpoint.step_folder(output.checkpoints, state.best_step)
        try:
            checkpoint.verify(folder)
            write_folder(output.best, plain(checkpoint.read_weights(folder)), config, tokenizer)
        except checkpoint.CheckpointError as error:
            print(f"warning: best/ is not written: {error}", file=sys.stderr)
    merged = plain(trainable_parameters(policy.gpt2))
    if settings.lora.rank:
        base = settings.model.path
        if is_adapter(base):
            start = load_model(settings.model, settings.training.seed)
            write_folder(output.start, start.weights(), config, tokenizer)
            base = str(output.start)
        write_adapter_folder(output.adapter, policy, settings, merged, base)
    write_folder(output.model, merged, config, tokenizer)


def next_commands(settings: RunSettings, policy: LoadedModel, output: Output) -> Iterator[str]:
    """A talk with the model, and the same evaluation as during training where there was one."""
    yield shlex.join(["python", "launch/chat.py", str(output.folder)])
    data = settings.data
    if not data.eval:
        return
    words = ["python", "launch/evaluate.py", str(output.folder), "--data", *data.eval]
    if data.max_rank is not None:
        words += ["--max_rank", str(data.max_rank)]
    if data.languages:
        words += ["--languages", *data.languages]
    if data.max_length < policy.gpt2.config.n_positions:
        words += ["--max_length", str(data.max_length)]
    if data.on_error == "skip":
        words += ["--on_error", "skip"]
    if not data.reviewed_only:
        words += ["--reviewed_only", "false"]
    if data.topic_replies:
        words += ["--topic_replies", data.topic_replies]
    if isinstance(settings, DPOSettings):
        words += ["--pairs", settings.dpo.pairs]
    yield shlex.join(words)
