"""Apple's GPUs, which nobody has here: tensors without content that say they are on one, and no float64 among them."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gpt2ft import device
from gpt2ft.device import DeviceError, choose_precision, device_type
from gpt2ft.distributed.accelerator import as_sums, device_of_sums, loss_scale, on_device
from gpt2ft.model.attention import choose_backend
from gpt2ft.objectives.dpo import DPO
from gpt2ft.objectives.sft import SFT
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.training.memory_probe import DoesNotFit, explain_out_of_memory
from gpt2ft.training.metric_sums import MetricSums

MPS = torch.device("mps:0")
APPLE = SimpleNamespace(device=MPS, num_processes=1, gradient_accumulation_steps=2)


class StandIn(FakeTensorMode):
    """Tensors without content, of any device; float64 is refused where Apple's GPUs refuse it."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = super().__torch_dispatch__(function, types, arguments, keywords)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"{function} gives float64")
        return result


@pytest.fixture
def stand_in():
    with torch.no_grad(), StandIn() as mode:
        yield mode


@pytest.fixture
def mac(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.fixture
def built(make_plan):
    return make_plan().training_stream(0, 0)


def test_the_stand_in_refuses_float64(stand_in):
    numbers = torch.zeros(3, device=MPS)
    with pytest.raises(TypeError, match="float64"):
        numbers.double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64).to(MPS)


@pytest.mark.parametrize("objective", [SFT(), *(DPO(PreferenceSettings(loss=loss)) for loss in ("sigmoid", "simpo"))])
def test_losses_and_sums_of_a_step_take_no_float64_there(objective, built, stand_in):
    stream = built._map(stand_in.from_tensor, stand_in.from_tensor).to(MPS)
    assert (stream.tokens.device.type, stream.pairs.reference.device.type) == ("mps", "cpu")
    log_probs = torch.zeros(len(stream.targets), device=MPS)
    loss = objective.loss(log_probs, stream)
    assert (loss.device.type, loss.dtype) == ("mps", torch.float32)
    counts = on_device(APPLE, 1.0, 2.0)
    scaled = loss * loss_scale(APPLE, counts[0])
    assert (scaled.device.type, scaled.dtype) == ("mps", torch.float32)
    sums = as_sums(APPLE, loss.detach().reshape(1), objective.metrics(log_probs, stream))
    assert (len(sums), sums.device.type, sums.dtype) == (1 + len(objective.metric_names), "cpu", torch.float64)
    MetricSums(device_of_sums(APPLE), objective.metric_names, {}).add(sums, counts, 1.0)


def test_pairs_on_another_device_than_the_log_probs_take_the_gradient_back(make_plan):
    """A step for which the stand-in has no autograd: the transfer there and back, here within the CPU."""
    stream = make_plan().training_stream(0, 0)
    log_probs = torch.zeros(len(stream.targets), requires_grad=True)
    stream.pairs.reference.zero_()
    DPO(PreferenceSettings()).loss(log_probs, stream).backward()
    assert log_probs.grad.dtype == torch.float32
    assert log_probs.grad.abs().sum() > 0


def test_it_is_used_by_one_process_unless_the_cpu_was_asked_for(mac, monkeypatch):
    assert device_type() == "mps"
    assert choose_precision("auto") == choose_precision("fp32") == "fp32"
    assert choose_backend("auto", MPS, "model.attention") == "segments"
    for asked in ("bf16", "fp16"):
        with pytest.raises(DeviceError, match=f"must be fp32, but is {asked}"):
            choose_precision(asked)
    assert device.hardware()["device"].startswith("Apple GPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device_type() == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_type() == "cpu"
    assert choose_precision("bf16") == "bf16"


def test_chat_loads_its_model_there(mac, monkeypatch):
    from gpt2ft.model.gpt2 import GPT2
    from gpt2ft.runs.inference_model import load_inference_model
    from gpt2ft.settings.using import ChatSettings

    asked = []
    monkeypatch.setattr(GPT2, "to", lambda gpt2, *to: asked.append(to) or gpt2)
    load_inference_model(ChatSettings(model="quickstart"), seed=0)
    assert asked == [("mps", torch.float32)]


@pytest.mark.parametrize(
    "said",
    [
        "MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB).",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
    ],
)
def test_memory_that_is_out_has_an_answer_without_a_class_of_its_own(said):
    with pytest.raises(DoesNotFit, match="try less"), explain_out_of_memory("try less"):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory("try less"):
        raise RuntimeError("shape mismatch")
