"""Plan of a run in a few rows for people."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpt2ft.data.corpus import Corpus
from gpt2ft.data.kinds import LABELLED
from gpt2ft.data.labelled_replies import DESIRABLE
from gpt2ft.data.mixing import LEAST_TO_HOLD_OUT
from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import listed
from gpt2ft.device import PrecisionName
from gpt2ft.distributed.launch_checks import NAMES, StrategyName
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import chunk_size, held_at_once
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.wording import counted

if TYPE_CHECKING:
    from gpt2ft.runs.run_setup import RunSetup

GIB = 2**30
FEW_STEPS = 15  # fewer leave a model much as it was
ENOUGH_STEPS = 100


@dataclass(frozen=True)
class Hardware:
    """Devices that a run trains on, and how it uses them.

    Attributes:
        device: such as cuda.
        strategy: how model and optimizer lie on the processes, see training/strategy.py.
        activation_checkpointing: True if activations are computed again in the backward pass.
    """

    processes: int
    device: str
    strategy: StrategyName
    precision: PrecisionName
    activation_checkpointing: bool

    def __str__(self) -> str:
        sharing = "" if self.strategy == "ddp" else f", {NAMES[self.strategy]}"
        return f"{self.processes} x {self.device}{sharing}, {self.precision}"


def describe(setup: "RunSetup", hardware: Hardware) -> Iterator[tuple[str, str]]:
    """Yield model, data, what was dropped and why, and the steps to come: rows of a label and a text."""
    loaded, plan, held_out, eval_plan = setup.loaded, setup.plan, setup.held_out, setup.eval_plan
    config = loaded.gpt2.config
    trained, parameters = parameter_counts(loaded.gpt2)
    yield (
        "model",
        f"{loaded.source}: {parameters / 1e6:.1f}M parameters, {counted(config.n_layer, 'layer')} x {config.n_embd}, "
        f"{len(loaded.tokenizer):,} tokens, context {config.n_positions:,}",
    )
    if trained < parameters:
        yield "trained", f"{trained:,} parameters, {trained / parameters:.2%} of all"
    yield from _data_rows("train", setup.corpus, plan)
    if held_out is not None and eval_plan is not None:
        yield from _data_rows("held out", held_out, eval_plan)
    elif setup.settings.data.holds_out:
        yield "held out", f"nothing: fewer than {LEAST_TO_HOLD_OUT} conversations are too few to spare one"
    if setup.settings.data.train_on == "last":
        yield "learnt", "of conversations the last assistant turn of each path alone"
    yield "streams", describe_streams(plan)
    if plan.chunks.together:
        yield (
            "shared",
            f"{plan.tokens:,} tokens, {plan.tokens / plan.tokens_alone:.1%} of the {plan.tokens_alone:,} of all "
            "conversations alone",
        )
    if plan.pair_capacity:
        pairs, tokens_if_unpacked = int(plan.chunks.pairs.sum()), int(plan.chunks.tokens_if_unpacked.sum())
        others = ", the others unrelated" if setup.corpus.kind is LABELLED else ""
        yield (
            "labels" if others else "pairs",
            f"{pairs:,} of {counted(int(plan.chunks.replies.sum()), 'reply', 'replies')}{others}; as {2 * pairs:,} "
            f"sequences of their own they would be {tokens_if_unpacked:,} tokens, "
            f"{tokens_if_unpacked / plan.tokens:.1f} times as many",
        )
        if others and len(labels := _labels(setup.corpus)) == 1:
            which, other = ("undesirable", "less") if DESIRABLE not in labels else ("desirable", "more")
            yield "warning", f"all labels are {which}: replies only become {other} likely, whatever they are like"
    yield "training", describe_steps(plan, setup.steps, setup.settings.optimizer.learning_rate)
    if setup.settings.training.patience:
        yield "", describe_patience(setup.settings.training, setup.steps, plan)
    if setup.steps < FEW_STEPS:
        yield "warning", few_steps_warning(setup.steps, setup.settings.training)
    yield "devices", str(hardware)
    yield "memory", f"about {memory_estimate(loaded.gpt2, plan.capacity, hardware) / GIB:.1f} GiB per device"


def _labels(corpus: Corpus) -> set[int]:
    """Return the labels that sources of labelled replies have, as ranks; what is no such reply has -1."""
    return {int(rank) for store in corpus.stores for rank in np.unique(store.nodes("ranks")[0])} - {-1}


def few_steps_warning(steps: int, training: TrainingSettings) -> str:
    """Return a sentence that says so few steps change little, and which setting asks for more."""
    setting = "min_steps" if training.steps is None else "steps"
    return f"{counted(steps, 'step')} will change the model little: for more, --training.{setting} {ENOUGH_STEPS}"


def describe_streams(plan: Plan) -> str:
    """Return how full the streams are, and of what."""
    repeated = f", {plan.repeated / plan.tokens:.1%} are repeated as context" if plan.repeated else ""
    return (
        f"{len(plan.streams):,} of {counted(plan.capacity, 'token')}, {plan.fill:.1%} full; "
        f"{plan.supervised / plan.tokens:.0%} of the tokens are supervised{repeated}"
    )


def describe_steps(plan: Plan, steps: int, learning_rate: float) -> str:
    """Return how many steps there are, how large they are, and how many make an epoch."""
    epochs = plan.epochs or steps / plan.steps_per_epoch
    return (
        f"{counted(steps, 'step')} of {plan.streams_per_step} x {counted(plan.capacity, 'token')}, "
        f"{f'{plan.steps_per_epoch:,.1f}'.removesuffix('.0')} to an epoch, "
        f"{epochs:,.3g} {'epoch' if epochs == 1 else 'epochs'}, learning rate {learning_rate:.2g}"
    )


def describe_patience(training: TrainingSettings, steps: int, plan: Plan) -> str:
    """Return after how many evaluations a run ends early, and how many there would be in all."""
    in_all = math.ceil(steps / (training.eval_every or plan.steps_per_epoch))
    evaluations = counted(training.patience, "evaluation")
    return f"ends early after {evaluations} in a row without a better held-out loss, of {in_all:,} in all"


def parameter_counts(gpt2: GPT2) -> tuple[int, int]:
    """Return the numbers of trained parameters and of all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in gpt2.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def memory_estimate(gpt2: GPT2, capacity: int, hardware: Hardware) -> float:
    """Return the bytes for training on one device: an estimate; the memory probe measures the real peak.

    Weights, gradients and two Adam moments in float32 of what is trained, the weights alone of what is frozen; per
    layer about 18 activations as wide as the embedding, 13 where its matrices are frozen (of one layer, and one of each
    other, where they are computed again); the logits that are held, and one chunk of them in bf16 or fp16. Shards
    divide weights (FSDP2, ZeRO-3), gradients and moments among the processes. Autograd keeps what matrices were
    multiplied with until the backward pass: copies in bf16 or fp16, and under ZeRO-3 in float32 the weights that were
    gathered. ZeRO has a second copy of what is trained, and DDP on several processes one of the gradients: the buckets
    in which it exchanges them.
    """
    config = gpt2.config
    trained, parameters = parameter_counts(gpt2)
    is_mixed = hardware.precision != "fp32"
    width = 2 if is_mixed else 4
    of_weights = hardware.processes if hardware.strategy in ("fsdp2", "zero3") else 1
    is_zero = hardware.strategy in ("zero2", "zero3")
    frozen = (parameters - trained) * (4 if is_zero else width)
    state = (trained * 4 + frozen) / of_weights + optimizer_bytes(gpt2, hardware)
    if is_mixed:
        state += trained * 2
    elif hardware.strategy == "zero3" and not hardware.activation_checkpointing:
        state += parameters * 4
    per_layer = 18 if trained == parameters else 13
    layers = per_layer + config.n_layer if hardware.activation_checkpointing else per_layer * config.n_layer
    activations = capacity * config.n_embd * width * (layers + 4)
    logits = held_at_once(capacity, config.vocab_size, hardware.device)
    cast = min(chunk_size(hardware.device), capacity) if is_mixed else 0  # of a chunk's gradients
    return state + activations + (logits * 4 + cast * 2) * config.vocab_size


