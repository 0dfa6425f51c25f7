"""Training speed of a shape on this machine: tokens/s, peak memory, and where the time goes.

Conversations are made up (random tokens, trees in the proportions of OASST), so nothing is downloaded, and
neither `datasets` nor a tokenizer is needed. Of DPO a step is measured, not the reference pass: the reference is made
up too.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from gpt2ft.data.packing import build_pairs, build_stream, number_replies, pack
from gpt2ft.data.token_tree import ASSISTANT, TokenTree, counts, is_supervised, split
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import global_sum, loss_scale, on_device, precision_of, start_accelerator
from gpt2ft.model.attention import choose_backend
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import apply_lora
from gpt2ft.model.pretrained import published_config
from gpt2ft.objectives.dpo import DPO
from gpt2ft.objectives.sft import SFT
from gpt2ft.random import generator, seed_for
from gpt2ft.runs.describe import parameter_counts
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.sections import OptimizerSettings, PreferenceSettings
from gpt2ft.stream import TokenStream
from gpt2ft.text.display import fit
from gpt2ft.training.memory_probe import peak_memory
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.strategy import cast_frozen, prepare

VOCABULARY = 50261  # GPT-2's tokens and the chat tokens
ROWS = 50304
PHASES = ("stream", "forward", "backward", "optimizer")


@watchdog.announce_end()
def run(settings: BenchmarkSettings) -> None:
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = start_accelerator(settings.precision, settings.micro_batches * num_processes)
    device = accelerator.device
    backend = choose_backend(settings.attention, device, "attention")
    random = torch.Generator().manual_seed(seed_for(settings.seed, "weights"))
    gpt2 = GPT2(replace(published_config(settings.model), vocab_size=ROWS)).initialize(random)
    if settings.lora.rank:
        apply_lora(gpt2, settings.lora, range(VOCABULARY - 4, VOCABULARY), random)
        cast_frozen(accelerator, gpt2)
    gpt2.activation_checkpointing = settings.activation_checkpointing
    gpt2.to(device)
    model = TargetLogProbs(gpt2, VOCABULARY, backend)
    sizes = parameter_counts(gpt2)  # shards have none
    optimizer = adamw(gpt2, OptimizerSettings(), device.type == "cuda", settings.lora.plus_ratio)
    strategy = prepare(accelerator, model, optimizer, max_grad_norm=1.0)
    model = strategy.model
    streams = Streams(settings, accelerator.process_index)
    objective = DPO(PreferenceSettings()) if settings.what == "dpo" else SFT()
    seconds = dict.fromkeys(PHASES, 0.0)
    tokens = 0
    for step in range(settings.steps + 1):
        if step == 1:  # the first compiles and allocates
            seconds, tokens = dict.fromkeys(PHASES, 0.0), 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        watchdog.mark_progress("step", step)
        for _ in range(settings.micro_batches):
            with accelerator.accumulate(model):
                built = timed(seconds, "stream", device, streams.next)
                normalizer = objective.normalizer(built) * settings.micro_batches
                stream = timed(seconds, "stream", device, lambda built=built: built.to(device))
                loss = timed(seconds, "forward", device, lambda s=stream: objective.loss(model(s), s))
                scale = loss_scale(accelerator, on_device(accelerator, normalizer)[0])
                timed(seconds, "backward", device, lambda x=loss * scale: accelerator.backward(x))
                tokens += stream.num_tokens
        timed(seconds, "optimizer", device, strategy.update)
    (tokens,) = global_sum(accelerator, tokens)
    if accelerator.is_main_process:
        print(fit(headline(settings, accelerator, sizes, backend), 2))
        print(figures(settings, accelerator.device, sizes[1], tokens, seconds))


def timed(seconds: dict[str, float], phase: str, device: torch.device, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds[phase] += time.perf_counter() - started
    return result


def headline(settings: BenchmarkSettings, accelerator: Any, sizes: tuple[int, int], backend: str) -> str:
    """Return what is measured: model, processes, precision, attention, size of a step.

    Args:
        sizes: trained and all parameters.
    """
    precision = {"no": "fp32"}.get(precision_of(accelerator), precision_of(accelerator))
    trained, parameters = sizes
    lora = f", {trained:,} of them trained (LoRA, rank {settings.lora.rank})" if settings.lora.rank else ""
    return (
        f"{settings.what}, {settings.model}, {parameters / 1e6:.0f}M parameters{lora}, "
        f"{accelerator.num_processes} x {accelerator.device.type}, {precision}, {backend} attention, "
        f"{settings.micro_batches} x {settings.tokens_per_micro_batch:,} tokens a step"
    )


def figures(
    settings: BenchmarkSettings, device: torch.device, parameters: int, tokens: float, seconds: dict[str, float]
) -> str:
    """Return speed, memory and the time of each phase, a line each."""
    total = sum(seconds.values())
    flops = 6 * parameters * tokens / total
    lines = [
        f"tokens/s       {tokens / total:,.0f}  ({flops / 1e12:.2f} TFLOP/s at 6 x parameters)",
        f"peak memory    {peak_memory(device) / 2**30:.2f} GiB",
    ]
    for phase, spent in seconds.items():
        lines.append(f"{phase:<14} {1000 * spent / settings.steps:,.0f} ms a step, {spent / total:.0%}")
    return "\n".join(lines)


class Streams:
    """An endless supply of full streams, with pairs for DPO."""

    def __init__(self, settings: BenchmarkSettings, rank: int) -> None:
        self.capacity = settings.tokens_per_micro_batch
        self.compares = settings.what == "dpo"
        random = generator(settings.seed, "conversations", rank)
        needed = settings.micro_batches * self.capacity * 3
        trees: list[TokenTree] = []
        while sum(len(tree.tokens) for tree in trees) < needed:
            whole = made_up_tree(random)
            trees += [made_up_group(random)] if self.compares else split(whole, self.capacity)
        sizes = np.array([len(tree.tokens) for tree in trees])
        bins = sorted(pack(sizes, self.capacity, random), key=lambda bin: -sizes[bin].sum())[:-1]
        self.bins = [[trees[i] for i in bin] for bin in bins]
        of_bins = [np.sum([counts(tree) for tree in bin], axis=0) for bin in self.bins]
        _, self.targets, self.replies, self.pairs, _ = np.max(of_bins, axis=0).tolist()
        self.at = 0

    def next(self) -> TokenStream:
        trees = self.bins[self.at % len(self.bins)]
        self.at += 1
        if not self.compares:
            return build_stream(trees, self.capacity, self.targets)
        trees = number_replies(trees)
        lengths = np.concatenate([tree.lengths[tree.weights > 0] - 1 for tree in trees])
        pairs = build_pairs(trees, -np.log(VOCABULARY) * lengths, self.pairs, self.replies)
        return replace(build_stream(trees, self.capacity, self.targets), pairs=pairs)


def made_up_tree(random: np.random.Generator) -> TokenTree:
    """One prompt of about 30 tokens, two or three replies of about 180, most followed up once more."""
    lengths, parents, roles = [int(random.integers(10, 60))], [-1], [1]
    for _ in range(int(random.integers(2, 4))):
        parents.append(0)
        roles.append(2)
        lengths.append(int(random.integers(40, 320)))
        if random.random() < 0.7:
            parents += [len(lengths) - 1, len(lengths)]
            roles += [1, 2]
            lengths += [int(random.integers(10, 60)), int(random.integers(40, 320))]
    return _of_random_tokens(random, lengths, parents, roles)


def made_up_group(random: np.random.Generator) -> TokenTree:
    """One prompt of about 30 tokens and two or three replies of about 180, all compared."""
    replies = int(random.integers(2, 4))
    lengths = [int(random.integers(10, 60)), *random.integers(40, 320, replies).tolist()]
    tree = _of_random_tokens(random, lengths, [-1] + [0] * replies, [1] + [ASSISTANT] * replies)
    pairs = np.array(list(combinations(range(1, replies + 1), 2)), np.int32)
    return replace(
        tree, pairs=pairs, pair_weights=np.ones(len(pairs), np.float32), rankings=np.zeros(len(pairs), np.int32)
    )


def _of_random_tokens(
    random: np.random.Generator, lengths: list[int], parents: list[int], roles: list[int]
) -> TokenTree:
    size = len(lengths)
    return TokenTree(
        tokens=random.integers(0, VOCABULARY, sum(lengths)),
        lengths=np.array(lengths, np.int32),
        parents=np.array(parents, np.int32),
        roles=np.array(roles, np.int8),
        weights=is_supervised(np.array(roles)).astype(np.float32),
        groups=np.zeros(size, np.int32),
        messages=np.arange(size, dtype=np.int32),
    )
