"""Reference log-probs: computed once by the policy as it is at step 0, kept by content, checked before they are used.

    <cache>/reference/<digest>/
        manifest.json          what computed them: digests of weights, tokenizer and template, precision, backend
        <digest>.parquet       some replies: key, log_prob, tokens, log_probs (of each token)

The folder is named by what determines a log-prob, so whatever differs in that is never read, and whatever does not
(adapters, learning rate, beta, the order of the data) shares it. A reply is named by its ids, those of its prompt, and
which of them are scored. A shard is complete or absent: whoever is killed loses the seconds since the last one.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpt2ft.checkpoint import difference
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import TokenTree
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import autocast, global_sum, precision_of
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.errors import Gpt2ftError, speaks_for_its_machine
from gpt2ft.files import sync_folder, synced, write_json
from gpt2ft.objectives.dpo import reply_log_probs
from gpt2ft.objectives.objective import Objective
from gpt2ft.training.evaluate import share

SECONDS_TO_A_SHARD = 10.0
TOLERANCES = {"no": 1e-4, "bf16": 0.02}  # nats per token of a reply, by precision: what rounding may do
LOSS_TOLERANCES = {"no": 1e-3, "bf16": 0.05}  # of the loss of the first step, relative where it is above 1

Key = bytes  # 16 of them


class ReferenceLogProbError(Gpt2ftError):
    """Reference log-probs that must not be trained against; says which and why."""


@dataclass(frozen=True)
class Row:
    """One reply: what the store keeps of it."""

    key: Key
    log_prob: float  # of all its tokens
    log_probs: list[float]  # of each


class ReferenceStore:
    """The shards of one reference.

    Args:
        cache: folder of all of them.
        computed_by: what determines a log-prob.
        versions: of the libraries; they may differ, but then they are named where a check fails.

    Raises:
        ReferenceLogProbError: if the folder holds those of another reference.
    """

    def __init__(self, cache: Path, computed_by: dict[str, str], versions: dict[str, str]) -> None:
        digest = hashlib.sha256(json.dumps(computed_by, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = cache / "reference" / digest
        self.computed_by = computed_by
        self.versions = versions
        self.manifest = self.folder / "manifest.json"
        if self.manifest.exists():
            self._check_manifest()

    def _check_manifest(self) -> None:
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            changed = difference(manifest["computed_by"], self.computed_by)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReferenceLogProbError(f"{self.manifest} is damaged ({error}): remove {self.folder}") from error
        if changed:
            raise ReferenceLogProbError(
                f"the reference log-probs in {self.folder} are of another reference: {changed}; remove that folder"
            )

    def begin(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.manifest.exists():
            self.write_manifest()

    def write_manifest(self) -> None:
        """With the number of rows there are now."""
        manifest = {"computed_by": self.computed_by, "versions": self.versions, "rows": len(self._rows())}
        write_json(self.manifest, manifest)

    def differing_versions(self) -> str:
        """Which libraries have changed since, in words; empty if none has."""
        then = json.loads(self.manifest.read_text(encoding="utf-8"))["versions"]
        return difference(then, self.versions) or ""

    def read(self, keys: Sequence[Key], tokens: Sequence[int]) -> NDArray[np.float64]:
        """[n] the log-prob of each reply, NaN where there is none.

        Args:
            tokens: how many each must have.

        Raises:
            ReferenceLogProbError: if a shard is damaged, or holds what no model gives.
        """
        rows = self._rows()
        found = np.full(len(keys), np.nan)
        for number, (key, length) in enumerate(zip(keys, tokens, strict=True)):
            if key in rows:
                log_prob, stored_length, file = rows[key]
                if not math.isfinite(log_prob) or log_prob > 0 or stored_length != length:
                    raise ReferenceLogProbError(
                        f"{file} must hold the log-prob of {length} tokens, but holds {log_prob} of {stored_length}: "
                        "remove that file, and its rows are computed again"
                    )
                found[number] = log_prob
        return found

    def _rows(self) -> dict[Key, tuple[float, int, Path]]:
        import pyarrow as pa
        import pyarrow.parquet

        rows: dict[Key, tuple[float, int, Path]] = {}
        for file in sorted(self.folder.glob("*.parquet")):
            try:
                columns = ["key", "log_prob", "tokens"]
                table = pyarrow.parquet.read_table(file, columns=columns, page_checksum_verification=True)
                values = [table.column(name).to_pylist() for name in columns]
            except (OSError, KeyError, pa.ArrowException) as error:
                raise ReferenceLogProbError(
                    f"{file} is damaged ({' '.join(str(error).split())}): remove it, and its rows are computed again"
                ) from error
            for key, log_prob, length in zip(*values, strict=True):
                rows.setdefault(key, (log_prob, length, file))
        return rows

    def write(self, rows: Sequence[Row]) -> None:
        """A new shard, named by the keys in it."""
        import pyarrow as pa
        import pyarrow.parquet

        table = pa.table(
            {
                "key": pa.array([row.key for row in rows], pa.binary(16)),
                "log_prob": pa.array([row.log_prob for row in rows], pa.float64()),
                "tokens": pa.array([len(row.log_probs) for row in rows], pa.int32()),
                "log_probs": pa.array([row.log_probs for row in rows], pa.list_(pa.float32())),
            }
        )
        name = hashlib.sha256(b"".join(row.key for row in rows)).hexdigest()[:32]
        with synced(self.folder / f"{name}.parquet") as temporary:
            pyarrow.parquet.write_table(table, temporary, write_page_checksum=True)
        sync_folder(self.folder)


# --- what is asked for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The replies of a plan, in its order."""

    keys: list[Key]
    tokens: list[int]


