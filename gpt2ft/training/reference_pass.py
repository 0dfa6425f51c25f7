"""Reference pass: compute the reference log-probs that the store lacks, and check them before training.

The reference is the policy as it is at step 0. Its log-probs are computed offline, once for all runs that share them:
no second model is in memory while training.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import autocast, global_sum, on_device, precision_of
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.errors import is_first_on_machine
from gpt2ft.objectives.dpo import reply_log_probs
from gpt2ft.objectives.objective import Objective
from gpt2ft.stream import TokenStream
from gpt2ft.training.evaluate import items_of_rank
from gpt2ft.training.prefetch import build_ahead
from gpt2ft.training.reference_store import Key, ReferenceLogProbError, ReferenceStore, ReplyKeys, Row, reply_keys

SECONDS_BETWEEN_SHARDS = 10.0  # the most work that a kill can cost
# Nats per token of a reply, by precision. On the hardware that computed the reference the difference is zero; other
# hardware sums in another order, and may round a log-prob near 1 nat to a neighbour: 2^-8 in bf16.
TOLERANCES = {"no": 1e-4, "bf16": 2**-8, "fp16": 2**-11}
LOSS_TOLERANCES = {"no": 1e-3, "bf16": 0.05, "fp16": 0.01}  # of the loss of the first step, relative above 1

# --- computing log-probs that are missing ---------------------------------------------------------------------------


def attach_reference(
    plans: Sequence[Plan],
    store: ReferenceStore,
    model: nn.Module,
    accelerator: Any,
    signals: SignalHandler,
) -> int:
    """Put the reference log-probs into the plans, in place, after computing those that the store lacks.

    All processes call it together. Each reads the store of its own machine, and a log-prob that any of them finds is
    handed to all.

    Args:
        model: TargetLogProbs of the policy at step 0, not prepared.

    Returns:
        The number of replies computed.

    Raises:
        Preempted: once what was computed is stored.
        ReferenceLogProbError: if the store, or what the model gives, cannot be used.
    """
    replies = [reply_keys(plan) for plan in plans]
    known = [_known_anywhere(store.read(asked.keys, asked.tokens), accelerator) for asked in replies]
    missing = {key for asked, found in zip(replies, known, strict=True) for key in _missing(asked, found)}
    if missing:
        if is_first_on_machine():
            store.create()
        accelerator.wait_for_everyone()
        _ReferencePass(store, model, accelerator, signals).run(_streams_to_run(plans, replies, missing))
        accelerator.wait_for_everyone()
        known = [_known_anywhere(store.read(asked.keys, asked.tokens), accelerator) for asked in replies]
        still_missing = sum(len(_missing(asked, found)) for asked, found in zip(replies, known, strict=True))
        if still_missing:
            raise ReferenceLogProbError(
                f"{still_missing} reference log-probs are missing from {store.folder} after the pass"
            )
        if is_first_on_machine():
            store.write_manifest()
    for plan, found in zip(plans, known, strict=True):
        plan.reference = found
    return len(missing)


def attach_tails(plans: Sequence[Plan], store: ReferenceStore, accelerator: Any) -> None:
    """Put into the plans, in place, what the reference gives to the tokens by which a reply of a pair is longer.

    All processes call it together, once the store holds all replies.
    """
    for plan in plans:
        asked = reply_keys(plan)
        keys = [asked.keys[reply] for reply in asked.pairs.ravel().tolist()]
        shorter = np.array(asked.tokens)[asked.pairs].min(axis=1)
        tails = store.read_tails(keys, np.repeat(shorter, 2).tolist())
        plan.reference_tails = _known_anywhere(tails, accelerator).reshape(-1, 2)


def _missing(asked: ReplyKeys, found: NDArray[np.float64]) -> list[Key]:
    return [asked.keys[index] for index in np.flatnonzero(np.isnan(found))]


def _known_anywhere(local: NDArray[np.float64], accelerator: Any) -> NDArray[np.float64]:
    """Take each value from the first process that has it, so that all agree with or without a shared disk."""
    if accelerator.num_processes == 1:
        return local
    gathered = accelerator.gather(torch.from_numpy(local).to(accelerator.device))
    by_process = gathered.view(accelerator.num_processes, -1).cpu().numpy()
    return np.take_along_axis(by_process, np.isnan(by_process).argmin(0)[None], axis=0)[0]


@dataclass(frozen=True)
class _StreamToRun:
    """A micro-batch of a plan that holds missing replies."""

    plan: Plan
    micro_batch: list[int]
    rows: dict[int, Key]  # number of a reply in the stream -> the key under which it is to be stored


def _streams_to_run(plans: Sequence[Plan], replies: Sequence[ReplyKeys], missing: set[Key]) -> list[_StreamToRun]:
    """Return the streams that hold missing replies; each key is taken from the first of them.

    Streams are run whole and as they are trained on, so a row does not depend on what the store held before.
    """
    left, to_run = set(missing), []
    for plan, asked in zip(plans, replies, strict=True):
        for micro_batch in plan.streams:
            rows = {}
            for number, reply in enumerate(plan.replies_of(micro_batch).tolist()):
                if asked.keys[reply] in left:
                    left.remove(asked.keys[reply])
                    rows[number] = asked.keys[reply]
            if rows:
                to_run.append(_StreamToRun(plan, micro_batch, rows))
    return to_run


def _build(to_run: _StreamToRun | None) -> tuple[tuple[_StreamToRun, list[int]] | None, list[TokenStream]]:
    """Build a stream; known of it are the lengths of its replies. There is none where the other processes have more."""
    if to_run is None:
        return None, []
    stream = to_run.plan.stream(to_run.micro_batch)
    lengths = torch.bincount(stream.groups[: stream.num_supervised]).tolist()
    return (to_run, lengths), [stream]


@dataclass(frozen=True)
class _ReferencePass:
    """One pass over streams, written to the store shard by shard."""

    store: ReferenceStore
    model: nn.Module
    accelerator: Any
    signals: SignalHandler

    @torch.no_grad()
    def run(self, to_run: list[_StreamToRun]) -> None:
        from tqdm import tqdm

        accelerator = self.accelerator
        was_training = self.model.training
        self.model.eval()
        unwritten: list[Row] = []
        last_shard = time.monotonic()
        rounds = list(items_of_rank(to_run, accelerator.process_index, accelerator.num_processes))
        silent = not (accelerator.is_main_process and sys.stderr.isatty())
        built_ahead = build_ahead(_build, rounds, accelerator.device)
        bar = tqdm(built_ahead, "reference", len(rounds), unit="stream", disable=silent, leave=False)
        for number, (known, streams) in enumerate(bar, start=1):
            watchdog.mark_progress("reference stream", number)
            if self._is_any_signalled():
                break
            if known is not None:
                unwritten += self._rows(*known, *streams)
            if unwritten and time.monotonic() - last_shard > SECONDS_BETWEEN_SHARDS:
                self.store.write(unwritten)
                unwritten, last_shard = [], time.monotonic()
                if silent and accelerator.is_main_process:
                    print(f"reference stream {number:,}/{len(rounds):,}", flush=True)
        watchdog.mark_progress("writing the reference")
        if unwritten:
            self.store.write(unwritten)
        self.model.train(was_training)
        if self._is_any_signalled():
            raise Preempted("told to stop, and has kept the reference log-probs computed so far")

    def _is_any_signalled(self) -> bool:
        """Ask all processes, so that they stop at the same stream."""
        return any(global_sum(self.accelerator, float(self.signals.was_signalled())))

    def _rows(self, to_run: _StreamToRun, lengths: list[int], stream: TokenStream) -> list[Row]:
        with autocast(self.accelerator):
            log_probs = self.model(stream)[: stream.num_supervised].cpu().double()
        if not bool(torch.isfinite(log_probs).all()):
            store, row = to_run.plan.chunks.rows[to_run.micro_batch[0]].tolist()
            name = to_run.plan.chunks.stores[store].id(row)
            raise ReferenceLogProbError(
                f"the reference gives no finite log-prob to a reply in the stream that opens with conversation {name}: "
                "look at its weights"
            )
        by_reply = log_probs.split(lengths)  # targets stand reply by reply
        return [Row(key, float(by_reply[n].sum()), by_reply[n].tolist()) for n, key in to_run.rows.items()]


# --- the check before training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartStep:
    """One step of the plan under the weights of step 0, before any update."""

    worst: float  # largest difference of a reply from its reference, in nats per token
    loss: float
    precision: str


@torch.no_grad()
def compute_start(model: nn.Module, plan: Plan, step: int, objective: Objective, accelerator: Any) -> StartStep:
    """Run one step of the plan forward; all processes call it together.

    The model has the weights of step 0 and is in training mode, as in the loop. Steps come in random order, so the
    replies of one are a random sample of all.
    """
    worst = loss = normalizer = 0.0
    model.train()
    for number in range(accelerator.process_index, plan.micro_batches_per_step, accelerator.num_processes):
        built = plan.training_stream(step, number)
        if not built.num_tokens:
            continue
        stream = built.to(accelerator.device)
        with autocast(accelerator):
            log_probs = model(stream)
        changes = (reply_log_probs(log_probs, stream) - stream.pairs.reference).abs() / stream.pairs.lengths
        worst = max(worst, float(changes.max())) if bool(torch.isfinite(changes).all()) else math.inf
        loss += float(objective.loss(log_probs, stream))
        normalizer += objective.normalizer(built)
    loss, normalizer = global_sum(accelerator, loss, normalizer)
    worst = float(accelerator.gather(on_device(accelerator, worst)).max())
    return StartStep(worst, loss / normalizer, precision_of(accelerator))


def check_start(start: StartStep, expected_loss: float | None, store: ReferenceStore) -> None:
    """Check that the forward pass of training gives replies the stored log-probs, and pairs the loss to expect.

    Args:
        expected_loss: of equal policy and reference; None where it depends on the data.

    Raises:
        ReferenceLogProbError: if a difference is more than rounding; the message names what has changed.
    """
    tolerance = TOLERANCES[start.precision]
    if start.worst > tolerance:
        why = store.differing_versions()
        raise ReferenceLogProbError(
            f"reference log-probs differ from what the start of this run gives by {start.worst:.2g} nats per token of "
            f"a reply, more than {tolerance}: {why or 'all digests and versions are the same, so the store is damaged'}"
            f"; remove {store.folder}, and they are computed again"
        )
    allowed = LOSS_TOLERANCES[start.precision]
    if expected_loss is not None and abs(start.loss - expected_loss) > allowed * max(1.0, expected_loss):
        raise ReferenceLogProbError(
            f"the first step must have the loss {expected_loss:.4f}, as policy and reference are equal there, but has "
            f"{start.loss:.4f}"
        )
