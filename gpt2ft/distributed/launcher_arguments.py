"""Read the command line and the config file of the `accelerate launch` that is this process's parent.

Only they say what was asked for. With --cpu it starts one process, whatever --num_processes says, and it ignores
unknown keys in the sections of its config without a word.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """The arguments of an `accelerate launch` as far as they are checked.

    Attributes:
        processes: how many to start, over all machines; None if none of them says.
        file: the config file, if one was read.
        config: its content.
    """

    processes: int | None
    file: str | None
    config: dict[str, Any]


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
    config = _read(file) if file is not None else {}
    processes = config.get("num_processes", -1) if told.num_processes is None else told.num_processes
    return Launch(processes if processes > 0 else None, file, config)


def known_keys() -> list[str]:
    """Return the keys that Accelerate knows in the sections of its config."""
    from accelerate.commands.launch import launch_command_parser

    return sorted(action.dest for action in launch_command_parser()._actions)


def is_launched() -> bool:
    """Return True if this process's parent is `accelerate launch`."""
    return _arguments_of_parent() is not None


def _arguments_of_parent() -> Sequence[str] | None:
    """Return the arguments of `accelerate launch`, if it is this process's parent."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return _launch_arguments(parent.cmdline() if parent else [])
    except psutil.Error:
        return None


def _launch_arguments(words: Sequence[str]) -> Sequence[str] | None:
    """Return what follows `accelerate launch` in a command line, in any spelling; None if it is another command."""
    names = [os.path.basename(word) for word in words]
    for number, name in enumerate(names):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[number + 1 :]
        command = names[number + 1 : number + 2]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command == ["launch"]:
            return words[number + 2 :]
    return None


def _read(file: str) -> dict[str, Any]:
    """Return the content of a config, well formed because the launcher has read it before."""
    import yaml

    text = Path(file).read_text(encoding="utf-8")
    return json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
