"""The loop's contract: one step is sum / normalizer, positions decide everything, and what is due when, in what order.

One process; the same run on many is in tests/runs/test_strategies.py.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_loop import (
    LENGTHS,
    MICRO_BATCHES,
    STEPS,
    VOCABULARY,
    NaNFrom,
    WithMetrics,
    assert_equal,
    weights,
    without_speed,
)

from gpt2ft.checkpoint import TrainState
from gpt2ft.data.packing import build_stream
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.sft import SFT
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.training.evaluate import EvaluationInterrupted
from gpt2ft.training.fit import TrainingDiverged, fit, is_due
from gpt2ft.training.metric_sums import MetricSums
from gpt2ft.training.optimizer import adamw, learning_rate
from gpt2ft.training.prefetch import step_streams

# --- one step -------------------------------------------------------------------------------------------------------


def test_a_step_is_the_sum_over_its_streams_over_their_normalizers(make_run, tiny_gpt2):
    """Against one backward pass of the mean over all targets of the step."""
    inputs, diary = make_run()
    gpt2 = tiny_gpt2(VOCABULARY, 64)
    model = TargetLogProbs(gpt2, VOCABULARY, "segments")
    optimizer = adamw(gpt2, inputs.optimization, fused=False)
    streams = [inputs.batches.training_stream(0, number) for number in range(MICRO_BATCHES)]
    nats = torch.cat([-(model(stream) * stream.weights)[: stream.num_supervised] for stream in streams])
    assert len(nats) == sum(LENGTHS[:MICRO_BATCHES]) - MICRO_BATCHES
    nats.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(gpt2.parameters(), 0.5)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step()

    fit(replace(inputs, steps=1), TrainState())
    logged = diary.metrics[1]
    assert logged["train/loss"] == pytest.approx(float(nats.detach().mean()), rel=1e-6)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > 0.5  # it was clipped
    assert logged["train/learning_rate"] == 1e-2
    for name, parameter in gpt2.named_parameters():  # Adam divides by the gradient's size: rounding may turn its sign
        difference = (parameter - dict(inputs.strategy.gpt2.named_parameters())[name]).abs()
        assert float(difference.detach().median()) < 1e-7, name


def test_metrics_are_normalized_like_the_loss(make_run):
    inputs, diary = make_run(WithMetrics(), log_every=4)
    fit(inputs, TrainState())
    targets = [LENGTHS[index % len(LENGTHS)] - 1 for index in range(STEPS * MICRO_BATCHES)]
    assert list(diary.metrics) == [4, 6]
    assert [diary.metrics[step]["train/targets"] for step in (4, 6)] == [1.0, 1.0]
    expected = [4 * MICRO_BATCHES / sum(targets[: 4 * MICRO_BATCHES]), 2 * MICRO_BATCHES / sum(targets[12:])]
    assert [diary.metrics[step]["train/streams"] for step in (4, 6)] == pytest.approx(expected)


class SeesLearningRates(SFT):
    def __init__(self):
        self.optimizer, self.seen = None, []

    def loss(self, log_probs, stream):
        self.seen.append([group["lr"] for group in self.optimizer.param_groups])
        return super().loss(log_probs, stream)


def test_the_learning_rate_is_set_before_the_backward_pass(make_run):
    objective = SeesLearningRates()
    inputs, diary = make_run(objective)
    objective.optimizer = inputs.strategy.optimizer
    fit(inputs, TrainState())
    rates = [learning_rate(step, STEPS, inputs.optimization) for step in range(STEPS)]
    assert len(set(rates)) == STEPS
    assert objective.seen == [[rate, rate] for rate in rates for _ in range(MICRO_BATCHES)]
    assert [diary.metrics[step]["train/learning_rate"] for step in range(1, STEPS + 1)] == rates


# --- positions ------------------------------------------------------------------------------------------------------


def test_every_micro_batch_is_asked_for_once_in_order(make_run):
    inputs, diary = make_run()
    state = fit(inputs, TrainState())
    assert inputs.batches.asked == [(step, number) for step in range(STEPS) for number in range(MICRO_BATCHES)]
    assert (state.step, state.updates, diary.advanced) == (STEPS, STEPS, STEPS)


def test_each_rank_has_its_own_micro_batches(make_run):
    inputs, _ = make_run()
    taken = []
    for rank in range(2):
        process = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"))
        for step, counts, streams in step_streams(process, SFT(), inputs.batches, range(4, STEPS)):
            taken.append((step, rank, [number for number, _ in streams]))
            assert counts[0] == sum(stream.num_supervised for _, stream in streams)
            assert counts[1] == sum(stream.num_tokens for _, stream in streams)
    assert taken == [(4, 0, [0, 2]), (5, 0, [0, 2]), (4, 1, [1]), (5, 1, [1])]


class SomeEmpty:
    """Batches whose steps hold 1, 2, 3, 1, 2, 3 streams that are not empty."""

    micro_batches_per_step = MICRO_BATCHES

    def __init__(self, batches, empty_tokens=0):
        self.batches, self.empty_tokens = batches, empty_tokens

    def ends_epoch(self, step):
        return False

    def position(self, steps):
        return {}

    def training_stream(self, step, number):
        if number <= step % MICRO_BATCHES:
            return self.batches.training_stream(step, number)
        return replace(build_stream([], 64, 64), num_tokens=self.empty_tokens)


def test_empty_micro_batches_are_left_out_and_change_no_bit(make_run):
    def run(empty_tokens):
        inputs, diary = make_run(dropout=0.3)
        passes = []
        inputs.strategy.model.register_forward_hook(lambda *_: passes.append(None))
        state = fit(replace(inputs, batches=SomeEmpty(inputs.batches, empty_tokens)), TrainState())
        assert state.updates == STEPS
        return inputs, without_speed(diary.metrics), len(passes)

    inputs, metrics, passes = run(empty_tokens=0)
    computed, their_metrics, all_passes = run(empty_tokens=1)  # nothing supervised, but something to compute
    assert (passes, all_passes) == (12, STEPS * MICRO_BATCHES)
    assert_equal(weights(inputs), weights(computed))
    assert [line["train/loss"] for line in metrics.values()] == [line["train/loss"] for line in their_metrics.values()]


@pytest.mark.parametrize("processes", [2, 3])
def test_a_process_computes_an_empty_stream_only_where_another_has_a_full_one(make_run, processes):
    inputs, _ = make_run()
    batches = SomeEmpty(inputs.batches)
    rounds = {step: -(-(step % MICRO_BATCHES + 1) // processes) for step in range(STEPS)}
    for rank in range(processes):
        process = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"), step=0)
        mine = len(range(rank, MICRO_BATCHES, processes))
        for step, _, streams in step_streams(process, SFT(), batches, range(STEPS)):
            assert len(streams) == min(rounds[step], mine)
            process.step += len(streams)
            assert process.step == (step + 1) * mine  # whatever is left out: Accelerate updates after so many


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_is_stopped_and_goes_on_gives_the_bits_of_one_that_is_not(dropout, make_run):
    whole, diary = make_run(dropout=dropout)
    fit(whole, TrainState())
    parts, other = make_run(dropout=dropout, signal_after=2)
    with pytest.raises(Preempted, match="has saved step 2"):
        fit(parts, TrainState())
    assert other.events[-1] == "save 2"
    torch.manual_seed(99)  # whatever has been drawn meanwhile
    fit(replace(parts, signals=SignalHandler()), TrainState(step=2, updates=2))
    assert_equal(weights(parts), weights(whole))
    losses = [[each.metrics[step]["train/loss"] for step in range(1, STEPS + 1)] for each in (diary, other)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == STEPS


def test_tokens_are_counted_where_they_stand_first(make_run, monkeypatch):
    """What a stream repeats of another, as context, does not make a run faster."""
    inputs, _ = make_run()
    whole, counted = type(inputs.batches).training_stream, []

    def training_stream(self, step, number):
        return replace(whole(self, step, number), num_repeated=number)

    def add(self, sums, counts, grad_norm):
        counted.append(int(counts[1]))
        return taken(self, sums, counts, grad_norm)

    taken = MetricSums.add
    monkeypatch.setattr(type(inputs.batches), "training_stream", training_stream)
    monkeypatch.setattr(MetricSums, "add", add)
    fit(inputs, TrainState())
    streams = [
        [inputs.batches.training_stream(step, number) for number in range(MICRO_BATCHES)] for step in range(STEPS)
    ]
    assert counted == [sum(stream.num_tokens for stream in each) - sum(range(MICRO_BATCHES)) for each in streams]


# --- what is due ----------------------------------------------------------------------------------------------------


def test_what_is_due_in_its_order(make_run):
    inputs, diary = make_run(log_every=4, eval_every=2, save_every=3, losses={2: 5.0, 4: 4.0, 6: 4.5})
    state = fit(inputs, TrainState())
    expected = ["evaluate 2", "save 2", "save 3", "log 4", "evaluate 4", "save 4", "log 6", "evaluate 6", "save 6"]
    assert diary.events == expected  # saved as well where it is the best so far
    assert (state.best_loss, state.best_step, state.evaluated_step) == (4.0, 4, 6)


def test_evaluation_and_checkpoints_come_once_an_epoch_by_default(make_run):
    inputs, diary = make_run(log_every=100)
    fit(inputs, TrainState())
    assert diary.events == ["evaluate 4", "save 4", "log 6", "evaluate 6", "save 6"]


def test_the_last_step_is_never_left_out(make_run):
    inputs = replace(make_run()[0], steps=10)
    for every, due in ((4, [4, 8, 10]), (100, [10]), (None, [4, 10])):
        assert [step for step in range(1, 11) if is_due(inputs, step, every)] == due


# --- interrupted evaluations ------------------------------------------------------------------------------------------


def interrupted(step):
    raise EvaluationInterrupted


def test_an_evaluation_that_is_cut_short_is_made_up_for_by_the_next_start(make_run):
    inputs, diary = make_run(eval_every=2, save_every=100)
    with pytest.raises(Preempted, match="has saved step 2"):
        fit(replace(inputs, evaluate=interrupted), TrainState())
    assert diary.events == ["log 1", "log 2", "save 2"]
    with pytest.raises(Preempted, match="has saved step 2"):  # once more, and it is saved already
        fit(replace(inputs, evaluate=interrupted), TrainState(step=2, updates=2))
    assert diary.events == ["log 1", "log 2", "save 2"]
    fit(inputs, TrainState(step=2, updates=2))
    assert diary.events[3:] == ["evaluate 2", "log 3", "log 4", "evaluate 4", "log 5", "log 6", "evaluate 6", "save 6"]


def test_checkpoints_for_verification_stand_at_equal_distances(make_run):
    inputs, diary = make_run(eval_every=100, save_every=100, log_every=100, keep_for_verification=2)
    fit(inputs, TrainState())
    assert [event for event in diary.events if "save" in event] == ["save 2", "save 4", "save 6"]
    assert TrainingSettings(keep_for_verification=3).steps_to_keep(10) == {2, 5, 7}
    assert TrainingSettings(keep_for_verification=9).steps_to_keep(2) == {1}
    assert TrainingSettings().steps_to_keep(10) == set()


def test_what_was_evaluated_is_not_evaluated_again(make_run):
    inputs, diary = make_run(eval_every=2, save_every=100, log_every=100)
    fit(inputs, TrainState(step=4, updates=4, evaluated_step=4))
    assert diary.events == ["log 6", "evaluate 6", "save 6"]
    diary.events.clear()
    assert fit(inputs, TrainState(step=6, updates=6, evaluated_step=6)).step == 6
    assert diary.events == []


# --- gradients that are not finite ------------------------------------------------------------------------------------


def test_a_step_without_a_finite_gradient_changes_nothing(make_run):
    """It is left out: the next ones are as if the learning rate had been zero in it."""
    inputs, diary = make_run(NaNFrom({4}))  # the second micro-batch of the second step
    fit(replace(inputs, steps=1), TrainState())
    before = weights(inputs)
    state = fit(replace(inputs, steps=2), TrainState(step=1, updates=1))
    assert (state.step, state.updates, state.skipped_in_a_row) == (2, 1, 1)
    assert_equal(weights(inputs), before)
    assert math.isnan(diary.metrics[2]["train/loss"])
    assert diary.metrics[2]["train/skipped_steps"] == 1
    state = fit(inputs, state)
    assert (state.step, state.updates, state.skipped_in_a_row) == (STEPS, STEPS - 1, 0)
    assert all(math.isfinite(diary.metrics[step]["train/loss"]) for step in (3, 4, 5, 6))
    assert not torch.equal(weights(inputs)["wte.weight"], before["wte.weight"])


def test_too_many_of_them_end_the_run_unsaved(make_run):
    inputs, diary = make_run(NaNFrom(range(6, 100)), max_skipped_steps=3, eval_every=100)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row, the last was step 4: .*`optimizer.learning_rate`"):
        fit(inputs, TrainState())
    assert diary.events == ["log 1", "log 2", "log 3", "log 4"]
