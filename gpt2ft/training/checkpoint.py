"""Canonical checkpoints: float32 parameters and Adam moments by parameter name, JSON for the rest.

    checkpoints/step-00000100/
        model.safetensors        every parameter that is trained
        exp_avg.safetensors      Adam's mean of the gradients
        exp_avg_sq.safetensors   Adam's mean of their squares
        state.json               where the run stands
        manifest.json            size and sha256 of each of the above, written last

A folder takes its final name only when it is complete and on the disk; older ones are pruned after that.
Nothing in it depends on a backend or a number of processes, and nothing of it is ever unpickled.
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from gpt2ft.files import complete_folder, file_digest, write_json, write_safetensors

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; says which and why."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. `step` is the number of steps done: the position in the plan."""

    step: int = 0
    updates: int = 0  # steps that changed the weights: the others had a gradient that was not finite
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # lowest evaluation loss so far
    best_step: int | None = None
    evaluated_step: int | None = None  # the last step after which evaluation ran

    def after_step(self, updated: bool) -> "TrainState":
        if updated:
            return replace(self, step=self.step + 1, updates=self.updates + 1, skipped_in_a_row=0)
        return replace(self, step=self.step + 1, skipped_in_a_row=self.skipped_in_a_row + 1)

    def after_evaluation(self, loss: float | None) -> "TrainState":
        """`loss` is None without held-out data."""
        after = replace(self, evaluated_step=self.step)
        if loss is None or not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return after
        return replace(after, best_loss=loss, best_step=self.step)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(
    root: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    state: TrainState,
    identity: dict,
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        weights: every parameter that is trained, by name.
        moments: of each of them, by the names in MOMENTS.
        identity: what must be equal for a run to continue from here (settings and digests).

    Raises:
        OSError: if it could not be written; older checkpoints are untouched then.
    """
    folder = step_folder(root, state.step)
    with complete_folder(folder) as temporary:
        write_safetensors(temporary / "model.safetensors", weights)
        for moment in MOMENTS:
            write_safetensors(temporary / f"{moment}.safetensors", moments[moment])
        write_json(temporary / "state.json", {"format": FORMAT, "state": asdict(state), "identity": identity})
        files = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files}
        write_json(temporary / "manifest.json", manifest)
    return folder


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Removes all checkpoints but the newest `keep` and the best."""
    for folder in folders(root)[keep:]:
        if best_step is None or folder != step_folder(root, best_step):
            discarded = folder.with_name(f".{folder.name}.old")
            folder.rename(discarded)  # a kill in the middle leaves no folder with a checkpoint's name
            shutil.rmtree(discarded)


def folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def find_newest(root: Path, verbose: bool) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named and the one before it taken.

    Raises:
        CheckpointError: if there are checkpoints, but none is whole. A run never starts anew in silence.
    """
    candidates = folders(root)
    for folder in candidates:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            if verbose:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {root} is whole: pass `--resume never`")
    return None


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file is there with the content the manifest states."""
    manifest_file = folder / "manifest.json"
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        expected = {"model.safetensors", "state.json", *(f"{moment}.safetensors" for moment in MOMENTS)}
        if set(manifest) != expected:
            raise CheckpointError(f"{manifest_file} must list {sorted(expected)}, but lists {sorted(manifest)}")
        for name, entry in manifest.items():
            file = folder / name
            if file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
                raise CheckpointError(f"{file} is damaged: its content is not what the manifest states")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error


def read_state(folder: Path) -> tuple[TrainState, dict]:
    """Where the run stood, and its identity."""
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {saved.get('format')}, but this version reads {FORMAT}")
    return TrainState(**saved["state"]), saved["identity"]


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def read_moments(folder: Path) -> dict[str, dict[str, Tensor]]:
    """exp_avg and exp_avg_sq, by parameter name."""
    return {moment: load_file(folder / f"{moment}.safetensors") for moment in MOMENTS}


def difference(saved: dict, current: dict, prefix: str = "") -> str | None:
    """The first key in which two identities differ, with both values; None if they are equal."""
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found = difference(before, now, f"{prefix}{key}.")
            if found:
                return found
        elif before != now:
            return f"`{prefix}{key}` was {before!r} and is now {now!r}"
    return None
