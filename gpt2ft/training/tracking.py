"""Progress and metrics of a run: a progress bar or lines, metrics.jsonl and trackers. Main process only."""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2ft.checkpoint import TrainState
from gpt2ft.errors import SettingsError, reason
from gpt2ft.files import write_text
from gpt2ft.text.display import fit, uses_colour
from gpt2ft.training.trackers import log_text, start_trackers

BAR = "step {n_fmt}/{total_fmt} {bar} {percentage:3.0f}%, {remaining} left{postfix}"
LINES_LEFT = 20  # over a run, above the bar
INDENT = 4  # of a line too long for the terminal


class Tracker:
    """Writer of metrics and texts under the run's folder.

    Args:
        state: that the run goes on from. Lines of what it does not know of, left by a run that was killed, are removed.
        active: False makes every call do nothing, so that callers need not ask for their rank.
    """

    def __init__(self, folder: Path, state: TrainState, steps: int, settings: dict[str, Any], active: bool) -> None:
        self.active = active
        if not active:
            return
        from tqdm import tqdm

        metrics = folder / "metrics.jsonl"
        start = state.step
        _keep_known(metrics, state)
        self._metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._trackers = start_trackers(folder, start, settings)
        self._bar = tqdm(
            total=steps, initial=start, bar_format=BAR, disable=not sys.stderr.isatty(), dynamic_ncols=True,
            colour="cyan" if uses_colour(sys.stderr) else None,
        )  # fmt: skip
        self._steps, self._left_at = steps, start

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.active:
            self._bar.update()

    def log(self, step: int, metrics: dict[str, float | str]) -> None:
        """Write an object to metrics.jsonl and scalars to the trackers. In JSON, null stands for what is not finite."""
        if not self.active:
            return
        now = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = now | {name: as_json(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        scalars = {name: value for name, value in metrics.items() if "/" in name}  # the others are positions
        self._tell(lambda tracker: tracker.log(scalars, step=step))

    def show(self, step: int, metrics: dict[str, float], seconds_left: float) -> None:
        """Show the newest training metrics as a line; in a terminal beside the bar, and now and then as a line too."""
        if not self.active:
            return
        loss, speed = f"loss {metrics['train/loss']:.4f}", f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{loss}, {speed}", refresh=False)
        shares_terminal = sys.stdout.isatty() and not self._bar.disable
        if shares_terminal and (step - self._left_at) * LINES_LEFT < self._steps and step < self._steps:
            return
        self._left_at = step
        left = self._bar.format_interval(seconds_left)
        self.print_line(f"step {step:>{len(str(self._steps))}}/{self._steps}  {loss}  {speed}  {left} left")

    def log_text(self, step: int, name: str, text: str) -> None:
        """Write a text to the trackers."""
        if self.active:
            self._tell(lambda tracker: log_text(tracker, step, name, text))

    def print_line(self, line: str = "") -> None:
        """Print a line above the bar."""
        if self.active:
            self._bar.clear()
            print(fit(line, INDENT), flush=True)
            self._bar.refresh()

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._metrics.close()
            self._tell(lambda tracker: tracker.finish())

    def _tell(self, tell: Callable[[Any], None]) -> None:
        """Tell each tracker something. One that fails, as its server may, is named and left out from then on."""
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                problem = f"{tracker.name} takes no more ({reason(error)}); the run goes on, and metrics.jsonl has all"
                print(f"\nwarning: {problem}", file=sys.stderr)


def as_json(value: float | str) -> float | str | None:
    """Return a value as it stands in metrics.jsonl."""
    return value if isinstance(value, str) or math.isfinite(value) else None


def training_lines(metrics: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of metrics.jsonl that are of training, by step; raise SettingsError if they are no run's."""
    return _lines_with("train/loss", metrics)


def held_out_lines(metrics: Path) -> dict[int, dict[str, Any]]:
    """Return those that are of held-out data."""
    return _lines_with("eval/loss", metrics)


def _lines_with(name: str, metrics: Path) -> dict[int, dict[str, Any]]:
    try:
        lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
        return {line["step"]: line for line in lines if name in line}
    except (ValueError, LookupError, TypeError) as error:
        raise SettingsError(f"{metrics} must hold the lines that a run wrote, but does not: {error}") from error


def line_digests(metrics: Path) -> list[str]:
    """Return a digest of each line of metrics.jsonl."""
    return [hashlib.sha256(line).hexdigest()[:16] for line in metrics.read_bytes().splitlines()]


def _keep_known(metrics: Path, state: TrainState) -> None:
    """Drop the lines that the run writes again: of later steps, of later evaluations, and one cut off by a kill."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            is_evaluation = any(name.startswith("eval/") for name in values)
            if state.step and values["step"] <= ((state.evaluated_step or 0) if is_evaluation else state.step):
                kept.append(line + "\n")  # a new start evaluates step 0 again, any other never does
        except (ValueError, KeyError):
            continue
    write_text(metrics, "".join(kept))
