"""Parts of a small training loop: what stands for everything around it, and objectives that misbehave."""

import math

import torch

from gpt2ft.data.packing import build_stream
from gpt2ft.data.token_tree import weigh
from gpt2ft.objectives.sft import SFT

VOCABULARY = 8192
MICRO_BATCHES = 3
STEPS = 6
LENGTHS = (3, 40, 9, 17)  # of the replies: micro-batches of very uneven weight


class Batches:
    """A batch source of nothing but the four members that the loop asks for."""

    def __init__(self, make_tree):
        self.micro_batches_per_step = MICRO_BATCHES
        self.make_tree = make_tree
        self.asked = []

    def ends_epoch(self, step):
        return step == 4

    def position(self, steps):
        return {"data": f"{steps:016x}"}

    def training_stream(self, step, number):
        self.asked.append((step, number))
        length = LENGTHS[(step * MICRO_BATCHES + number) % len(LENGTHS)]
        return build_stream([weigh(self.make_tree(("user", 4, -1), ("assistant", length, 0)), "once")], 64, 64)


class Diary:
    """Stands for everything around the loop and notes what it is told, in order."""

    def __init__(self, signals, losses=(), signal_after=None):
        self.events = []
        self.metrics = {}
        self.advanced = 0
        self.signals = signals
        self.losses = dict(losses)
        self.signal_after = signal_after
        self.saved = None

    def advance(self):
        self.advanced += 1
        if self.advanced == self.signal_after:
            self.signals.received = 15

    def log(self, step, metrics):
        self.events.append(f"log {step}")
        self.metrics[step] = metrics

    def show(self, step, metrics, seconds_left):
        assert metrics is self.metrics[step]
        assert seconds_left >= 0

    def evaluate(self, step):
        self.events.append(f"evaluate {step}")
        return self.losses.get(step)

    def save(self, state):
        self.events.append(f"save {state.step}")
        self.saved = state


def weights(inputs):
    return {name: parameter.detach().clone() for name, parameter in inputs.strategy.gpt2.named_parameters()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def without_speed(metrics):
    return {step: {name: line[name] for name in line if "second" not in name} for step, line in metrics.items()}


class WithMetrics(SFT):
    metric_names = ("targets", "streams")

    def metrics(self, log_probs, stream):
        assert not log_probs.requires_grad
        return torch.tensor([stream.num_supervised, 1.0], dtype=torch.float64)


class NaNFrom(SFT):
    """The loss is not a number in some calls."""

    def __init__(self, calls):
        self.calls, self.number = calls, 0

    def loss(self, log_probs, stream):
        self.number += 1
        return super().loss(log_probs, stream) * (math.nan if self.number - 1 in self.calls else 1.0)
