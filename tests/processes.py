"""Start what a test needs in processes of its own: scripts of the project, launchers, short programs.

All are started in the same way: in the root of the repository unless told otherwise, with no GPU, no launcher around
them and one thread, with a limit of time; and nothing that they have started outlives them.

    done = run(["python", "launch/sft.py", "quickstart"], GPT2FT_CACHE=folder)
    with start([*torchrun(2), "launch/sft.py"], **ON_CPU) as started:
        started.wait_for("step 3/")
        started.send_signal(signal.SIGTERM)
        assert started.finish(code=75).errors == [...]

What must come about outside of this process, and tells nobody, is looked for with `wait_until`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from time import monotonic, sleep
from typing import IO, Any, Self

import psutil

ROOT = Path(__file__).parents[1]
SECONDS = 300.0  # until a test gives up
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
OF_LAUNCHERS = (
    *("ACCELERATE_", "FSDP_", "OMPI_", "PMI_", "MV2_", "SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
)


def torchrun(num_processes: int, *options: Any) -> list[Any]:
    """Return the words before a script that is to run in some processes of this machine."""
    return ["torchrun", "--standalone", "--nproc_per_node", num_processes, *options]


def environment(**changes: Any) -> dict[str, str]:
    """Return the variables of this process without those of launchers, with `changes`; None takes one away."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    given = {"PATH": programs, "PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1} | changes
    return {name: str(value) for name, value in (kept | given).items() if value is not None}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return what `condition()` gives once that is true of it; fail after so many seconds."""
    ends = monotonic() + seconds
    while not (found := condition()):
        assert monotonic() < ends, f"not within {seconds} s"
        sleep(0.02)
    return found


@dataclass(frozen=True)
class Ended:
    """The end of a process: its exit code, and all that it has printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def printed(self) -> str:
        return self.stdout + self.stderr

    @property
    def errors(self) -> list[str]:
        """The lines by which our scripts say why they end."""
        return [line for line in self.printed.splitlines() if line.startswith("error")]


def run(
    words: Sequence[Any],
    code: int | None = 0,
    seconds: float = SECONDS,
    typed: str = "",
    cwd: Path = ROOT,
    **changes: Any,
) -> Ended:
    """Start a command and wait for its end.

    Args:
        words: of the command; a program is looked for where this Python's own programs are first.
        code: the exit code that it must end with; None if any will do.
        typed: what it reads from its standard input.
        cwd: the folder that it starts in.
        changes: to the environment.
    """
    with start(words, cwd, **changes) as started:
        started.type(typed)
        return started.finish(code, seconds)


def start(words: Sequence[Any], cwd: Path = ROOT, **changes: Any) -> "Started":
    """Start a command; leaving the context ends it. Arguments as of `run`."""
    return Started([str(word) for word in words], cwd, environment(**changes))


class Started:
    """A process under way. What it prints is read as it comes, so that it never waits for a reader."""

    def __init__(self, command: list[str], cwd: Path, variables: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=cwd, env=variables, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self._printed = (bytearray(), bytearray())
        self._news = Condition()
        streams = zip((self._process.stdout, self._process.stderr), self._printed, strict=True)
        self._readers = [Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[bytes], printed: bytearray) -> None:
        while data := stream.read1():
            with self._news:
                printed += data
                self._news.notify_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._printed[0].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._printed[1].decode(errors="replace")

    def wait_for(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Return the match of a pattern once what the process has printed, on either stream, holds one."""
        found = None

        def is_there() -> bool:
            nonlocal found
            found = re.search(pattern, self.stdout) or re.search(pattern, self.stderr)
            return found is not None or not any(reader.is_alive() for reader in self._readers)

        ends = monotonic() + seconds
        with self._news:
            while not is_there() and monotonic() < ends:
                self._news.wait(1.0)  # the end of a reader is no news
        assert found is not None, f"no {pattern!r} in\n{self.stdout}\n{self.stderr}"
        return found

    def type(self, text: str) -> None:
        """Give it something to read."""
        with suppress(BrokenPipeError):  # it has ended
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def finish(self, code: int | None = 0, seconds: float = SECONDS) -> Ended:
        """Wait until it has ended by itself, with nothing more to read."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            found = self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it takes longer than {seconds} s:\n{self.stdout}\n{self.stderr}") from error
        for reader in self._readers:
            reader.join(60.0)  # what it leaves behind may still hold the pipe
        assert code in (None, found), f"exit code {found}\n{self.stdout[-3000:]}\n{self.stderr[-5000:]}"
        return Ended(found, self.stdout, self.stderr)

    def kill(self) -> None:
        """End it and all that it has started."""
        left = self.descendants()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in left:  # launchers give their processes groups of their own
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        for reader in self._readers:
            reader.join(10.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(BrokenPipeError):
                stream.close()
