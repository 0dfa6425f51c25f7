"""Read the command line and the config file of the `accelerate launch` that is this process's parent.

Only they say what was asked for. With --cpu it starts one process, whatever --num_processes says, and it ignores
unknown keys in the sections of its config without a word.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True)
class Launch:
    """The arguments of an `accelerate launch` as far as they are checked."""

    processes: int | None  # to start, over all machines; None if it was not told
    file: str | None  # its config, if it read one
    config: dict[str, Any]
    uses_cpu: bool = False


def find_launch() -> Launch | None:
    """Return the `accelerate launch` that started this process; None if something else did."""
    arguments = _arguments_of_parent()
    if arguments is None:
        return None
    from accelerate.commands.config import config_args
    from accelerate.commands.launch import launch_command_parser

    told, _ = launch_command_parser().parse_known_args(arguments)
    file = told.config_file
    if file is None and os.path.isfile(config_args.default_config_file) and not told.cpu:
        file = config_args.default_config_file
    config = vars(config_args.load_config_from_file(file)) if file is not None else {}
    processes = config.get("num_processes", -1) if told.num_processes is None else told.num_processes
    uses_cpu = told.cpu or bool(config.get("use_cpu"))
    return Launch(processes if processes > 0 else None, file, config, uses_cpu)


def known_keys() -> list[str]:
    """Return the keys that Accelerate knows in the sections of its config."""
    from accelerate.commands.launch import launch_command_parser

    return sorted(action.dest for action in launch_command_parser()._actions)


def is_launched() -> bool:
    return _arguments_of_parent() is not None


def _arguments_of_parent() -> Sequence[str] | None:
    """Return what follows `accelerate launch`, however it is spelled, in the command line of this process's parent."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    names = [os.path.basename(word) for word in words]
    for number, name in enumerate(names):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[number + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and names[number + 1 : number + 2] == [
            "launch"
        ]:
            return words[number + 2 :]
    return None
