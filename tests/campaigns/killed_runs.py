"""Kills training runs at random moments and starts them again; what they end in must be equal in every bit.

    OMP_NUM_THREADS=1 python tests/campaigns/killed_runs.py [KILLS] [SEED] [--steps 12] [--only LoRA]

50 kills by default, by SIGKILL, from the first moment on: at a moment drawn at random, or the first after it at which
the run is in a phase drawn at random, as some are short. Runs with all weights and with LoRA take turns, with dropout,
evaluation and samples. Each is started again by the same settings until it has finished. Then `model/`, `best/`,
`adapter/`, the last checkpoint and every logged figure but the speed must be those of a run that was left alone, no
step missing and none twice. Exits with 1 where something did not hold. tests/campaigns/test_checkpoints.py runs a
sample.
"""

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

import accelerate  # noqa: F401 (so that no child has to import it again, as the two below)
import torch
import torch._dynamo
import torch.utils.tensorboard

from gpt2ft import checkpoint, quickstart
from gpt2ft.distributed import accelerator
from gpt2ft.runs import finish, lock, train, train_sft
from gpt2ft.runs import main as scripts
from gpt2ft.runs.evaluation import HeldOutEvaluation
from gpt2ft.settings.scripts import SFTSettings

KINDS = {"all weights": {}, "LoRA": {"rank": 4}}
PHASES: dict[str, tuple[Any, str]] = {
    "setting up": (train, "set_up"),
    "looking for a checkpoint": (checkpoint, "find_newest"),
    "training": (train, "fit"),
    "evaluating": (HeldOutEvaluation, "__call__"),
    "saving": (checkpoint, "save"),
    "pruning": (checkpoint, "prune"),
    "exporting": (finish, "export"),
}
BETWEEN = "between these"


class Phase:
    """What a child is doing, in a byte that its parent sees too."""

    def __init__(self) -> None:
        self.byte = mmap.mmap(-1, 1)
        self.names = [BETWEEN, *PHASES]

    def clear(self) -> None:
        self.byte[0] = 0

    def name(self) -> str:
        return self.names[self.byte[0]]

    def watch(self) -> None:
        """From now on, in this process."""
        for number, (owner, name) in enumerate(PHASES.values(), start=1):
            setattr(owner, name, self._noted(number, getattr(owner, name)))

    def _noted(self, number: int, function: Callable) -> Callable:
        def noted(*arguments: Any, **options: Any) -> Any:
            outer, self.byte[0] = self.byte[0], number
            try:
                return function(*arguments, **options)
            finally:
                self.byte[0] = outer

        return noted


class Campaign:
    """Runs below one folder, which share a model of 2 layers x 32 and the tokenised quickstart."""

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        self.folder, self.steps = folder, steps
        self.random, self.phase = random.Random(seed), Phase()
        self.model = folder / "tiny"
        self.model.mkdir()
        for name in ("vocab.json", "merges.txt"):
            (self.model / name).write_bytes((quickstart.MODEL / name).read_bytes())
        config = json.loads((quickstart.MODEL / "config.json").read_text())
        tiny = {"n_ctx": 256, "n_positions": 256, "n_embd": 32, "n_head": 2, "n_layer": 2}
        (self.model / "config.json").write_text(json.dumps(config | tiny))

    def settings(self, kind: str, output: Path) -> SFTSettings:
        return SFTSettings(
            model={"path": str(self.model), "random_init": True, "dropout": 0.1},
            lora=KINDS[kind],
            data={
                "train": ["quickstart"],
                "eval": ["quickstart:held_out"],
                "max_rank": 1,
                "max_length": 256,
                "cache": str(self.folder / "cache"),
            },
            training={
                "steps": self.steps,
                "tokens_per_micro_batch": 512,
                "micro_batches_per_step": 3,
                "eval_every": 3,
                "save_every": 2,
                "log_every": 1,
                "sample_prompts": 1,
                "sample_tokens": 8,
            },
            optimizer={"learning_rate": 1e-2},
            output=str(output),
        )

    def start(self, kind: str, output: Path) -> int:
        """Starts a run in a process of its own; what it prints goes to a file beside its folder."""
        self.phase.clear()
        child = os.fork()
        if child == 0:
            self._be_child(kind, output)
        return child

    def _be_child(self, kind: str, output: Path) -> NoReturn:
        with open(output.with_suffix(".log"), "ab", buffering=0) as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        torch.set_num_threads(1)
        accelerator.available_cores = lambda: 1
        self.phase.watch()
        try:
            scripts.run(train_sft.run, self.settings(kind, output))
            code = 0
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def whole(self, kind: str) -> tuple[Path, float]:
        """A run that is left alone, and the seconds it takes."""
        folder = self.folder / f"whole {kind}"
        began = monotonic()
        _, status = os.waitpid(self.start(kind, folder), 0)
        if status:
            raise SystemExit(f"a run that was left alone ended with {status}: {said_last(folder)}")
        return folder, monotonic() - began

    def killed(self, kind: str, output: Path, seconds: float) -> str | None:
        """Starts a run and kills it within so many seconds or later: in which phase, None if it ended before."""
        child = self.start(kind, output)
        aim = self.random.choice([None, None, *PHASES])
        status = wait(child, self.random.uniform(0, seconds), lambda: aim in (None, self.phase.name()))
        if status is None:
            phase = self.phase.name()
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if status == signal.SIGKILL:
            return phase
        self.check_ended(output, status)
        return None

    def let_end(self, kind: str, output: Path, seconds: float) -> None:
        child = self.start(kind, output)
        status = wait(child, 60 * seconds)
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        self.check_ended(output, status)

    def is_finished(self, output: Path) -> bool:
        return (output / "model" / "config.json").is_file()

    def check_ended(self, output: Path, status: int) -> None:
        if status or not self.is_finished(output):
            raise SystemExit(f"{output.name} ended with {status}: {said_last(output)}")


