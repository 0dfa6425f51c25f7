"""Identity of a run: compared on resuming, and between all processes before the first step."""

import importlib.metadata
import platform
from typing import Any

from gpt2ft.distributed.accelerator import precision_of
from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.settings.scripts import WITHOUT_EFFECT, RunSettings

PASSES = ("steps", "epochs", "min_steps")  # settings of `training` that tell its length


def identity_of(setup: RunSetup) -> dict[str, Any]:
    """Return what a run must share with its checkpoint to continue from it: settings, data, initial weights."""
    settings, held_out = setup.settings, setup.held_out
    sections = settings_that_train(settings)
    for name in PASSES:  # which are told by the steps that they come to
        sections["training"].pop(name, None)
    return sections | {
        "steps": setup.steps,
        "epochs": setup.plan.epochs,  # after them the last step is short
        "precision": precision_of(setup.accelerator),
        "tokenised_data": setup.corpus.identity(),
        "held_out_data": held_out.identity() if held_out else {},
        "initial_weights": setup.loaded.digest,
    }


def settings_that_train(settings: RunSettings) -> dict[str, Any]:
    """Return the settings that a run must share with what it continues, by section; all others may change meanwhile."""
    training = {"tokens_per_micro_batch", "micro_batches_per_step", "seed", "max_grad_norm", "deterministic"}
    training |= {"steps"} if settings.training.steps else {"steps", *PASSES}
    sections = settings.model_dump(mode="json", exclude={"training", *WITHOUT_EFFECT})
    del sections["data"]["cache"]
    return sections | {"training": settings.training.model_dump(mode="json", include=training)}


def check_settings(accelerator: Any, settings: RunSettings) -> None:
    """Check that all processes were told the same, before settings decide what they wait for each other for.

    Raises:
        LaunchError: on all of them, naming the first setting or version that differs.
    """
    told = settings.model_dump(mode="json", exclude={"output": True, "data": {"cache"}})  # folders of each machine
    check_agreement(accelerator, told | {"versions": versions()})


def facts_of(setup: RunSetup) -> dict[str, Any]:
    """Return what all processes must have found alike to train one run: its identity and the data."""
    return identity_of(setup) | {"data_content": [corpus.content() for corpus in setup.corpora()]}


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and what it computes with."""
    names = ["gpt2ft", "torch", "accelerate", "tiktoken", "datasets", "safetensors"]
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found
