"""A training run: what SFT and DPO share, in the order in which things can go wrong."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2ft.data.augmentation import Augmentation
from gpt2ft.data.plan import Plan, cut_to_fit
from gpt2ft.model.attention import Backend, default_backend
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import hold_frozen_matrices_in, load_trained_weights, trained_weights
from gpt2ft.objectives.objective import Objective
from gpt2ft.runs.assemble import (
    Corpus,
    Policy,
    adapt,
    command,
    is_adapter,
    load_corpora,
    load_policy,
    lora_config,
    plain_policy,
    versions,
)
from gpt2ft.runs.describe import describe, dropped, shares
from gpt2ft.runs.export import check_adapter, write_adapter_folder, write_folder
from gpt2ft.runs.inspection import show, statistics, terminal_width
from gpt2ft.runs.output import Output
from gpt2ft.runs.samples import Sample, answer, held_out_prompts
from gpt2ft.settings import SettingsError, SFTSettings, TrainingSettings
from gpt2ft.training import checkpoint, distributed, preflight
from gpt2ft.training.checkpoint import TrainState
from gpt2ft.training.evaluate import EvaluationCut, evaluate, total
from gpt2ft.training.fit import Job, fit
from gpt2ft.training.interruption import Interruption
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.tracking import Tracker


def train(settings: SFTSettings, objective: Objective) -> None:
    """Trains from the start or from the newest checkpoint, or only shows the plan and the data."""
    training = settings.training
    accelerator = distributed.start(training.precision, training.micro_batches_per_step, training.deterministic)
    main, precision = accelerator.is_main_process, accelerator.mixed_precision
    output = Output(settings.output)
    if main and not settings.looks_only:
        output.claim(settings)
    accelerator.wait_for_everyone()

    policy = load_policy(settings.model, training.seed)
    check_length(settings, policy)
    if settings.lora.rank:
        if is_adapter(settings.model.path):
            raise SettingsError("`model.path` must be a whole model where `lora.rank` is set: take the merged one")
        adapt(policy, settings.lora, training.seed)
    corpus, held_out = load_corpora(settings.data, policy.tokenizer, training.seed)
    plan = plan_for(corpus, settings, shuffle=True)
    eval_plan = plan_for(held_out, settings, shuffle=False) if held_out else None
    steps = training.steps or training.epochs * plan.steps_per_epoch
    if main:
        devices = f"{accelerator.num_processes} x {accelerator.device.type}"
        bf16 = precision == "bf16"
        recomputes = training.activation_checkpointing
        print(describe(policy, corpus, held_out, plan, eval_plan, steps, devices, bf16, recomputes), flush=True)
        if settings.show:
            print(show(plan, policy.tokenizer, settings.show, width=terminal_width()))
        if settings.dry_run:
            print(statistics(corpus, held_out, plan, policy.tokenizer))
    if settings.looks_only:
        return

    policy.gpt2.recomputes = training.activation_checkpointing
    model = TargetLogProbs(policy.gpt2, len(policy.tokenizer), backend_for(settings, accelerator.device))
    model.to(accelerator.device)
    check(model, plan, policy, verbose=main)
    identity = what_must_not_change(settings, policy, corpus, held_out, steps, precision)
    state, found = (TrainState(), None) if settings.resume == "never" else resume(output, identity, verbose=main)
    contents = [part.content() for part in (corpus, held_out) if part]
    distributed.check_agreement(accelerator, state.step, *contents)
    if found:
        load_trained_weights(policy.gpt2, checkpoint.read_weights(found))
    if settings.lora.rank and precision == "bf16":
        hold_frozen_matrices_in(policy.gpt2, torch.bfloat16)
    optimizer = adamw(policy.gpt2, settings.optimizer, fused=accelerator.device.type == "cuda")
    prepared, optimizer = accelerator.prepare(model, optimizer)
    preflight.check_same_parameters(model, prepared)
    if found:
        checkpoint.load_moments(found, policy.gpt2, optimizer, state.updates)

    manifest = {
        "command": command(),
        "versions": versions(),
        "processes": accelerator.num_processes,
        "precision": precision,
        "attention": model.backend,
        "identity": identity,
        "sources": [asdict(share) for share in shares(corpus, plan)],
        "dropped": dropped(corpus, plan),
        "dropped_held_out": dropped(held_out, eval_plan) if held_out and eval_plan else {},
        "plan": {"streams": len(plan.streams), "steps": steps, "tokens": plan.tokens, "supervised": plan.supervised},
    }
    if main:
        output.begin(settings, manifest)
    accelerator.wait_for_everyone()
    tracker = Tracker(output.folder, state.step, steps, settings.model_dump(mode="json"), active=main)
    interruption = Interruption()
    evaluation = Evaluation(accelerator, prepared, policy, held_out, eval_plan, tracker, training, interruption)

    def save(state: TrainState) -> None:
        if main:
            checkpoint.save(output.checkpoints, policy.gpt2, optimizer, state, identity)
            checkpoint.prune(output.checkpoints, training.keep_checkpoints, state.best_step)
        accelerator.wait_for_everyone()

    job = Job(
        accelerator=accelerator,
        model=prepared,
        optimizer=optimizer,
        objective=objective,
        plan=plan,
        steps=steps,
        training=training,
        optimization=settings.optimizer,
        tracker=tracker,
        evaluate=evaluation,
        save=save,
        interruption=interruption,
    )
    try:
        with interruption.listening():
            if not found:
                evaluation.of_the_start()
            state = fit(job, state)
    finally:
        tracker.close()
    if main:
        output.write_manifest(manifest | {"finished": asdict(state)})
        export(output, settings, policy, state)
        print(evaluation.transcript())
        print(f"finished: {output.model}")
        for following in next_commands(settings, policy, output):
            print(f"next: {following}")
    accelerator.end_training()


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss and sample replies at a step. All processes call it together."""

    accelerator: Any
    model: nn.Module  # prepared
    policy: Policy
    held_out: Corpus | None
    plan: Plan | None
    tracker: Tracker
    training: TrainingSettings
    interruption: Interruption

    def of_the_start(self) -> None:
        """Of step 0. If it is cut short, the first step still follows and is saved."""
        with suppress(EvaluationCut):
            self(0)

    def __call__(self, step: int) -> float | None:
        """The held-out loss, logged and said; None without held-out data."""
        if self.held_out is None or self.plan is None:
            return None
        byte_lengths = self.policy.tokenizer.byte_lengths()
        told_to_stop = self.interruption.__bool__
        scores = evaluate(self.model, self.plan, byte_lengths, self.accelerator, told_to_stop)
        score = total(scores)
        metrics = {f"eval/{name}": value for name, value in score.figures().items()}
        if len(scores) > 1:
            scored = [pair for pair in zip(self.held_out.stores, scores, strict=True) if pair[1].tokens]
            for store, part in scored:
                metrics[f"eval/loss/{store.source}"] = part.nats_per_token
        self.tracker.log(step, metrics)
        self.tracker.say(
            f"step {step}: held-out loss {score.nats_per_token:.4f} nats/token, "
            f"perplexity {score.perplexity:,.2f}, {score.bits_per_byte:.4f} bits/byte"
        )
        for number, sample in enumerate(self.samples()):
            self.tracker.text(step, f"samples/{number}", str(sample))
        return score.nats_per_token

    def samples(self) -> list[Sample]:
        if self.held_out is None or not self.accelerator.is_main_process:
            return []
        longest = self.training.sample_tokens
        prompts = held_out_prompts(self.held_out, self.policy, self.training.sample_prompts, longest)
        with self.accelerator.autocast():
            return answer(self.policy, prompts, longest)

    def transcript(self) -> str:
        samples = self.samples()
        title = ["\nReplies to prompts it has never seen:"] if samples else []
        return "\n\n".join([*title, *map(str, samples), ""])