def optimizer_bytes(gpt2: GPT2, hardware: Hardware) -> float:
    """Return the bytes of gradients, Adam's moments and second copies on one device: see `memory_estimate`."""
    trained, _ = parameter_counts(gpt2)
    if hardware.strategy == "ddp":
        return trained * (16 if hardware.processes > 1 else 12)
    return trained * (12 if hardware.strategy == "fsdp2" else 16) / hardware.processes


def dropped(corpus: Corpus, plan: Plan) -> Counter[str]:
    """Return counts of what is left out, by reason: by the sources, the corpus and the context."""
    reasons: Counter[str] = Counter()
    for store in corpus.stores if corpus.has_own_sources else ():
        reasons.update(store.statistics.dropped)
    return +(reasons + plan.chunks.left_out + corpus.dropped)


@dataclass(frozen=True)
class SourceShare:
    """Share of one source in a plan."""

    source: str
    format: str
    mixing_weight: float
    conversations_read: int
    messages_read: int | None  # None for a corpus without sources of its own
    dropped: dict[str, int]  # messages by reason
    conversations: int
    tokens: int  # in an epoch
    supervised: int  # targets of any weight, each counted once
    pairs: int  # of replies, in preference data; or labelled replies
    pair: tuple[str, str]  # what one of them is called, and many
    notes: tuple[str, ...] = ()  # what else people must know of it

    def __str__(self) -> str:
        weight = f" x {self.mixing_weight:g}" if self.mixing_weight != 1 else ""
        read = "" if self.messages_read is None else f"; {counted(self.messages_read, 'message')} read"
        used = f"{self.conversations:,} of"
        if self.pairs:
            prompts = counted(self.conversations, "prompt")
            used = f"{counted(self.pairs, *self.pair)} to {prompts} in"
        return (
            f"{self.source}{weight} ({self.format}): {used} {counted(self.conversations_read, 'conversation')}, "
            f"{counted(self.tokens, 'token')}, {self.supervised:,} supervised{read}"
        )


