"""Progress and metrics of a run: a progress bar or lines, metrics.jsonl and TensorBoard. Main process only."""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from gpt2ft.checkpoint import TrainState
from gpt2ft.files import write_text


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
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        metrics = folder / "metrics.jsonl"
        start = state.step
        _keep_known(metrics, state)
        self._metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self._board.add_text("settings", "```\n" + json.dumps(settings, indent=2) + "\n```", start)
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=start, unit="step", desc="training", disable=not self._is_terminal, dynamic_ncols=True
        )
        self._steps = steps

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.active:
            self._bar.update()

    def log(self, step: int, metrics: dict[str, float | str]) -> None:
        """Write an object to metrics.jsonl and scalars to TensorBoard. In JSON, null stands for what is not finite."""
        if not self.active:
            return
        line = {"step": step} | {name: as_json(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._board.add_scalar(name, value, step)

    def show(self, step: int, metrics: dict[str, float], seconds_left: float) -> None:
        """Show the newest training metrics, beside the bar in a terminal and as a line elsewhere."""
        if not self.active:
            return
        loss, speed = f"{metrics['train/loss']:.4f}", f"{metrics['train/tokens_per_second']:,.0f}"
        if self._is_terminal:
            self._bar.set_postfix_str(f"loss {loss}, {speed} tokens/s")
        else:
            left = f"{int(seconds_left // 60)}:{int(seconds_left % 60):02d} left"
            print(
                f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss}  {speed} tokens/s  {left}", flush=True
            )

    def log_text(self, step: int, name: str, text: str) -> None:
        """Write a text to TensorBoard."""
        if self.active:
            self._board.add_text(name, text, step)

    def print_line(self, line: str = "") -> None:
        """Print a line above the bar."""
        if self.active:
            self._bar.clear()
            print(line, flush=True)
            self._bar.refresh()

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._metrics.close()
            self._board.close()


def as_json(value: float | str) -> float | str | None:
    """Return a value as it stands in metrics.jsonl."""
    return value if isinstance(value, str) or math.isfinite(value) else None


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
