"""What a run is said to need before it starts."""

import re

import pytest

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.plan import Plan
from gpt2ft.model.lora import apply_lora
from gpt2ft.runs.describe import Hardware, describe_steps, memory_estimate, shares
from gpt2ft.settings.sections import LoRASettings
from gpt2ft.settings.training import DataSettings


def estimate(gpt2, strategy="ddp", processes=4, precision="fp32", activation_checkpointing=True):
    return memory_estimate(gpt2, 128, Hardware(processes, "cuda", strategy, precision, activation_checkpointing))


def test_shards_divide_what_the_strategy_shards(tiny_gpt2):
    gpt2 = tiny_gpt2(512, 128)
    size = sum(parameter.numel() for parameter in gpt2.parameters())
    ddp = estimate(gpt2, processes=1)
    assert estimate(gpt2) - ddp == pytest.approx(size * 4)  # buckets
    assert ddp - estimate(gpt2, "fsdp2") == pytest.approx(size * 16 * 3 / 4)
    assert ddp - estimate(gpt2, "zero2") == pytest.approx(size * (12 - 16 / 4))
    assert ddp - estimate(gpt2, "zero3") == pytest.approx(size * (16 - 20 / 4))
    assert estimate(gpt2, "zero3", activation_checkpointing=False) - estimate(
        gpt2, processes=1, activation_checkpointing=False
    ) == pytest.approx(size * (4 - (16 - 20 / 4)))


def test_deepspeed_holds_frozen_weights_in_float32(tiny_gpt2, one_generator):
    gpt2 = tiny_gpt2(512, 128)
    apply_lora(gpt2, LoRASettings(rank=4, alpha=8.0), [1, 2], one_generator)
    frozen = sum(parameter.numel() for parameter in gpt2.parameters() if not parameter.requires_grad)
    trained = sum(parameter.numel() for parameter in gpt2.parameters() if parameter.requires_grad)
    more = estimate(gpt2, "zero2", processes=1, precision="bf16") - estimate(gpt2, processes=1, precision="bf16")
    assert more == pytest.approx(2 * frozen + 4 * trained)


@pytest.fixture
def one_generator():
    import torch

    return torch.Generator().manual_seed(0)


def test_devices_are_named():
    assert str(Hardware(2, "cpu", "ddp", "fp32", False)) == "2 x cpu, fp32"
    assert str(Hardware(8, "cuda", "fsdp2", "bf16", False)) == "8 x cuda, FSDP2, bf16"


def test_one_of_a_thing_is_not_called_many(tokenizer, cache, tmp_path):
    """A single conversation gives one stream and, in one epoch, one step."""
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "What is tea?", "completion": "A drink."}\n')
    corpus, _ = load_corpora(DataSettings(train=(str(file),), cache=str(cache)), tokenizer)
    plan = Plan(chunk(corpus.stores, corpus.rows, ConversationTrees("once", 128, 128)), 128, 1, seed=0, epochs=1)
    said = f"{describe_steps(plan, plan.steps, 1e-3)}; {shares(corpus, plan)[0]}"
    assert said.startswith("1 step of 1 x 128 tokens, 1 to an epoch, 1 epoch, learning rate 0.001;")
    assert "1 of 1 conversation," in said
    assert not re.search(r"\b1 \w+s\b", said)