def wanted(plan: Plan) -> Wanted:
    """What a plan needs to know of its replies."""
    keys, tokens = [], []
    for piece in range(len(plan.chunks)):
        tree = plan.chunks.tree(piece)
        for node in np.flatnonzero(tree.weights > 0).tolist():
            keys.append(reply_key(tree, node))
            tokens.append(int(tree.lengths[node]) - 1)
    return Wanted(keys, tokens)


def reply_key(tree: TokenTree, node: int) -> Key:
    """A digest of the ids of the prompt, of the ids of the reply, and of which of these are scored."""
    parts = [tree.tokens[tree.starts[i] : tree.starts[i] + tree.lengths[i]] for i in tree.path_to(node)]
    prompt, reply = np.concatenate(parts[:-1]), parts[-1]
    is_scored = np.arange(len(reply)) > 0
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    for values in (prompt.astype("<u4"), reply.astype("<u4"), is_scored.astype("u1")):
        digest.update(values.tobytes())
    return digest.digest()


# --- the pass -------------------------------------------------------------------------------------------------------


def attach(
    plans: Sequence[Plan],
    store: ReferenceStore,
    model: nn.Module,
    accelerator: Any,
    signals: SignalHandler,
) -> int:
    """Puts the reference into the plans, after computing what the store lacks. All processes come here together.

    Every process reads what its own machine has, and what any of them has is known to all.

    Args:
        model: TargetLogProbs of the policy at step 0, not prepared.

    Returns:
        How many replies were computed.

    Raises:
        Preempted: once what was computed is kept.
        ReferenceLogProbError: if the store, or what the model gives, cannot be used.
    """
    asked = [wanted(plan) for plan in plans]
    known = [_agreed(store.read(want.keys, want.tokens), accelerator) for want in asked]
    missing = {key for want, found in zip(asked, known, strict=True) for key in _absent(want, found)}
    if missing:
        if speaks_for_its_machine():
            store.begin()
        accelerator.wait_for_everyone()
        todo = _streams_to_run(plans, asked, missing)
        _Pass(store, model, accelerator, signals).run(todo)
        accelerator.wait_for_everyone()
        known = [_agreed(store.read(want.keys, want.tokens), accelerator) for want in asked]
        left = sum(len(_absent(want, found)) for want, found in zip(asked, known, strict=True))
        if left:
            raise ReferenceLogProbError(f"{left} reference log-probs are missing from {store.folder} after the pass")
        if speaks_for_its_machine():
            store.write_manifest()
    for plan, found in zip(plans, known, strict=True):
        plan.reference = found
    return len(missing)


def _absent(want: Wanted, found: NDArray[np.float64]) -> list[Key]:
    return [want.keys[index] for index in np.flatnonzero(np.isnan(found))]


def _agreed(mine: NDArray[np.float64], accelerator: Any) -> NDArray[np.float64]:
    """Of each value, that of the first process that has it: the same everywhere, with or without a shared disk."""
    if accelerator.num_processes == 1:
        return mine
    local = torch.from_numpy(mine).to(accelerator.device)
    for_all = accelerator.gather(local).view(accelerator.num_processes, -1).cpu().numpy()
    return np.take_along_axis(for_all, np.isnan(for_all).argmin(0)[None], axis=0)[0]


@dataclass(frozen=True)
class _StreamToRun:
    plan: Plan
    micro_batch: list[int]
    rows: dict[int, Key]  # number of a reply in the stream -> the key under which it is to be kept


def _streams_to_run(plans: Sequence[Plan], asked: Sequence[Wanted], missing: set[Key]) -> list[_StreamToRun]:
    """The streams of the plans that hold what is missing; each key is kept from the first of them.

    Streams are run whole and as they are trained on, so a row does not depend on what was there before.
    """
    left, todo = set(missing), []
    for plan, want in zip(plans, asked, strict=True):
        for micro_batch in plan.streams:
            rows = {}
            for number, reply in enumerate(plan.replies_of(micro_batch).tolist()):
                if want.keys[reply] in left:
                    left.remove(want.keys[reply])
                    rows[number] = want.keys[reply]
            if rows:
                todo.append(_StreamToRun(plan, micro_batch, rows))
    return todo


