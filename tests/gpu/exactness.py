"""What the GPU computes against float64, and how often the host waits for it."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from host_waits import counted_waits
from sizes import Sizes
from torch import Tensor

from gpt2ft.benchmark.training import Training
from gpt2ft.benchmark.work import MadeUp, make_work
from gpt2ft.distributed.accelerator import start_accelerator
from gpt2ft.inference.decoder import Decoder
from gpt2ft.inference.generate import generate
from gpt2ft.inference.sampling import GREEDY
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.stream import TokenStream
from gpt2ft.training.fit import fit

# Measured on a CPU with gpt2's shape: see the tests. TF32 in place of float32 would give 5e-4.
MOST_APART = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
MOST_LOST = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # nats, of a token that is not the likeliest by float64


def log_probs(device: torch.device, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """Log-probs of targets and all gradients, by each attention and in each precision, against float64.

    The reference has dense attention and the whole softmax. What is told are relative distances: of the log-probs, of
    the embeddings' gradient, to which the head gives most, and of the parameter whose gradient is furthest away.
    """
    gpt2, stream = lively_gpt2(sizes, device), made_up_stream(sizes).to(device)
    weights = torch.rand(stream.num_supervised, generator=torch.Generator().manual_seed(1)).to(device)
    expected, of_reference = in_float64(gpt2, stream, weights, sizes.num_ids)
    found = {}
    for dtype in MOST_APART:
        for backend in ["flex"] * (device.type == "cuda") + ["segments", "dense"]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                ours = TargetLogProbs(gpt2, sizes.num_ids, backend)(stream)[: stream.num_supervised]
            gradients = torch.autograd.grad((weights * ours).sum(), list(gpt2.parameters()))
            names = [name for name, _ in gpt2.named_parameters()]
            apart = dict(zip(names, map(distance, gradients, of_reference), strict=True))
            worst = max(apart, key=apart.get)
            figures = {"log_probs": distance(ours, expected), "embeddings": apart["wte.weight"], "worst": apart[worst]}
            yield {"attention": backend, "dtype": str(dtype), "worst_parameter": worst} | figures
            found[backend, dtype] = max(figures.values())
    assert all(value <= MOST_APART[dtype] for (_, dtype), value in found.items()), found


def in_float64(gpt2: GPT2, stream: TokenStream, weights: Tensor, num_ids: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the log-probs and the gradients of all parameters, by dense attention and the whole softmax."""
    gpt2, scored = deepcopy(gpt2).double(), slice(stream.num_supervised)
    hidden = gpt2(stream.tokens, stream.positions, dense_attention(stream.horizons))[stream.supervised[scored]]
    whole = gpt2.logits(hidden)[:, :num_ids].log_softmax(-1)
    found = whole.gather(-1, stream.targets[scored, None])[:, 0]
    return found.detach(), torch.autograd.grad((weights * found).sum(), list(gpt2.parameters()))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@torch.inference_mode()
