"""Kill a process hundreds of times while it saves checkpoints, before or after one of its file operations.

    python tests/campaigns/killed_saves.py [KILLS] [SEED] [--every 1]

200 by default, each by SIGKILL at an operation drawn at random: also in the middle of a file, between the renames that
replace a folder, and while an older checkpoint is removed. Afterwards whatever has a checkpoint's name must be whole,
the newest be the last that was saved or the one under way, and load with what it had been given. Then the disk refuses
(full, read-only, no rights) at each operation in turn, or at each so many, once or from there on: the error must be one
sentence that names the file, and the same must hold. Exits with 1 where something did not hold.
tests/campaigns/test_checkpoints.py runs a sample.
"""

import argparse
import errno
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NoReturn

from operations import Operations
from small_checkpoints import check_content, save, state_after

from gpt2ft import checkpoint
from gpt2ft.files import remove_leftovers, restore_replaced

KEEP = 2
REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)
SAVES = 3  # that a process makes, at most: the first to replace one, and more so that older ones are removed


@dataclass(frozen=True)
class Ended:
    """The end of a process that was saving.

    Attributes:
        saved: the last step whose checkpoint was complete, or 0.
        begun: the last step whose checkpoint was begun, or 0.
        at: the operation at which it was killed or refused, or "".
        said: the error it ended with, or "".
    """

    was_killed: bool
    saved: int
    begun: int
    at: str
    said: str
    operations: int


def saving(root: Path, tell: Callable[[str], None], operations: Operations) -> None:
    """Start and save as a run does: first the same step once more, as after an evaluation that was left undone."""
    operations.watch()
    restore_replaced(root)
    newest = checkpoint.find_newest(root, verbose=True)
    step = checkpoint.read_state(newest)[0].step if newest else 1
    remove_leftovers(root)
    for following in range(step, step + SAVES):
        tell(f"begun {following}")
        save(root, following)
        tell(f"saved {following}")
        checkpoint.prune(root, KEEP, state_after(following).best_step)


