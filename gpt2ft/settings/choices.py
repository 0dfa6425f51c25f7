"""Choices by name, each list in one place: preference losses, LoRA targets, published models.

Settings offer the names, and whatever carries a choice out looks it up here. Data alone: nothing of torch.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LossTraits:
    """Traits of a preference loss; its function in gpt2ft/objectives/losses.py has its name.

    Attributes:
        meaning: in a few words, for --help.
        parameters: settings of `dpo` that it takes beside `beta`; the others must be 0.
    """

    meaning: str
    needs_reference: bool = True
    parameters: tuple[str, ...] = ("rpo_alpha",)


PREFERENCE_LOSSES = {
    "sigmoid": LossTraits("DPO as published"),
    "cdpo": LossTraits("for labels that are sometimes wrong", parameters=("label_smoothing", "rpo_alpha")),
    "robust": LossTraits("the same without bias", parameters=("label_smoothing", "rpo_alpha")),
    "ipo": LossTraits("a margin to meet, not to pass"),
    "hinge": LossTraits("a margin to reach"),
    "sigmoid_norm": LossTraits("DPO per token"),
    "apo_zero": LossTraits("chosen up, rejected down"),
    "apo_down": LossTraits("both down, rejected further"),
    "nca": LossTraits("each reply against the reference"),
    "sppo": LossTraits("a margin to meet for each reply"),
    "simpo": LossTraits("without a reference", needs_reference=False, parameters=("gamma", "rpo_alpha")),
    "orpo": LossTraits("without a reference, beside the NLL of the chosen reply", False, parameters=()),
}


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


class HubModel(NamedTuple):
    """A GPT-2 on the hub: where it lies, at which commit, and its shape (all have 50,257 ids and 1,024 positions)."""

    repository: str
    revision: str
    n_layer: int
    n_head: int
    n_embd: int


PUBLISHED_MODELS = {
    "distilgpt2": HubModel("distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa", 6, 12, 768),
    "gpt2": HubModel("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 12, 12, 768),
    "gpt2-medium": HubModel("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", 24, 16, 1024),
    "gpt2-large": HubModel("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", 36, 20, 1280),
    "gpt2-xl": HubModel("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", 48, 25, 1600),
}
