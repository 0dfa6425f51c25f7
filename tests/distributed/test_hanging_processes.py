"""Two processes of which one keeps the other waiting: left alone while it gets on, named when it hangs or is lost.

Training runs with the same troubles are in tests/runs/test_lost_processes.py.
"""

import re
import signal
from contextlib import ExitStack

import pytest
from processes import ON_CPU, free_port, start

TWO_PROCESSES = """
import sys, time
from pathlib import Path
from threading import Event

from torch.distributed import distributed_c10d

from gpt2ft import quickstart
from gpt2ft.data.store import open_store
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import start_accelerator
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.tokenizer import ChatTokenizer

watchdog.SILENT, watchdog.ELSEWHERE = 3, 100 if sys.argv[1] == "sits" else 1  # times the patience

def tokenises(folder):
    tokenizer = ChatTokenizer.from_folder(quickstart.MODEL)
    until, number = time.monotonic() + 4 * watchdog.patience(), 0
    while time.monotonic() < until:
        number += 1
        open_store("quickstart", FilterSettings(), tokenizer, folder / str(number))

def hangs(folder):
    Event().wait()

@watchdog.announce_end()
def run(work, folder):
    accelerator = start_accelerator("fp32")
    group = distributed_c10d._get_default_group()
    print("waits at most", group._get_backend(accelerator.device).options._timeout, flush=True)
    if accelerator.is_main_process:
        work(folder)
    accelerator.wait_for_everyone()
    print("all have met", flush=True)

run({"tokenises": tokenises, "hangs": hangs, "sits": hangs}[sys.argv[1]], Path(sys.argv[2]))
"""


@pytest.fixture
def two(tmp_path):
    """two("tokenises"): both processes, in each of which nothing but signs of life is waited for longer than 2 s."""
    with ExitStack() as stack:

        def begin(work):
            ranks = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            command = ["python", "-c", TWO_PROCESSES, work, tmp_path]
            return [
                stack.enter_context(
                    start(command, **ON_CPU, **ranks, RANK=rank, LOCAL_RANK=rank, GPT2FT_PATIENCE=2, HF_HOME=tmp_path)
                )
                for rank in range(2)
            ]

        yield begin


def test_a_phase_of_any_length_is_waited_for(two):
    """Tokenising four times as long as all may stand still, while the other process waits in a collective."""
    for process in two("tokenises"):
        ended = process.finish()
        assert "all have met" in ended.stdout
        assert re.search(r"waits at most 7 days", ended.stdout)


def test_in_the_same_phase_one_that_hangs_is_named_with_its_stack(two):
    first, second = two("hangs")
    waiting, hanging = second.finish(code=69), first.finish(code=69)
    assert [len(ended.errors) for ended in (waiting, hanging)] == [1, 0]
    assert "rank 0 (host" in waiting.errors[0]
    assert "last at getting ready" in waiting.errors[0]
    assert re.search(r'File "<string>", line \d+ in hangs', hanging.stderr)


def test_one_that_is_killed_is_named_by_one_that_its_launcher_does_not_end(two):
    first, second = two("sits")  # for as long as it likes
    second.wait_for("waits at most")
    first.send_signal(signal.SIGKILL)
    ended = second.finish(code=69)
    assert len(ended.errors) == 1
    assert "store on 127.0.0.1" in ended.errors[0]  # which the first process has kept