@dataclass(frozen=True)
class _Pass:
    store: ReferenceStore
    model: nn.Module
    accelerator: Any
    signals: SignalHandler

    @torch.no_grad()
    def run(self, todo: list[_StreamToRun]) -> None:
        from tqdm import tqdm

        accelerator = self.accelerator
        was_training = self.model.training
        self.model.eval()
        held: list[Row] = []
        since = time.monotonic()
        rounds = list(share(todo, accelerator.process_index, accelerator.num_processes))
        silent = not (accelerator.is_main_process and sys.stderr.isatty())
        bar = tqdm(rounds, desc="reference", unit="stream", disable=silent, leave=False)
        for number, mine in enumerate(bar, start=1):
            watchdog.at("reference stream")
            if any(global_sum(accelerator, float(bool(self.signals)))):
                break
            if mine is not None:
                held += self._rows(mine)
            if held and time.monotonic() - since > SECONDS_TO_A_SHARD:
                self.store.write(held)
                held, since = [], time.monotonic()
                if silent and accelerator.is_main_process:
                    print(f"reference {number:,}/{len(rounds):,} streams", flush=True)
        watchdog.at("getting ready", is_long=True)
        if held:
            self.store.write(held)
        self.model.train(was_training)
        if any(global_sum(accelerator, float(bool(self.signals)))):
            raise Preempted("told to stop, and has kept the reference log-probs computed so far")

    def _rows(self, wanted: _StreamToRun) -> list[Row]:
        stream = wanted.plan.stream(wanted.micro_batch).to(self.accelerator.device)
        with autocast(self.accelerator):
            log_probs = self.model(stream)[: stream.num_supervised].double().cpu()
        if not bool(torch.isfinite(log_probs).all()):
            store, row = wanted.plan.chunks.rows[wanted.micro_batch[0]].tolist()
            name = wanted.plan.chunks.stores[store].id(row)
            raise ReferenceLogProbError(
                f"the reference gives no finite log-prob to a reply in the stream that opens with conversation {name}: "
                "look at its weights"
            )
        lengths = torch.bincount(stream.groups[: stream.num_supervised]).tolist()
        by_reply = log_probs.split(lengths)  # targets stand reply by reply
        return [Row(key, float(by_reply[n].sum()), by_reply[n].tolist()) for n, key in wanted.rows.items()]


# --- the check ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_start(
    model: nn.Module,
    plan: Plan,
    step: int,
    store: ReferenceStore,
    accelerator: Any,
    objective: Objective,
    start_loss: float | None,
) -> float:
    """The replies of one step have the stored log-probs under the forward pass of training, with step-0 weights.

    Steps come in random order, so these are a random sample of all. Where policy and reference are equal, the loss is
    known, and it must be that.

    Args:
        start_loss: what the loss must be; None where that depends on the data.

    Returns:
        The largest difference of a reply, in nats per token.

    Raises:
        ReferenceLogProbError: if it is more than rounding, naming what has changed.
    """
    worst = loss = counted = 0.0
    model.train()
    for number in range(accelerator.process_index, plan.micro_batches_per_step, accelerator.num_processes):
        stream = plan.training_stream(step, number).to(accelerator.device)
        with autocast(accelerator):
            log_probs = model(stream)
        changes = (reply_log_probs(log_probs, stream) - stream.pairs.reference).abs() / stream.pairs.lengths
        worst = max(worst, float(changes.max())) if bool(torch.isfinite(changes).all()) else math.inf
        loss += float(objective.loss(log_probs, stream))
        counted += objective.normalizer(stream)
    tolerance = TOLERANCES[precision_of(accelerator)]
    loss, counted = global_sum(accelerator, loss, counted)
    local = torch.tensor(worst, dtype=torch.float64, device=accelerator.device)
    worst = float(accelerator.gather(local).max())
    if worst > tolerance:
        why = store.differing_versions()
        raise ReferenceLogProbError(
            f"reference log-probs differ from what the start of this run gives by {worst:.2g} nats per token of a "
            f"reply, more than {tolerance}: {why or 'all digests and versions are the same, so the store is damaged'}; "
            f"remove {store.folder}, and they are computed again"
        )
    allowed = LOSS_TOLERANCES[precision_of(accelerator)]
    if start_loss is not None and abs(loss / counted - start_loss) > allowed * max(1.0, start_loss):
        raise ReferenceLogProbError(
            f"the first step must have the loss {start_loss:.4f}, as policy and reference are equal there, but has "
            f"{loss / counted:.4f}"
        )
    return worst
