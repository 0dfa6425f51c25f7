"""The memory probe leaves no trace, and what does not fit is refused with a way out."""

import math
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from gpt2ft.data.packing import build_stream
from gpt2ft.data.token_tree import weigh
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.resume import streams_to_probe
from gpt2ft.settings.training import OptimizerSettings, TrainingSettings
from gpt2ft.training.memory_probe import DoesNotFit, explain_out_of_memory, memory_advice, peak_memory, probe_memory
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.preflight import PreflightError
from gpt2ft.training.strategy import DDP

VOCABULARY = 4096
CHECKPOINTING = "--training.activation_checkpointing"


@pytest.fixture
def stream(make_tree):
    tree = weigh(make_tree(("user", 5, -1), ("assistant", 7, 0), ("assistant", 9, 0)), "once")
    return build_stream([tree], 64, 64)


@pytest.fixture
def strategy(tiny_gpt2, accelerator):
    model = TargetLogProbs(tiny_gpt2(VOCABULARY, 64), VOCABULARY, "segments")
    return DDP(accelerator, model, adamw(model.gpt2, OptimizerSettings(weight_decay=0.1), False), 1.0)


def test_it_leaves_no_trace(strategy, stream, accelerator):
    before = {name: parameter.clone() for name, parameter in strategy.model.named_parameters()}
    peak = probe_memory(strategy, accelerator, stream)
    strategy.load_moments(None, 0)
    assert peak > 2**20
    assert all(torch.equal(parameter, before[name]) for name, parameter in strategy.model.named_parameters())
    assert all(parameter.grad is None for parameter in strategy.model.parameters())
    assert not any(tensor.any() for moments in strategy.moments().values() for tensor in moments.values())
    assert not strategy.optimizer.state


def test_a_broken_model_is_refused(strategy, stream, accelerator):
    with torch.no_grad():
        strategy.gpt2.ln_f.weight[0] = math.nan
    with pytest.raises(PreflightError, match="not finite"):
        probe_memory(strategy, accelerator, stream)


def test_what_does_not_fit_is_said_with_a_way_out(strategy, stream, accelerator, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")

    monkeypatch.setattr(strategy.model.gpt2, "forward", full)
    with pytest.raises(DoesNotFit) as error, explain_out_of_memory("try less"):
        probe_memory(strategy, accelerator, stream)
    assert all(fact in str(error.value) for fact in ("CUDA out of memory", "2.00 GiB", "try less"))
    assert "And more" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "uses_lora", "is_sharded", "expected"),
    [
        (4096, False, False, False, {"2048", "16", CHECKPOINTING, "--lora.rank", "fsdp2.yaml"}),
        (4096, True, True, True, {"2048", "16"}),
        (2046, False, False, True, {CHECKPOINTING, "--lora.rank"}),  # half of it holds no conversation of 1024
        (2176, False, False, True, {CHECKPOINTING, "--lora.rank"}),  # half of it is no multiple of 128
        (1024, False, True, True, {CHECKPOINTING}),
        (1024, True, True, False, {"fsdp2.yaml"}),
        (1024, True, True, True, {"smaller model"}),
    ],
)
def test_the_way_out_keeps_the_step_if_it_can(tokens, checkpointing, uses_lora, is_sharded, expected):
    training = TrainingSettings(
        tokens_per_micro_batch=tokens, micro_batches_per_step=8, activation_checkpointing=checkpointing
    )
    advice = memory_advice(training, 1024, uses_lora, is_sharded)
    known = {"2048", "1023", "16", CHECKPOINTING, "--lora.rank", "fsdp2.yaml", "smaller model"}
    assert {fact for fact in known if fact in advice.replace("--lora.rank 16", "--lora.rank")} == expected
    assert ("--training.tokens_per_micro_batch" in advice) == ("--training.micro_batches_per_step" in advice)


def test_peak_memory_is_that_of_the_process_on_every_system(monkeypatch):
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    held = b"x" * 2**27
    assert peak_memory(cpu) >= max(before, len(held))
    assert peak_memory(cpu) < psutil.virtual_memory().total
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7)))
    assert peak_memory(cpu) == 7


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cpu", "no", [0]),
        ("cpu", "bf16", [7, 6, 5, 4, 3, 2, 1, 0]),
        ("cpu", "fp16", [7, 6, 5, 4, 3, 2, 1, 0]),
        ("cuda", "bf16", [0, 0]),
        ("mps", "no", [0]),
    ],
)
def test_the_largest_stream_comes_last(device, precision, expected):
    assert streams_to_probe(SimpleNamespace(streams=[*range(20)]), device, precision) == expected
    assert streams_to_probe(SimpleNamespace(streams=[0]), device, precision)[-1] == 0
