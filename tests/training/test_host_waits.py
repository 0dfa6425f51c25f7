"""How often the CPU waits for the device in a step: once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from host_waits import counted_waits
from small_loop import MICRO_BATCHES, STEPS

from gpt2ft.checkpoint import TrainState
from gpt2ft.data.packing import build_pairs, build_stream, number_replies
from gpt2ft.data.token_tree import weigh
from gpt2ft.distributed.signals import Preempted
from gpt2ft.objectives.dpo import DPO
from gpt2ft.objectives.sft import SFT
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.training.fit import fit


class PairBatches:
    """One prompt with replies, of which all pairs are compared."""

    micro_batches_per_step = MICRO_BATCHES

    def __init__(self, make_tree):
        tree = weigh(make_tree(("user", 4, -1), ("assistant", 9, 0), ("assistant", 5, 0), ("assistant", 7, 0)), "once")
        pairs = np.array([(1, 2), (1, 3), (2, 3)])
        self.trees = [replace(tree, pairs=pairs, pair_weights=np.ones(3, np.float32), rankings=np.zeros(3, np.int32))]

    def ends_epoch(self, step):
        return False

    def position(self, steps):
        return {}

    def training_stream(self, step, number):
        trees = number_replies(self.trees)
        return replace(build_stream(trees, 64, 64), pairs=build_pairs(trees, -np.arange(10.0, 13.0), 8, 8))


@pytest.mark.parametrize("what", ["sft", "dpo"])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_a_step_waits_for_the_device_once(what, backend, make_run, make_tree):
    """For the norm of the gradient, without which no optimizer may step."""
    objective = DPO(PreferenceSettings()) if what == "dpo" else SFT()
    inputs, diary = make_run(objective, fused=True, log_every=100, eval_every=100)
    inputs = replace(inputs, steps=100, batches=PairBatches(make_tree) if what == "dpo" else inputs.batches)
    inputs.strategy.model.backend = backend
    diary.signal_after, diary.save = STEPS, lambda state: None
    with counted_waits(torch.device("cpu")) as waits, pytest.raises(Preempted):
        fit(replace(inputs, save=diary.save), TrainState())
    assert diary.advanced == STEPS
    assert waits == ["_local_scalar_dense"] * STEPS
