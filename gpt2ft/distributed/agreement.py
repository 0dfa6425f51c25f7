"""Check that all processes train the same run: compare settings, data, weights and versions before the first step.

Each process reads its own command line, files and packages. Where they differ, gradients of different runs would be
averaged, and nothing would say so.
"""

import socket
from collections.abc import Mapping
from typing import Any

from gpt2ft.distributed.launch_checks import LaunchError

REMEDIES = {  # by the first part of a key
    "step": "`output` must be on a folder that all machines share",
    "data_content": "the files that are read must be the same on each machine",
    "initial_weights": "the model that is loaded must be the same on each machine",
    "versions": "install the same packages on each machine",
}
REMEDY = "start all processes with the same settings"


def check_agreement(accelerator: Any, facts: Mapping[str, Any]) -> None:
    """Compare the facts that decide a run over all processes, which call this together.

    Args:
        facts: numbers, strings, and lists and mappings of them.

    Raises:
        LaunchError: on all processes, naming the first fact that differs, with ranks and hosts.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    mine = (socket.gethostname(), dict(_flat(facts)))
    (host, first), *others = gather_object([mine])
    for rank, (other_host, other) in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            here, there = first.get(key), other.get(key)
            if here != there:
                remedy = REMEDIES.get(key.partition(".")[0], REMEDY)
                raise LaunchError(
                    f"all processes must train the same run, but `{key}` is {here!r} on rank 0 (host {host}) and "
                    f"{there!r} on rank {rank} (host {other_host}): {remedy}"
                )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return every fact under its dotted name, so that one that differs can be named."""
    found = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found
