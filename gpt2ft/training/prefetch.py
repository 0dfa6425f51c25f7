"""Streams built ahead: the next ones in a thread, while the device computes these."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from gpt2ft.distributed.accelerator import count_as_done
from gpt2ft.objectives.objective import Objective
from gpt2ft.stream import TokenStream

Item = TypeVar("Item")
Known = TypeVar("Known")
Streams = list[TokenStream]


class BatchSource(Protocol):
    """Training data as the loop sees them: streams by step and micro-batch, whatever the number of processes."""

    micro_batches_per_step: int

    def ends_epoch(self, step: int) -> bool:
        """Return True if an epoch has ended within the last of `step` steps."""

    def position(self, steps: int) -> dict[str, float | str]:
        """Return how far the first `steps` steps go in the data, and a digest of all that they train on."""

    def training_stream(self, step: int, number: int) -> TokenStream:
        """Return micro-batch `number` of a step, on the CPU; the empty ones are its last. Called from a thread."""


def step_streams(
    accelerator: Any, objective: Objective, batches: BatchSource, steps: range
) -> Iterator[tuple[int, tuple[float, int], list[tuple[int, TokenStream]]]]:
    """Yield (step, (normalizer, tokens), [(micro-batch number, stream on the device), ...]) of this process.

    Rank r of R takes the micro-batches r, r + R, r + 2R ... of each step: the same steps on any number of processes.
    Those that are empty on all of them are left out.
    """
    rank = accelerator.process_index
    numbers = range(rank, batches.micro_batches_per_step, accelerator.num_processes)

    def build(step: int) -> tuple[tuple[int, tuple[float, int]], Streams]:
        streams = []
        for number in numbers:
            stream = batches.training_stream(step, number)
            # The first process has the first number of R: if that is empty, so are those of the others.
            if streams and not stream.num_tokens and not batches.training_stream(step, number - rank).num_tokens:
                break
            streams.append(stream)
        normalizer = sum(map(objective.normalizer, streams))
        tokens = sum(stream.num_tokens - stream.num_repeated for stream in streams)
        return (step, (normalizer, tokens)), streams

    for (step, counts), streams in build_ahead(build, steps, accelerator.device):
        count_as_done(accelerator, len(numbers) - len(streams))
        yield step, counts, list(zip(numbers, streams, strict=False))


def build_ahead(
    build: Callable[[Item], tuple[Known, Streams]], items: Iterable[Item], device: torch.device
) -> Iterator[tuple[Known, Streams]]:
    """Yield what is built of each item, its streams copied to the device.

    Args:
        build: returns what the CPU knows of the item's streams, and the streams. What is known travels beside them:
            to read it from the device would be to wait for it. Called from a thread, one item ahead.
    """
    is_cuda = device.type == "cuda"

    def prepare(item: Item) -> tuple[Known, Streams]:
        known, streams = build(item)
        return known, [stream.pin_memory() if is_cuda else stream for stream in streams]  # copies then do not block

    def copied(future: Future[tuple[Known, Streams]]) -> tuple[Known, Streams]:
        known, streams = future.result()
        return known, [stream.to(device, non_blocking=True) for stream in streams]

    with ThreadPoolExecutor(1, thread_name_prefix="streams") as builder:
        pending = None
        for item in items:
            following = builder.submit(prepare, item)
            if pending is not None:
                yield copied(pending)
            pending = following
        if pending is not None:
            yield copied(pending)
