"""Held-out loss as sums and counts, so that it depends neither on batch size nor on the number of processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2ft.data.plan import Plan
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import global_sum
from gpt2ft.objectives.objective import Objective
from gpt2ft.stream import TokenStream

Item = TypeVar("Item")


@dataclass(frozen=True)
class LossSums:
    """Sums over supervised targets: the tokens of every assistant turn and its `<|end|>`, each counted once."""

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
    bytes_of = torch.tensor(byte_lengths, dtype=torch.float64, device=accelerator.device)
    num_sources = len(plan.chunks.stores)

    def stream_sums(log_probs: Tensor, stream: TokenStream) -> Tensor:
        real = slice(stream.num_supervised)  # without the tail
        columns = [-log_probs[real].double(), torch.ones_like(log_probs[real], dtype=torch.float64)]
        columns.append(bytes_of[stream.targets[real]])
        by_source = torch.zeros(num_sources, 3, dtype=torch.float64, device=log_probs.device)  # nats, tokens, bytes
        return by_source.index_add_(0, stream.groups[real], torch.stack(columns, dim=1))

    totals = _sum_over_plan(model, plan, stream_sums, accelerator, was_signalled)
    return [LossSums(nats, round(tokens), round(bytes)) for nats, tokens, bytes in totals.tolist()]


def evaluate_objective(
    model: nn.Module,
    plan: Plan,
    objective: Objective,
    accelerator: Any,
    was_signalled: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Return the mean loss and metrics of an objective over the whole plan. Arguments and errors as above."""

    def stream_sums(log_probs: Tensor, stream: TokenStream) -> Tensor:
        loss = torch.stack([objective.loss(log_probs, stream).double()])
        normalizer = torch.full_like(loss, objective.normalizer(stream))
        return torch.cat([loss, objective.metrics(log_probs, stream), normalizer])

    *totals, normalizer = _sum_over_plan(model, plan, stream_sums, accelerator, was_signalled).tolist()
    return {name: value / normalizer for name, value in zip(("loss", *objective.metric_names), totals, strict=True)}


def _sum_over_plan(
    model: nn.Module,
    plan: Plan,
    stream_sums: Callable[[Tensor, TokenStream], Tensor],
    accelerator: Any,
    was_signalled: Callable[[], bool] | None,
) -> Tensor:
    """Add up `stream_sums(log_probs [S], stream)` over all streams of a plan and all processes."""
    was_training = model.training
    model.eval()
    total = None
    with torch.no_grad():
        streams = items_of_rank(plan.streams, accelerator.process_index, accelerator.num_processes)
        for number, micro_batch in enumerate(streams):
            watchdog.mark_progress("held-out stream", number)
            if was_signalled is not None and any(global_sum(accelerator, float(was_signalled()))):
                model.train(was_training)
                raise EvaluationInterrupted
            stream = plan.stream(micro_batch or []).to(accelerator.device)
            sums = stream_sums(model(stream), stream)
            total = sums if total is None else total + sums
    model.train(was_training)
    return accelerator.reduce(total, reduction="sum") if accelerator.num_processes > 1 else total


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
