"""Signals are noted once, come again without harm, and end the process where a person means it."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from processes import start

from gpt2ft.distributed import signals
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.system import STOP_SIGNALS


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_while_listening_alone(number, capfd):
    before = signal.getsignal(number)
    handler = SignalHandler()
    with handler.listening():
        assert not handler.was_signalled()
        os.kill(os.getpid(), number)
        assert handler.was_signalled()
        assert handler.received == number
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing this step and saving" in capfd.readouterr().err


def test_what_launchers_send_again_does_no_harm(capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    handler = SignalHandler()
    with handler.listening():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    assert handler.received == signal.SIGINT
    assert capfd.readouterr().err.count("finishing") == 1


@pytest.mark.parametrize(
    ("first", "second", "wait"), [("SIGINT", "SIGINT", 0.0), ("SIGTERM", "SIGTERM", 6.0), ("SIGUSR1", "SIGTERM", 6.0)]
)
def test_a_second_signal_ends_the_process_at_once(first, second, wait, monkeypatch):
    codes = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=iter([0.0, wait]).__next__))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with SignalHandler().listening():
        os.kill(os.getpid(), signal.Signals[first])
        assert not codes
        os.kill(os.getpid(), signal.Signals[second])
    assert codes == [128 + signal.Signals[second]]  # listening ends when the thread has read all


CHILD = """
import os, sys
from gpt2ft.distributed.signals import SignalHandler
from gpt2ft.system import end_with_parent
end_with_parent()
handler = SignalHandler()
with handler.listening():
    print("child", os.getpid(), flush=True)
    sys.stdin.readline()
print("received", handler.received.name, flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(sys.platform != "linux", reason="needs the Linux kernel")
def test_the_end_of_a_parent_that_passes_nothing_on_is_noted():
    with start(["python", "-c", PARENT, CHILD]) as parent:
        parent.wait_for(r"child \d+")
        parent.send_signal(signal.SIGKILL)
        parent.wait_for("SIGTERM: finishing this step and saving")
        parent.type("\n")  # which the child reads, whose standard input is its parent's
        parent.wait_for("received SIGTERM")


BUSY = """
import hashlib
from gpt2ft.distributed.signals import SignalHandler
with SignalHandler().listening():
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # one call of minutes, in which Python looks at no signal
"""


def test_a_second_ctrl_c_in_a_long_call_ends_it():
    """In one that lets other threads run, as a backward pass does."""
    with start(["python", "-c", BUSY]) as process:
        process.wait_for("begins")
        process.send_signal(signal.SIGINT)
        process.wait_for("SIGINT: finishing this step")
        process.send_signal(signal.SIGINT)
        process.finish(code=128 + signal.SIGINT)
