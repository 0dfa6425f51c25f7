"""Identity of a run: compared on resuming, and between all processes before the first step."""

import importlib.metadata
import platform
from typing import Any

from gpt2ft.distributed.accelerator import precision_of
from gpt2ft.runs.run_setup import RunSetup


def identity_of(setup: RunSetup) -> dict[str, Any]:
    """Return what a run must share with its checkpoint to continue from it: settings, data, initial weights."""
    settings, held_out = setup.settings, setup.held_out
    training = {"tokens_per_micro_batch", "micro_batches_per_step", "seed", "max_grad_norm", "deterministic"}
    sections = settings.model_dump(mode="json", exclude={"training", "output", "resume", "dry_run", "show"})
    del sections["data"]["cache"]
    return sections | {
        "training": settings.training.model_dump(mode="json", include=training),
        "steps": setup.steps,
        "epochs": setup.plan.epochs,  # after them the last step is short
        "precision": precision_of(setup.accelerator),
        "tokenised_data": setup.corpus.identity(),
        "held_out_data": held_out.identity() if held_out else {},
        "initial_weights": setup.loaded.digest,
    }


def facts_of(setup: RunSetup) -> dict[str, Any]:
    """Return what all processes must share to train one run: the identity, all of `training`, the data, versions."""
    return identity_of(setup) | {
        "training": setup.settings.training.model_dump(mode="json"),
        "data_content": [corpus.content() for corpus in setup.corpora()],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and what it computes with."""
    names = ["gpt2ft", "torch", "accelerate", "tiktoken", "datasets", "safetensors"]
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found
