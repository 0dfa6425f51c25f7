"""Held-out loss as sums and counts, so that it depends neither on batch size nor on the number of processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpt2ft.data.plan import Plan
from gpt2ft.training.distributed import global_sum


@dataclass(frozen=True)
class Score:
    """Sums over supervised targets: every assistant token and its `<|end|>`, each counted once."""

    nats: float
    tokens: int
    bytes: int  # UTF-8 bytes of the targets' text; control tokens have none

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def figures(self) -> dict[str, float]:
        return {
            "loss": self.nats_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


class EvaluationCut(Exception):
    """A process was told to stop, so there is no score. All processes raise it together."""


def evaluate(
    model: nn.Module,
    plan: Plan,
    byte_lengths: Sequence[int],
    accelerator: Any,
    told_to_stop: Callable[[], bool] | None = None,
) -> list[Score]:
    """The score of each data source of the plan.

    Args:
        model: TargetLogProbs, prepared by the accelerator.
        byte_lengths: UTF-8 bytes of each id.
        told_to_stop: asked before each stream, of all processes together.

    Raises:
        EvaluationCut: if any process was told to stop meanwhile.
    """
    was_training = model.training
    model.eval()
    device = accelerator.device
    num_sources = len(plan.pieces.stores)
    bytes_of = torch.tensor(byte_lengths, dtype=torch.float64, device=device)
    sums = torch.zeros(num_sources, 3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    with torch.no_grad():
        for micro_batch in _share(plan, accelerator.process_index, accelerator.num_processes):
            if told_to_stop is not None and any(global_sum(accelerator, float(told_to_stop()))):
                model.train(was_training)
                raise EvaluationCut
            stream = plan.stream(micro_batch).to(device)
            log_probs = model(stream)
            real = slice(stream.num_supervised)
            columns = [-log_probs[real].double(), torch.ones_like(log_probs[real], dtype=torch.float64)]
            columns.append(bytes_of[stream.targets[real]])
            sums.index_add_(0, stream.groups[real], torch.stack(columns, dim=1))
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    model.train(was_training)
    return [Score(nats, round(tokens), round(bytes)) for nats, tokens, bytes in sums.tolist()]


def total(scores: Sequence[Score]) -> Score:
    return Score(sum(s.nats for s in scores), sum(s.tokens for s in scores), sum(s.bytes for s in scores))


def _share(plan: Plan, rank: int, num_processes: int) -> Iterator[list[int]]:
    """This process's streams; the same number for every process, the missing ones empty."""
    rounds = -(-len(plan.streams) // num_processes)
    for turn in range(rounds):
        index = turn * num_processes + rank
        yield plan.streams[index] if index < len(plan.streams) else []
