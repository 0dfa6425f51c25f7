"""fp16: the loop makes the updates that torch's own scaler makes, and knows an overflow from a run that diverges."""

import math
from dataclasses import replace

import pytest
import torch
from small_loop import MICRO_BATCHES, STEPS, VOCABULARY, NaNFrom

from gpt2ft.checkpoint import TrainState
from gpt2ft.distributed.accelerator import LaunchError, load_scaler, start_accelerator
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.sft import SFT
from gpt2ft.training.fit import TrainingDiverged, fit
from gpt2ft.training.optimizer import adamw, learning_rate, set_learning_rate

MAX_GRAD_NORM = 0.5  # of `make_run`


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def accumulating_accelerator(request, one_thread, monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    if request.param == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return start_accelerator("fp16", MICRO_BATCHES)


class Scaled(SFT):
    """A loss that is so many times as large."""

    def __init__(self, factor):
        self.factor = factor

    def loss(self, log_probs, stream):
        return self.factor * super().loss(log_probs, stream)


def by_torch_alone(inputs, gpt2):
    """Return the model after the same steps by torch.amp, the norms of their gradients, and the scaler."""
    device = inputs.accelerator.device
    model = TargetLogProbs(gpt2, VOCABULARY, "segments").to(device)
    optimizer, norms = adamw(gpt2, inputs.optimization, fused=False), []
    scaler = torch.amp.GradScaler(device.type)
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate(step, STEPS, inputs.optimization))
        streams = [inputs.batches.training_stream(step, number) for number in range(MICRO_BATCHES)]
        normalizer = sum(map(inputs.objective.normalizer, streams))
        for stream in (stream.to(device) for stream in streams):
            with torch.autocast(device.type, torch.float16):
                log_probs = model(stream)
            loss = inputs.objective.loss(log_probs, stream) * torch.tensor(MICRO_BATCHES / normalizer)
            scaler.scale(loss / MICRO_BATCHES).backward()
        scaler.unscale_(optimizer)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return gpt2, norms, scaler.state_dict()


@pytest.mark.parametrize(("factor", "overflows"), [(0.02, 0), (1.0, 3)])
def test_the_run_is_that_of_torchs_own_scaler(factor, overflows, make_run, tiny_gpt2):
    inputs, diary = make_run(Scaled(factor), max_skipped_steps=1)
    inputs.strategy.model.to(inputs.accelerator.device)
    expected, norms, scaler = by_torch_alone(inputs, tiny_gpt2(VOCABULARY, 64))
    state = fit(inputs, TrainState())
    found = dict(inputs.strategy.gpt2.named_parameters())
    rounding = 0.0 if inputs.accelerator.device.type == "cpu" else 1e-4
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(parameter, found[name], rtol=0, atol=rounding)
    assert state.scaler == {"loss_scale": scaler["scale"], "steps_at_loss_scale": scaler["_growth_tracker"]}
    assert sum(not math.isfinite(norm) for norm in norms) == overflows, norms
    assert (state.updates, state.skipped_in_a_row) == (STEPS - overflows, 0)
    assert scaler["scale"] == 65536 / 2**overflows
    for step, norm in enumerate(norms, start=1):
        if math.isfinite(norm):
            assert diary.metrics[step]["train/grad_norm"] == norm
    assert overflows == 0 or norms[-1] > MAX_GRAD_NORM  # it was clipped
    assert diary.metrics[STEPS]["train/loss_scale"] == scaler["scale"]
    assert diary.metrics[STEPS]["train/skipped_steps"] == overflows


def test_what_no_scale_mends_ends_the_run(make_run):
    inputs, _ = make_run(NaNFrom(range(STEPS * MICRO_BATCHES)), max_skipped_steps=2)
    inputs.strategy.model.to(inputs.accelerator.device)
    inputs.accelerator.scaler.scale(torch.zeros(()).to(inputs.accelerator.device))  # as the probe does
    state = TrainState(scaler={"loss_scale": 2.0, "steps_at_loss_scale": 7.0})
    load_scaler(inputs.accelerator, state.scaler)
    with pytest.raises(TrainingDiverged, match="2 steps in a row, the last was step 2"):
        fit(inputs, state)


@pytest.mark.parametrize(
    ("before", "after", "counted"),
    [(65536, 32768, 0), (2, 1, 0), (1, 0.5, 1), (4, 4, 1), (None, 32768, 0), (None, None, 1)],
)
def test_an_overflow_is_the_scalers_business_as_long_as_it_can_mend_it(before, after, counted):
    """Where the scale has not fallen, each gradient was finite and their norm alone was not."""
    scalers = [
        {} if scale is None else {"loss_scale": float(scale), "steps_at_loss_scale": 0.0} for scale in (before, after)
    ]
    state = TrainState(step=1, skipped_in_a_row=1, scaler=scalers[0]).after_step(False, scalers[1])
    assert (state.step, state.updates, state.skipped_in_a_row) == (2, 0, 1 + counted)
    assert state.scaler == scalers[1]
    assert TrainState.from_json(replace(state, skipped_in_a_row=0).__dict__) == replace(state, skipped_in_a_row=0)


@pytest.mark.parametrize(
    "scaler", [{"loss_scale": 2.0}, {"loss_scale": 0.0, "steps_at_loss_scale": 1.0}, {"loss_scale": "2"}, 3]
)
def test_a_scaler_that_is_none_is_refused(scaler):
    with pytest.raises(ValueError, match=r"`state.scaler`"):
        TrainState.from_json(TrainState().__dict__ | {"scaler": scaler})


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_is_refused_and_auto_takes_fp32_there(stage, monkeypatch):
    from gpt2ft.distributed import accelerator

    with pytest.raises(LaunchError, match="DeepSpeed cannot train in fp16"):
        accelerator._accelerator(f"zero{stage}", "fp16", 1)
    monkeypatch.setattr(accelerator, "choose_precision", lambda asked, without_bf16: f"{asked} {without_bf16}")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert accelerator._precision("auto", f"zero{stage}") == "auto fp32"
    assert accelerator._precision("auto", "fsdp2") == "auto fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert accelerator._precision("auto", "ddp") == "fp16 fp16"
    assert accelerator._precision("bf16", "ddp") == "bf16 fp16"
