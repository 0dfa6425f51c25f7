"""Check that all machines see the same output folder."""

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from gpt2ft.distributed.launch_checks import LaunchError

SECONDS_TO_APPEAR = 10.0  # file systems over a network show new files late
SECONDS_BETWEEN_LOOKS = 0.2


def check_shared(accelerator: Any, folder: Path) -> None:
    """Put a file with a random name into the folder, and have all processes look for it; they call this together.

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
        missing = None if _appears(file) else (accelerator.process_index, socket.gethostname(), str(folder.absolute()))
        all_missing = gather_object([missing])
    finally:
        if accelerator.is_main_process:
            file.unlink(missing_ok=True)
    for rank, host, seen in filter(None, all_missing):
        raise LaunchError(
            f"`output` must be a folder that all machines share, but rank {rank} (host {host}) does not find in {seen} "
            "what the first process has written there"
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        if file.parent.is_dir() and file.name in os.listdir(file.parent):  # a listing asks the server, `exists` may not
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
