"""Choices by name, each list in one place: LoRA targets, published models. Losses have their own: preference_losses.py.

Settings offer the names, and whatever carries a choice out looks it up here. Data alone: nothing of torch.
"""

from typing import NamedTuple


class TargetColumns(NamedTuple):
    """Some columns of a matrix: the module of a transformer block, and which of how many equal parts of its output."""

    module: str
    part: int = 0
    num_parts: int = 1


LORA_TARGETS = {
    "q": TargetColumns("attn.c_attn", 0, 3),
    "k": TargetColumns("attn.c_attn", 1, 3),
    "v": TargetColumns("attn.c_attn", 2, 3),
    "o": TargetColumns("attn.c_proj"),
    "fc": TargetColumns("mlp.c_fc"),
    "proj": TargetColumns("mlp.c_proj"),
}


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # by their packages: see training/trackers.py


class HubModel(NamedTuple):
    """A GPT-2 on the hub: where it lies, at which commit, and its shape (all have 50,257 ids and 1,024 positions)."""

    repository: str
    revision: str
    n_layer: int
    n_head: int
    n_embd: int
    license: str = "mit"


PUBLISHED_MODELS = {
    "distilgpt2": HubModel(
        "distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa", 6, 12, 768, "apache-2.0"
    ),
    "gpt2": HubModel("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 12, 12, 768),
    "gpt2-medium": HubModel("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", 24, 16, 1024),
    "gpt2-large": HubModel("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", 36, 20, 1280),
    "gpt2-xl": HubModel("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", 48, 25, 1600),
}
