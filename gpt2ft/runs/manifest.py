"""Manifest of a run: what it was made of, and where."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gpt2ft.command_line import full_command
from gpt2ft.device import hardware
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.accelerator import precision_name
from gpt2ft.distributed.restarts import launch
from gpt2ft.runs.describe import dropped, shares
from gpt2ft.runs.identity import identity_of, versions
from gpt2ft.runs.lineage import lineage
from gpt2ft.runs.run_setup import RunSetup
from gpt2ft.text.template import template_digest


def manifest_of(setup: RunSetup, attention: str) -> dict[str, Any]:
    """Return everything about a run that its settings do not say: command, versions, hardware, data, plan.

    Args:
        attention: the backend in use.
    """
    plan, held_out, eval_plan = setup.plan, setup.held_out, setup.eval_plan
    sources = shares(setup.corpus, plan)
    return {
        "command": full_command(),
        "launch": launch(),
        **environment(setup.accelerator),
        "template": template_digest(),
        "tokenizer": setup.loaded.tokenizer.digest,
        "precision": precision_name(setup.accelerator),
        "attention": attention,
        "identity": identity_of(setup),
        "sources": [asdict(share) for share in sources],
        "lineage": lineage(setup.settings, sources),
        "dropped": dropped(setup.corpus, plan),
        "dropped_held_out": dropped(held_out, eval_plan) if held_out and eval_plan else {},
        "plan": {
            "streams": len(plan.streams),
            "steps": setup.steps,
            "tokens": plan.tokens,
            "tokens_alone": plan.tokens_alone,
            "repeated": plan.repeated,
            "supervised": plan.supervised,
            "fill": plan.fill,
        },
    }


def environment(accelerator: Any) -> dict[str, Any]:
    """Return what bits depend on beside settings and data."""
    strategy = launch_checks.strategy()
    return {
        "versions": versions(),
        "processes": accelerator.num_processes,
        "strategy": "single process" if strategy == "ddp" and accelerator.num_processes == 1 else strategy,
        "hardware": hardware(),
    }


def starts_until(earlier: Mapping[str, Any], step: int, accelerator: Any) -> list[dict[str, Any]]:
    """Return each start of a run with the step it went on from, this one last.

    Args:
        earlier: the manifest as the start before has left it. What it did after `step` is done again.
    """
    kept = [start for start in earlier.get("starts", []) if start["step"] < step]
    return [*kept, {"step": step} | environment(accelerator)]
