"""Tell a restart by torchrun, Slurm or a supervisor from a launch that a person has typed.

A run with `--resume never` must not begin anew each time that it is restarted. So it notes its launch in its manifest,
and a restart of that same launch continues.
"""

import os
import socket
from collections.abc import Mapping

import psutil


def launch() -> dict[str, str]:
    """Names of this launch that its restarts share, by who gave them; launchers that started nothing are left out."""
    names = {"GPT2FT_RUN_ID": os.environ.get("GPT2FT_RUN_ID"), "slurm": os.environ.get("SLURM_JOB_ID")}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run_id = os.environ["TORCHELASTIC_RUN_ID"]
        names["torchrun"] = _parent() if run_id == "none" else run_id  # "none" is what all have who give no id
    return {giver: name for giver, name in names.items() if name}


def is_restart_of(noted: Mapping[str, str]) -> bool:
    """Return True if this process is a later start of the launch whose `launch()` was noted.

    GPT2FT_RUN_ID says so by itself: whoever sets it starts the same run again. Slurm and torchrun count their restarts,
    and only a counted one is taken for one: several commands may share a job.
    """
    now = launch()
    is_counted = {
        "GPT2FT_RUN_ID": True,
        "slurm": os.environ.get("SLURM_RESTART_COUNT", "0") != "0",
        "torchrun": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0",
    }
    return any(is_counted[giver] and noted.get(giver) == name for giver, name in now.items())


def _parent() -> str:
    """The launcher on this machine, which outlives the processes that it starts again."""
    parent = psutil.Process().parent()
    return f"{socket.gethostname()} {parent.pid} {parent.create_time()}" if parent else ""
