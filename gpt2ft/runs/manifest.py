"""Manifest of a run: everything about it that its recipe does not say."""

from dataclasses import asdict
from typing import Any

from gpt2ft.command_line import full_command
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.accelerator import precision_of
from gpt2ft.distributed.restarts import launch
from gpt2ft.runs.describe import dropped, shares
from gpt2ft.runs.identity import identity_of, versions
from gpt2ft.runs.run_setup import RunSetup


def manifest_of(setup: RunSetup, attention: str) -> dict[str, Any]:
    """Return everything about a run that its recipe does not say: command, versions, data, plan.

    Args:
        attention: the backend in use.
    """
    plan, held_out, eval_plan = setup.plan, setup.held_out, setup.eval_plan
    return {
        "command": full_command(),
        "launch": launch(),
        "versions": versions(),
        "processes": setup.accelerator.num_processes,
        "strategy": launch_checks.strategy(),
        "precision": precision_of(setup.accelerator),
        "attention": attention,
        "identity": identity_of(setup),
        "sources": [asdict(share) for share in shares(setup.corpus, plan)],
        "dropped": dropped(setup.corpus, plan),
        "dropped_held_out": dropped(held_out, eval_plan) if held_out and eval_plan else {},
        "plan": {
            "streams": len(plan.streams),
            "steps": setup.steps,
            "tokens": plan.tokens,
            "repeated": plan.repeated,
            "supervised": plan.supervised,
        },
    }