def shares(corpus: Corpus, plan: Plan) -> list[SourceShare]:
    """Return the shares of a corpus's sources, in its order."""
    found = []
    for number, (store, mixing_weight) in enumerate(zip(corpus.stores, corpus.mixing_weights, strict=True)):
        here, rows_used = plan.chunks.rows[:, 0] == number, plan.chunks.all_rows
        rows = corpus.rows[corpus.rows[:, 0] == number]
        share = SourceShare(
            source=store.source,
            format=store.statistics.format,
            mixing_weight=mixing_weight,
            messages_read=store.statistics.read if corpus.has_own_sources else None,
            dropped=store.statistics.dropped if corpus.has_own_sources else {},
            conversations=len(np.unique(rows_used[rows_used[:, 0] == number, 1])),
            conversations_read=store.statistics.conversations if corpus.has_own_sources else len(rows),
            tokens=int(plan.chunks.sizes[here].sum()),
            supervised=int(plan.chunks.supervised[here].sum()),
            pairs=int(plan.chunks.pairs[here].sum()),
            pair=corpus.kind.pair,
            notes=store.notes if corpus.has_own_sources else (),
        )
        found.append(share)
    return found


def _data_rows(label: str, corpus: Corpus, plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield a row for each source and one for what it dropped, then one for what corpus and context left out."""
    for share in shares(corpus, plan):
        yield label, str(share)
        label = ""
        if share.dropped:
            yield "", f"dropped: {listed(share.dropped)}"
        yield from (("", note) for note in share.notes)
    reasons = +(corpus.dropped + plan.chunks.left_out)
    if reasons:
        yield "", f"left out: {listed(reasons)}"
