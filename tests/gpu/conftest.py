"""The file of figures that `pytest -m gpu` leaves, and the time that is left for it."""

import os
import time
from pathlib import Path

import pytest

SECONDS_FOR_ALL = 480
RESULTS = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def results(request, tmp_path_factory):
    """The file that GPT2FT_GPU_RESULTS names, by default gpu.jsonl in the folder of this test run; it is printed."""
    given = os.environ.get("GPT2FT_GPU_RESULTS")
    file = Path(given).absolute() if given else tmp_path_factory.getbasetemp() / "gpu.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    request.config.stash[RESULTS] = file
    return file


@pytest.fixture(scope="session")
def seconds_left():
    """seconds_left(): of the time for all sections, which begins with the first one."""
    ends = time.monotonic() + SECONDS_FOR_ALL
    return lambda: ends - time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    file = config.stash.get(RESULTS, None)
    if file is not None and file.exists():
        terminalreporter.section(f"figures, also in {file}")
        terminalreporter.write(file.read_text(encoding="utf-8"))
