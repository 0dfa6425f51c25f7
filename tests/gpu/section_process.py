"""One section in a process of its own, within its limit of time; its figures, and how it ended, as lines of JSON."""

import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from processes import ROOT, run

SCRIPT = Path(__file__).with_name("sections.py")


def run_section(name: str, device: str, results: Path, seconds: float) -> None:
    """Run a section on a device, and append its lines and its end to `results`.

    Raises:
        AssertionError: saying what it has printed, if it fails or takes longer than so many seconds.
    """
    environment: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if device == "cuda":  # all cores, as a run has them
        environment["OMP_NUM_THREADS"] = None
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    started, told = time.monotonic(), ""
    try:
        with TemporaryDirectory() as folder:  # of which runs fill gigabytes
            command = [sys.executable, SCRIPT, name, results, folder, device]
            run(command, seconds=seconds, **environment, PYTHONPATH=os.pathsep.join(paths))
    except AssertionError as error:
        told = str(error)
        raise
    finally:
        taken = round(time.monotonic() - started, 1)
        end = {"section": name, "passed": not told, "seconds": taken} | (
            {"told": told[:200] + told[-800:]} if told else {}
        )
        with results.open("a", encoding="utf-8") as file:
            print(json.dumps(end), file=file)
