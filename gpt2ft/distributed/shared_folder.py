"""Whether all machines see the same folder."""

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from gpt2ft.distributed.launch_checks import LaunchError

SECONDS_TO_APPEAR = 10.0  # file systems over a network show new files late


def check_shared(accelerator: Any, folder: Path) -> None:
    """The main process puts a file with a random name there, and all others look for it. All come here together.

    Raises:
        LaunchError: on all of them, if one does not find it.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    file = folder / name
    if accelerator.is_main_process:
        file.touch()
    accelerator.wait_for_everyone()
    try:
        lacks = None if _appears(file) else (accelerator.process_index, socket.gethostname(), str(folder.absolute()))
        found = gather_object([lacks])
    finally:
        if accelerator.is_main_process:
            file.unlink(missing_ok=True)
    for rank, host, seen in filter(None, found):
        raise LaunchError(
            f"`output` must be a folder that all machines share, but rank {rank} (host {host}) does not find in {seen} "
            "what the first process has written there"
        )


def _appears(file: Path) -> bool:
    until = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        if file.parent.is_dir() and file.name in os.listdir(file.parent):  # asks the server, as a look for one does not
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