def check_length(settings: SFTSettings, policy: Policy) -> None:
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


def backend_for(settings: SFTSettings, device: torch.device) -> Backend:
    chosen = settings.model.attention
    backend = default_backend(device, settings.model.attention_dropout) if chosen == "auto" else chosen
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if backend == "flex" and device.type == "cuda" and not any(name and shutil.which(name) for name in compilers):
        raise SettingsError(
            "FlexAttention needs a C compiler on CUDA, but there is none: install gcc or pass `--model.attention dense`"
        )
    return backend


def plan_for(corpus: Corpus, settings: SFTSettings, shuffle: bool) -> Plan:
    data, training = settings.data, settings.training
    weight = data.message_weight if shuffle else "once"  # evaluation counts every message once
    pieces = cut_to_fit(corpus.stores, corpus.rows, weight, data.max_length, training.tokens_per_micro_batch)
    augmentation = Augmentation(data.position_jitter, data.prompt_noise, data.max_length) if shuffle else None
    micro_batches = training.micro_batches_per_step
    return Plan(pieces, training.tokens_per_micro_batch, micro_batches, training.seed, shuffle, augmentation)


def check(model: TargetLogProbs, plan: Plan, policy: Policy, verbose: bool) -> None:
    """Everything that can be known to be wrong before step 1.

    Raises:
        PreflightError: and nothing is trained.
    """
    turns = 0
    for number, pieces in enumerate(plan.micro_batches(0)):
        found = preflight.check_supervision(plan.training_stream(0, number), policy.tokenizer)
        expected = sum(int((plan.pieces.tree(piece).weights > 0).sum()) for piece in pieces)
        if found != expected or (pieces and not found):
            raise preflight.PreflightError(f"{expected} turns of a stream should be supervised, but {found} are")
        turns += found
    preflight.check_tied(model)
    worst = preflight.check_isolation(model, plan.stream(plan.micro_batches(0)[0]))
    if verbose:
        isolation = f"packed = alone within {worst:.1g} ({model.backend} attention)"
        print(f"checked   {turns} supervised turns all stop; {isolation}", flush=True)


