"""The largest stream, once before training: what it leaves behind, and what is said if it does not fit."""

import math

import pytest
import torch

from gpt2ft.data.packing import build_stream
from gpt2ft.data.token_tree import weigh
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.sections import OptimizerSettings, TrainingSettings
from gpt2ft.training.memory_probe import DoesNotFit, explain_out_of_memory, memory_advice, probe_memory
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.preflight import PreflightError
from gpt2ft.training.strategy import DDP

VOCABULARY = 4096


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
    assert str(error.value) == (
        "a step does not fit into memory (CUDA out of memory. Tried to allocate 2.00 GiB): try less"
    )


@pytest.mark.parametrize(
    ("tokens", "longest", "activation_checkpointing", "adapts", "shards", "expected"),
    [
        (
            4096, 1024, False, False, False,
            "try --training.tokens_per_micro_batch 2048 --training.micro_batches_per_step 16 (a step keeps its size), "
            "or --training.activation_checkpointing, or --lora.rank 16, or several GPUs with "
            "accelerate_configs/fsdp2.yaml",
        ),
        (1024, 1024, False, True, True, "try --training.activation_checkpointing"),
        (1024, 1024, True, True, True, "take a smaller model, or a GPU with more memory"),
    ],
)  # fmt: skip
def test_the_way_out_keeps_the_step_if_it_can(tokens, longest, activation_checkpointing, adapts, shards, expected):
    training = TrainingSettings(
        tokens_per_micro_batch=tokens, micro_batches_per_step=8, activation_checkpointing=activation_checkpointing
    )
    assert memory_advice(training, longest, adapts, shards) == expected