def in_a_child(root: Path, before: Callable, after: Callable) -> Ended:
    """Run `saving` in a process of its own, with what is to happen before and after its operations."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(root, writer, before, after)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        told = [line.rstrip("\n").split(" ", 1) for line in pipe]
    _, status = os.waitpid(child, 0)
    last = dict(told)
    return Ended(
        was_killed=os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        saved=int(last.get("saved", 0)),
        begun=int(last.get("begun", 0)),
        at=last.get("at", ""),
        said=last.get("said", ""),
        operations=int(last.get("operations", 0)),
    )


def _be_child(root: Path, writer: int, before: Callable, after: Callable) -> NoReturn:
    def tell(line: str) -> None:
        os.write(writer, f"{line}\n".encode())

    operations = Operations(root, lambda *call: before(tell, *call), lambda *call: after(tell, *call))
    try:
        saving(root, tell, operations)
    except OSError as error:
        tell(f"said {str(error)!r}")
    except BaseException as error:
        tell(f"said {type(error).__name__}: {error}")
    tell(f"operations {operations.number}")
    os._exit(0)


def nothing(*_: object) -> None:
    pass


def kill_at(number: int) -> Callable:
    def happen(tell: Callable, found: int, name: str, path: object) -> None:
        if found == number:
            tell(f"at {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    return happen


def refuse_at(number: int, code: int, forever: bool) -> Callable:
    def happen(tell: Callable, found: int, name: str, path: object) -> None:
        if found == number or (forever and found > number):
            if found == number:
                tell(f"at {name}")
            raise OSError(code, os.strerror(code))

    return happen


def judge(root: Path, before: int, ended: Ended) -> list[str]:
    """Return what does not hold in the folder.

    Args:
        before: the step of the newest checkpoint before the process began, or 0.
    """
    problems = []
    restore_replaced(root)  # what a run does first
    newest = checkpoint.find_newest(root, verbose=True)
    found = checkpoint.read_state(newest)[0].step if newest else 0
    allowed = {max(before, ended.saved), max(before, ended.begun)}
    if found not in allowed:
        problems.append(f"the newest is that of step {found}, but should be one of {sorted(allowed)}")
    folders = checkpoint.folders(root)
    if len(folders) < min(KEEP, ended.saved):
        problems.append(f"only {len(folders)} are left")
    if len(folders) > KEEP + 2:  # the best, and one that was about to be removed
        problems.append(f"{len(folders)} have piled up")
    for folder in folders:
        try:
            checkpoint.verify(folder)
            check_content(folder)
        except (checkpoint.CheckpointError, AssertionError) as error:
            problems.append(f"not whole: {error}")
    return problems


def newest_step(root: Path) -> int:
    folders = checkpoint.folders(root)
    return checkpoint.read_state(folders[0])[0].step if folders else 0


def killed(root: Path, kills: int, seed: int, problems: list[str]) -> Counter[str]:
    """Kill that often, going on from what each has left, now and then from nothing; return at which operations."""
    draw, counts = random.Random(seed), Counter()
    longest = max(in_a_child(root / "whole", nothing, nothing).operations for _ in range(2))
    if longest < 50:
        problems.append(f"a process makes only {longest} operations: they are not seen")
    run, given_back = 0, 0
    while counts.total() < kills:
        if draw.random() < 0.1:
            run += 1
        folder = root / f"run.{run}"
        before = newest_step(folder)
        when, number = draw.choice(["before", "after"]), draw.randint(1, longest)
        happen = kill_at(number)
        ended = in_a_child(folder, *((happen, nothing) if when == "before" else (nothing, happen)))
        if ended.was_killed:
            counts[ended.at] += 1
        elif ended.said or not ended.operations:
            problems.append(f"ended by itself: {ended}")
            return counts
        given_back += any(not checkpoint.step_folder(folder, step).exists() for step in being_replaced(folder))
        problems += [f"killed {when} {ended.at} {number}: {problem}" for problem in judge(folder, before, ended)]
    print(f"{given_back} of them while one was being replaced, with nothing in its place")
    return counts


def being_replaced(root: Path) -> list[int]:
    """The steps whose checkpoints lie under the hidden name of what is being replaced."""
    return [int(path.name.split(".")[1].removeprefix("step-")) for path in root.glob(".step-*.*.old")]


def refused(root: Path, every: int, seed: int, problems: list[str]) -> Counter[str]:
    """Have the disk refuse at each `every`-th operation in turn, once and from there on; return at which."""
    counts = Counter()
    number = 1 + seed % every
    while True:
        for forever in (False, True):
            folder = root / f"full.{number}.{forever}"
            for step in (1, 2, 3):
                save(folder, step)
            code = REFUSALS[number // every % len(REFUSALS)]
            ended = in_a_child(folder, refuse_at(number, code, forever), nothing)
            if not ended.at:
                return counts
            counts[ended.at] += 1
            where = f"{os.strerror(code)}{' from there on' if forever else ''} at {ended.at} {number}"
            told = ended.said.strip("'\"")
            is_sentence = told.startswith(str(folder)) and told.endswith(os.strerror(code)) and "\\n" not in told
            if ended.said and not is_sentence:
                problems.append(f"{where}: said {ended.said!r}")
            if forever and not ended.said:
                problems.append(f"{where}: went on in silence")
            problems += [f"{where}: {problem}" for problem in judge(folder, 3, ended)]
        number += every


def run(kills: int, seed: int, every: int) -> list[str]:
    """Kill and refuse, print the figures, and return what did not hold."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "first", 1)  # here, so that what this imports is there in every child
        began = monotonic()
        counts = killed(Path(folder), kills, seed, problems)
        print(f"{counts.total()} kills while saving in {monotonic() - began:.0f} s: {len(problems)} problems")
        print("at " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        began, wrong = monotonic(), len(problems)
        counts = refused(Path(folder), every, seed, problems)
        print(f"{counts.total()} refusals in {monotonic() - began:.0f} s: {len(problems) - wrong} problems")
        print("at " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--every", type=int, default=1)
    asked = parser.parse_args()
    problems = run(asked.kills, asked.seed, asked.every)
    print("\n".join(["all held" if not problems else f"{len(problems)} problems:", *problems[:50]]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
