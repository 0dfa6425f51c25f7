"""Plans of the quickstart's ranked replies, a small model, a reference store for both, and a small training loop."""

import numpy as np
import pytest
import torch
from small_loop import MICRO_BATCHES, STEPS, VOCABULARY, Batches, Diary

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.sft import SFT
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.settings.training import OptimizerSettings, TrainingSettings
from gpt2ft.training.fit import LoopInputs
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.reference_store import ReferenceStore
from gpt2ft.training.strategy import DDP

COMPUTED_BY = {"weights": "w", "tokenizer": "t", "template": "m", "precision": "no", "attention": "segments"}


@pytest.fixture(scope="package")
def gpt2(tokenizer, tiny_gpt2):
    return tiny_gpt2(tokenizer.padded_size, 256)


@pytest.fixture(scope="package")
def model(tokenizer, gpt2):
    return TargetLogProbs(gpt2, len(tokenizer), "segments")


@pytest.fixture
def make_plan(tokenizer, cache):
    """make_plan(pairs="all", capacity=512): of the quickstart's ranked replies."""

    def make(pairs="all", capacity=512, seed=0, source="quickstart"):
        store = open_store(source, FilterSettings(), tokenizer, cache, kind=PREFERENCES)
        rows = np.array([(0, row) for row in range(len(store))])
        chunks = chunk([store], rows, PreferencePairs(pairs, "pair", 256, capacity))
        return Plan(chunks, capacity, 2, seed=seed)

    return make


@pytest.fixture
def make_store(tmp_path):
    """make_store(weights="other"): the store of a reference that differs in the parts named."""

    def make(versions=None, **computed_by):
        return ReferenceStore(tmp_path, COMPUTED_BY | computed_by, versions or {"torch": "2"})

    return make


@pytest.fixture(scope="module")
def accumulating_accelerator(one_thread):
    """One process that accumulates the micro-batches of a step."""
    from accelerate.state import AcceleratorState, GradientState

    from gpt2ft.distributed.accelerator import start_accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return start_accelerator("fp32", MICRO_BATCHES)


@pytest.fixture
def make_run(tiny_gpt2, accumulating_accelerator, make_tree):
    """make_run(): what the loop works with, the model in its beginning; settings by name."""

    def make(objective=None, losses=(), signal_after=None, dropout=0.0, fused=False, **training):
        model = TargetLogProbs(tiny_gpt2(VOCABULARY, 64), VOCABULARY, "segments")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        optimization = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
        strategy = DDP(accumulating_accelerator, model, adamw(model.gpt2, optimization, fused), max_grad_norm=0.5)
        signals = SignalHandler()
        diary = Diary(signals, losses, signal_after)
        inputs = LoopInputs(
            accelerator=accumulating_accelerator,
            strategy=strategy,
            objective=objective or SFT(),
            batches=Batches(make_tree),
            steps=STEPS,
            training=TrainingSettings(**({"log_every": 1} | training)),
            optimization=optimization,
            tracker=diary,
            evaluate=diary.evaluate,
            save=diary.save,
            signals=signals,
        )
        return inputs, diary

    return make
