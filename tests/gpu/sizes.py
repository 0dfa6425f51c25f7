"""Sizes of the checks: those of a GPU, and small ones for a CPU."""

from dataclasses import dataclass, field, replace
from typing import Any

from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.model.pretrained import published_config
from gpt2ft.runs.benchmark import ROWS


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is checked.

    Attributes:
        config: of the model that is compared with float64; no more of its ids are used than `num_ids`.
        tokens: of the stream that it is compared on.
        benchmark: settings of each benchmark.
        run_shape: of the model that whole runs train, as config.json has it; its vocabulary is the bundled one.
        training: settings of these runs.
        lasts: optimizer steps of a run from random weights.
    """

    config: GPT2Config
    num_ids: int
    tokens: int
    benchmark: dict[str, Any] = field(default_factory=dict)
    run_shape: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    lasts: int = 24


REAL = Sizes(
    config=replace(published_config("gpt2"), vocab_size=ROWS),
    num_ids=ROWS - 43,
    tokens=4096,
    run_shape={"n_embd": 768, "n_layer": 12, "n_head": 12},
    training={"tokens_per_micro_batch": 8192, "micro_batches_per_step": 2},
)
TINY = Sizes(
    config=GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=1),
    num_ids=509,
    tokens=1024,
    benchmark={"tokens_per_micro_batch": 1024, "micro_batches": 2, "steps": 1, "precision": "fp32", "new_tokens": 4},
    run_shape={"n_embd": 32, "n_layer": 2, "n_head": 2},
    training={"tokens_per_micro_batch": 512, "micro_batches_per_step": 2},
    lasts=8,
)
