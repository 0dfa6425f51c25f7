"""Plans of the quickstart's ranked replies, a small model, and a reference store for both."""

import numpy as np
import pytest

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.training.reference_store import ReferenceStore

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
