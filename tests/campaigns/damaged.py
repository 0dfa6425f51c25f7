"""Damage the newest of two checkpoints in hundreds of ways; each must be named, and the one before it be used.

    python tests/campaigns/damaged.py [VARIANTS] [SEED]

300 by default, no two alike. In each, nothing may be executed, written or removed, and memory must stay small; once the
older one is gone too, the run must refuse to start anew. Prints how many there were of each kind; exits with 1 where
something did not hold. tests/campaigns/test_checkpoints.py runs a sample.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from time import monotonic

from damage import ACCIDENTS, Case
from hostile import HOSTILE
from small_checkpoints import check_content, save

from gpt2ft import checkpoint
from gpt2ft.checkpoint_verification import CheckpointError

KINDS = {function.__name__: function for function in (*ACCIDENTS, *HOSTILE)}
SECONDS = 30  # for one variant: a pipe or /dev/zero would hold whoever opens it for ever
MOST_MEMORY = 256 * 2**20  # bytes that all of them together may add to the largest the process has been
ATTEMPTS = 20  # at a variant that was not there before; then the kind has run dry


class Campaign:
    """One folder in which variants are made and judged, one after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.template, self.run, self.outside = folder / "template", folder / "run", folder / "outside"
        for step in (2, 4):
            save(self.template, step)
        save(self.outside / "whole", 4)
        (self.outside / "secret").write_text("secret")
        self.seen: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        assert checkpoint.find_newest(self.template, verbose=True) == checkpoint.step_folder(self.template, 4)

    def make(self, kind: str) -> Case | None:
        """A variant of this kind that was not there before, or None if none is found."""
        for _ in range(ATTEMPTS):
            shutil.rmtree(self.run, ignore_errors=True)
            shutil.copytree(self.template, self.run)
            newest, older = (checkpoint.step_folder(self.run, step) for step in (4, 2))
            case = Case(newest, older, self.outside, self.random)
            KINDS[kind](case)
            looks = fingerprint(self.run)
            if looks not in self.seen:
                self.seen.add(looks)
                return case
        return None

    def judge(self, kind: str, case: Case) -> None:
        """Note what did not hold."""
        before = fingerprint(self.run.parent)
        number = self.counts[kind]
        try:
            found, said = search(self.run)
            if found != case.older:
                self.problems.append(f"{kind} {number}: {found} was used instead of the older one")
            else:
                check_content(found)
            if said.count("\n") != 1 or not said.startswith("warning: ") or str(case.newest) not in said:
                self.problems.append(f"{kind} {number}: said {said!r}")
            if fingerprint(self.run.parent) != before:
                self.problems.append(f"{kind} {number}: something was written or removed")
            shutil.rmtree(case.older)
            found, _ = search(self.run)
            self.problems.append(f"{kind} {number}: with nothing whole, {found} was used")
        except CheckpointError as error:
            if not str(error).startswith("of 1 checkpoint in") or "\n" in str(error):
                self.problems.append(f"{kind} {number}: ended with {error}")
        except Exception as error:
            self.problems.append(f"{kind} {number}: {type(error).__name__}: {error}")


def search(root: Path) -> tuple[Path | None, str]:
    """Return the checkpoint that is found, and what is printed on stderr."""
    said = StringIO()
    signal.alarm(SECONDS)
    try:
        with redirect_stderr(said):
            return checkpoint.find_newest(root, verbose=True), said.getvalue()
    finally:
        signal.alarm(0)


def fingerprint(folder: Path) -> str:
    """A digest of all names, kinds, links and contents below a folder; of large files, of their beginning."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        digest.update(f"{path.relative_to(folder)}\0{stat.S_IFMT(status.st_mode)}\0".encode())
        if stat.S_ISLNK(status.st_mode):
            digest.update(os.readlink(path).encode())
        elif stat.S_ISREG(status.st_mode):
            with open(path, "rb") as handle:
                digest.update(f"{status.st_size}\0".encode() + handle.read(2**16))
    return digest.hexdigest()


def timed_out(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def run(variants: int, seed: int) -> list[str]:
    """Make and judge them, print the figures, and return what did not hold."""
    began, memory = monotonic(), most_memory()
    before = signal.signal(signal.SIGALRM, timed_out)
    try:
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(Path(folder), seed)
            dry: set[str] = set()
            while campaign.counts.total() < variants and len(dry) < len(KINDS):
                for kind in KINDS:
                    case = campaign.make(kind) if kind not in dry and campaign.counts.total() < variants else None
                    if case:
                        campaign.judge(kind, case)
                        campaign.counts[kind] += 1
                    elif campaign.counts.total() < variants:
                        dry.add(kind)
            if list(campaign.outside.glob("trace*")):
                campaign.problems.append("a pickle was executed")
    finally:
        signal.signal(signal.SIGALRM, before)
    grown = most_memory() - memory
    if grown > MOST_MEMORY:
        campaign.problems.append(f"memory grew by {grown / 2**20:.0f} MiB")
    total, wrong = campaign.counts.total(), len(campaign.problems)
    print(
        f"{total} damaged checkpoints of {len(campaign.counts)} kinds in {monotonic() - began:.0f} s: {wrong} problems"
    )
    print(", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in campaign.counts.items()))
    print(f"peak memory grew by {grown / 2**20:.0f} MiB")
    if total < variants:
        campaign.problems.append(f"only {total} variants differ")
    return campaign.problems


def most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=int, nargs="?", default=300)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    asked = parser.parse_args()
    problems = run(asked.variants, asked.seed)
    print("\n".join(["all held" if not problems else f"{len(problems)} problems:", *problems[:50]]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