def wait(child: int, seconds: float, is_time: Callable[[], bool] = lambda: True) -> int | None:
    """How the child has ended (see os.waitpid), or None once so many seconds have passed and `is_time` says so."""
    ends = monotonic() + seconds
    while monotonic() < ends or not is_time():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        sleep(0.001)
    return None


def said_last(output: Path) -> str:
    return " | ".join(output.with_suffix(".log").read_text(errors="replace").splitlines()[-3:])


def differences(found: Path, expected: Path) -> list[str]:
    """In what two finished runs differ, although they must not."""
    different = []
    for name in ("model", "best", "adapter"):
        if contents(found / name) != contents(expected / name):
            different.append(f"{name}/ differs")
    newest, last = (checkpoint.find_newest(run / "checkpoints", verbose=True) for run in (found, expected))
    if newest is None or newest.name != last.name or contents(newest) != contents(last):
        different.append(f"the last checkpoint differs: {newest}")
    for folder in checkpoint.folders(found / "checkpoints"):
        checkpoint.verify(folder)
    if logged(found) != logged(expected):
        different.append(f"metrics.jsonl differs: {[line['step'] for line in logged(found)]}")
    finished = [json.loads((run / "manifest.json").read_text())["finished"] for run in (found, expected)]
    if finished[0] != finished[1]:
        different.append(f"finished in {finished[0]} instead of {finished[1]}")
    hidden = {path.name for path in (*found.glob(".*"), *(found / "checkpoints").glob(".*"))}
    if leftovers := sorted(hidden - {lock.NAME}):
        different.append(f"left behind: {leftovers}")
    return different


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for its model card, which names the run."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "README.md")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def logged(run: Path) -> list[dict]:
    """All that was logged, in its order, but when and how fast."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("time", "train/tokens_per_second")} for line in lines
    ]


def check_whole(run: Path, steps: int) -> None:
    """Raises AssertionError unless a run that was left alone is one with which others can be compared."""
    trained = [line["step"] for line in logged(run) if "train/loss" in line]
    assert trained == list(range(1, steps + 1)), trained
    assert any("eval/loss" in line for line in logged(run)), logged(run)
    assert len(contents(run / "model")) > 3
    assert checkpoint.find_newest(run / "checkpoints", verbose=True).name == f"step-{steps:08d}"


def run(kills: int, seed: int, steps: int, kinds: list[str]) -> list[str]:
    """Kills, prints the figures, and returns what did not hold."""
    problems, phases, finished, most = [], Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), steps, seed)
        wholes = {kind: campaign.whole(kind) for kind in kinds}
        for whole, _ in wholes.values():
            check_whole(whole, steps)
        print(
            "left alone: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, (_, seconds) in wholes.items()), flush=True
        )
        began = monotonic()
        while phases.total() < kills:
            kind = kinds[finished.total() % len(kinds)]
            output, (whole, seconds) = campaign.folder / f"run {finished.total()}", wholes[kind]
            here = 0
            while phases.total() < kills and (phase := campaign.killed(kind, output, seconds)):
                phases[phase] += 1
                here += 1
            if not campaign.is_finished(output):
                campaign.let_end(kind, output, seconds)
            found = differences(output, whole)
            problems += [f"{kind}, run {finished.total()}, killed {here} times: {different}" for different in found]
            finished[kind] += 1
            most = max(most, here)
        print(f"{phases.total()} kills in {monotonic() - began:.0f} s, at most {most} of one run")
        print(", ".join(f"{phase} {count}" for phase, count in phases.most_common()))
        print("finished: " + ", ".join(f"{kind} {count}" for kind, count in finished.items()))
        print(f"{len(problems)} differences from runs that were left alone")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=list(KINDS))
    asked = parser.parse_args()
    problems = run(asked.kills, asked.seed, asked.steps, [asked.only] if asked.only else list(KINDS))
    print("\n".join(["all held" if not problems else f"{len(problems)} problems:", *problems[:50]]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
