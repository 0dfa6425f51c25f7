"""Held-out loss as sums and counts, so that it depends neither on batch size nor on the number of processes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import as_sums, device_sum, global_sum, on_device
from gpt2ft.objectives.objective import Objective
from gpt2ft.stream import TokenStream
from gpt2ft.training.prefetch import build_ahead

if TYPE_CHECKING:
    from gpt2ft.training.fit import LoopInputs

Item = TypeVar("Item")


@dataclass(frozen=True)
class LossSums:
    """Sums over supervised targets: the tokens of every assistant turn and its `<|end|>`.

    Each counts once, whatever the weight by which it is learnt.
    """

    nats: float
    tokens: int
    bytes: int  # UTF-8 bytes of the targets' text; control tokens have none

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.nats_per_token, 700.0)) if self.tokens else math.nan  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of text, which does not depend on the tokenizer; NaN without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def metrics(self) -> dict[str, float]:
        """Return the three means as they are logged."""
        return {"loss": self.nats_per_token, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


class EvaluationInterrupted(Exception):
    """A process was told to stop, so there is no result. All processes raise it together."""


def evaluate_by_source(
    model: nn.Module,
    plan: Plan,
    byte_lengths: Sequence[int],
    accelerator: Any,
    was_signalled: Callable[[], bool] | None = None,
) -> list[LossSums]:
    """Return the loss on each data source of the plan, in the order of its stores.

    Args:
        model: TargetLogProbs, prepared by the accelerator.
        byte_lengths: UTF-8 bytes of each id.
        was_signalled: asked before each stream, of all processes together.

    Raises:
        EvaluationInterrupted: if any process was told to stop meanwhile.
    """
    bytes_of = on_device(accelerator, *byte_lengths)
    total = torch.zeros(len(plan.chunks.stores), 3, dtype=torch.float64, device=bytes_of.device)
    with evaluating(model):
        for num_supervised, stream in _streams_of_rank(plan, _num_supervised, accelerator, was_signalled):
            real = slice(num_supervised)  # without the tail
            nats = -as_sums(accelerator, model(stream)[real])
            targets, groups = (ids[real].to(total.device) for ids in (stream.targets, stream.groups))
            sums = torch.zeros_like(total)  # nats, tokens, bytes
            total += sums.index_add_(0, groups, torch.stack([nats, torch.ones_like(nats), bytes_of[targets]], dim=1))
    total = device_sum(accelerator, total).tolist()
    return [LossSums(nats, round(tokens), round(bytes)) for nats, tokens, bytes in total]


def evaluate_objective(
    model: nn.Module,
    plan: Plan,
    objective: Objective,
    accelerator: Any,
    was_signalled: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Return the mean loss and metrics of an objective over the whole plan. Arguments and errors as above."""

    def streams() -> Iterator[tuple[float, TokenStream]]:
        return _streams_of_rank(plan, objective.normalizer, accelerator, was_signalled)

    baseline = mean_baseline(model, objective, streams(), accelerator) if objective.baseline else None
    total = on_device(accelerator, *[0.0] * (2 + len(objective.metric_names)))
    with evaluating(model):
        for normalizer, stream in streams():
            stream = measured_against(baseline, stream)
            log_probs = model(stream)
            values = objective.loss(log_probs, stream)[None], objective.metrics(log_probs, stream)
            total += as_sums(accelerator, *values, on_device(accelerator, normalizer))
    *totals, normalizer = device_sum(accelerator, total).tolist()
    return {name: value / normalizer for name, value in zip(("loss", *objective.metric_names), totals, strict=True)}


def with_baseline(inputs: "LoopInputs", streams: list[tuple[int, TokenStream]]) -> list[tuple[int, TokenStream]]:
    """Return the streams of a step, with the baseline of their losses where the objective has one."""
    if inputs.objective.baseline is None:
        return streams
    baseline = mean_baseline(inputs.strategy.model, inputs.objective, streams, inputs.accelerator)
    return [(number, measured_against(baseline, stream)) for number, stream in streams]


def mean_baseline(
    model: nn.Module, objective: Objective, streams: Iterable[tuple[Any, TokenStream]], accelerator: Any
) -> Tensor:
    """Return the baseline over all streams of all processes, which call it together."""
    sums = on_device(accelerator, 0.0, 0.0)
    with evaluating(model):
        for _, stream in streams:
            sums += objective.baseline(model(stream), stream)
    total, count = device_sum(accelerator, sums)
    return (total / count).clamp(min=0.0)


def measured_against(baseline: Tensor | None, stream: TokenStream) -> TokenStream:
    return stream if baseline is None else replace(stream, pairs=replace(stream.pairs, baseline=baseline))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients and without dropout, and leave the model as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _streams_of_rank(
    plan: Plan, count: Callable[[TokenStream], float], accelerator: Any, was_signalled: Callable[[], bool] | None
) -> Iterator[tuple[float, TokenStream]]:
    """Yield `count` of each stream of this process, and the stream on the device."""

    def build(micro_batch: list[int] | None) -> tuple[float, list[TokenStream]]:
        stream = plan.stream(micro_batch or [])
        return count(stream), [stream]

    micro_batches = items_of_rank(plan.streams, accelerator.process_index, accelerator.num_processes)
    for number, (counted, (stream,)) in enumerate(build_ahead(build, micro_batches, accelerator.device)):
        watchdog.mark_progress("held-out stream", number)
        if was_signalled is not None and any(global_sum(accelerator, float(was_signalled()))):
            raise EvaluationInterrupted
        yield counted, stream


def _num_supervised(stream: TokenStream) -> int:
    return stream.num_supervised


def sum_over_sources(losses: Sequence[LossSums]) -> LossSums:
    """Return the loss over all sources together."""
    return LossSums(
        nats=sum(loss.nats for loss in losses),
        tokens=sum(loss.tokens for loss in losses),
        bytes=sum(loss.bytes for loss in losses),
    )


def items_of_rank(items: Sequence[Item], rank: int, num_processes: int) -> Iterator[Item | None]:
    """Yield every `num_processes`-th item, from number `rank` on.

    Every process gets the same number, None where one is missing: under FSDP and ZeRO-3 a forward pass is a collective,
    which all processes must enter.
    """
    rounds = -(-len(items) // num_processes)
    for turn in range(rounds):
        index = turn * num_processes + rank
        yield items[index] if index < len(items) else None