def greedy_decoding(device: torch.device, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """Tokens that are decoded together, with the cache: by float64 each must be the likeliest, or nearly so."""
    gpt2, lost = lively_gpt2(sizes, device).eval(), {}
    suppressed = torch.arange(sizes.config.vocab_size) >= sizes.num_ids
    random = np.random.default_rng(0)
    prompts = [random.integers(0, sizes.num_ids, length).tolist() for length in (1, 2, 7, 30, 31, 64, 127, 200)]
    reference = deepcopy(gpt2).double()
    for dtype in MOST_LOST:
        decoder = Decoder(deepcopy(gpt2).to(dtype), [], suppressed, 4)  # half of them wait for a slot
        done = generate(decoder, prompts, 16)
        replies = [reply.ids for reply in done]
        assert all(len(ids) == 16 for ids in replies)
        assert len({id for ids in replies for id in ids}) > 5
        lost[dtype] = max(nats_lost(reference, *pair, sizes.num_ids) for pair in zip(prompts, replies, strict=True))
        yield {"dtype": str(dtype), "nats_lost": lost[dtype]}
    assert all(value <= MOST_LOST[dtype] for dtype, value in lost.items()), lost


def nats_lost(reference: GPT2, prompt: list[int], reply: list[int], num_ids: int) -> float:
    """Return by how much at most a token of a reply is less likely than the likeliest in its place."""
    ids = torch.tensor(prompt + reply, device=reference.wte.weight.device)
    attend = dense_attention(torch.full_like(ids, len(ids)))
    hidden = reference(ids, torch.arange(len(ids), device=ids.device), attend)[len(prompt) - 1 : -1]
    logits = reference.logits(hidden)[:, :num_ids]
    return float((logits.amax(-1) - logits.gather(-1, ids[len(prompt) :, None])[:, 0]).max())


def host_waits(device: torch.device, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """The host waits once a step: for the norm of the gradient, without which no optimizer may step, or for new ids."""
    found = {}
    for what in ("sft", "dpo"):
        training = training_of(sizes, what)
        training.step()  # compiles
        waits = []
        for steps in (3, 6):  # the last step of either also logs
            with counted_waits(device) as caught:
                fit(replace(training.inputs, steps=training.state.step + steps), training.state)
            waits.append(caught)
        found[what] = (len(waits[1]) - len(waits[0])) / 3
        yield {"what": what, "waits_per_step": found[what], "waits": sorted(set(waits[1]))}
    waits = waits_of_decoding(device, sizes)
    found["generate"] = len(waits) / 6
    yield {"what": "generate", "waits_per_step": found["generate"], "waits": sorted(set(waits))}
    assert found == {"sft": 1, "dpo": 1, "generate": 1}, found


def waits_of_decoding(device: torch.device, sizes: Sizes) -> list[str]:
    """Return the waits of six steps: of three sequences, of two with a slot between them, and with a longer prompt."""
    gpt2, suppressed = lively_gpt2(sizes, device).eval(), torch.arange(sizes.config.vocab_size) >= sizes.num_ids
    decoder = Decoder(gpt2, [0, 1], suppressed, 4)
    usual = {"temperature": 0.9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    for settings in ({"temperature": 0}, usual, {"temperature": 1.1, "top_k": 20}):
        decoder.join([5, 6, 7], SamplingSettings(**settings, seed=1), 100, stop_ids=[])
    decoder.step()
    with counted_waits(device, copies=True) as waits:
        for number in range(6):
            if number == 2:
                decoder.leave(1)
            if number == 4:
                assert decoder.join([5, 6, 8, 9, 10], GREEDY, 100) == 1
            assert len(decoder.step()) == (2 if number in (2, 3) else 3)
    return waits


def training_of(sizes: Sizes, what: str) -> Training:
    """Return the benchmark's loop on the model of these sizes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = BenchmarkSettings(what=what, **sizes.benchmark)
    accelerator = start_accelerator(settings.precision, settings.micro_batches)
    return Training(settings, sizes.config, accelerator, with_small_ids(make_work(settings, 1), sizes.num_ids))


def lively_gpt2(sizes: Sizes, device: torch.device) -> GPT2:
    """Return a model whose attention is uneven, so that an error in it shows, on the device; the same everywhere."""
    gpt2, random = GPT2(sizes.config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else sizes.config.n_embd**-0.5
            parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, scale, generator=random)
    return gpt2.to(device)


def made_up_stream(sizes: Sizes) -> TokenStream:
    settings = BenchmarkSettings(tokens_per_micro_batch=sizes.tokens, micro_batches=1)
    return with_small_ids(MadeUp(settings, 1), sizes.num_ids).training_stream(0, 0)


def with_small_ids(work: Any, num_ids: int) -> Any:
    """Have a benchmark's streams hold no more than so many ids: small models know no others."""
    build = work.training_stream

    def training_stream(step: int, number: int) -> TokenStream:
        stream = build(step, number)
        return replace(stream, tokens=stream.tokens % num_ids, targets=stream.targets % num_ids)

    work.training_stream = training_stream
    return work