def what_must_not_change(
    settings: SFTSettings, policy: Policy, corpus: Corpus, held_out: Corpus | None, steps: int, precision: str
) -> dict:
    """What a run must share with its checkpoint to continue from it."""
    training = {"tokens_per_micro_batch", "micro_batches_per_step", "seed", "max_grad_norm", "deterministic"}
    return {
        "model": settings.model.model_dump(mode="json"),
        "lora": settings.lora.model_dump(mode="json"),
        "data": settings.data.model_dump(mode="json", exclude={"cache"}),
        "training": settings.training.model_dump(mode="json", include=training),
        "optimizer": settings.optimizer.model_dump(mode="json"),
        "steps": steps,
        "precision": precision,
        "tokenised_data": corpus.identity(),
        "held_out_data": held_out.identity() if held_out else {},
        "initial_weights": policy.digest,
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


def export(output: Output, settings: SFTSettings, policy: Policy, state: TrainState) -> None:
    """Writes `best/` where evaluation ran, `adapter/` for LoRA, and `model/` last: it makes the run finished."""
    config, tokenizer = policy.gpt2.config, policy.tokenizer

    def plain(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return plain_policy(settings, trained, policy.digest).weights() if settings.lora.rank else dict(trained)

    if state.best_step is not None:
        folder = checkpoint.step_folder(output.checkpoints, state.best_step)
        try:
            checkpoint.verify(folder)
            write_folder(output.best, plain(checkpoint.read_weights(folder)), config, tokenizer)
        except checkpoint.CheckpointError as error:
            print(f"warning: best/ is not written: {error}", file=sys.stderr)
    if settings.lora.rank:
        write_adapter_folder(output.adapter, policy.gpt2, lora_config(settings.lora), settings.model.path, tokenizer)
    merged = plain(trained_weights(policy.gpt2))
    if settings.lora.rank:
        check_adapter(output.adapter, load_policy(settings.model, settings.training.seed), merged)
    write_folder(output.model, merged, config, tokenizer)


def next_commands(settings: SFTSettings, policy: Policy, output: Output) -> Iterator[str]:
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
    yield shlex.join(words)
