"""Canonical checkpoints: float32 parameters and Adam moments by parameter name, JSON for the rest.

    checkpoints/step-00000100/
        model.safetensors        every parameter that is trained
        exp_avg.safetensors      Adam's mean of the gradients
        exp_avg_sq.safetensors   Adam's mean of their squares
        state.json               the position of the run, the sums of its next line of metrics, and its identity
        manifest.json            size and sha256 of each of the above, written last

A folder takes its final name only when it is complete and on the disk; older ones are pruned after that.
Nothing in it depends on a backend or a number of processes, and nothing of it is ever unpickled.
"""

import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2ft.checkpoint_verification import (
    CheckpointError,
    check_kind,
    check_manifest,
    check_tensors,
    manifest_entry,
    read_json,
    shown,
)
from gpt2ft.errors import reason
from gpt2ft.files import complete_folder, discard, write_json, write_safetensors
from gpt2ft.wording import counted

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
TENSOR_FILES = tuple(f"{part}.safetensors" for part in ("model", *MOMENTS))


@dataclass(frozen=True)
class TrainState:
    """Position of a run, and the best that its evaluations have found so far."""

    step: int = 0  # steps done: the position in the plan
    updates: int = 0  # steps that changed the weights: the others had a gradient that was not finite
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # lowest evaluation loss so far
    best_step: int | None = None
    evaluated_step: int | None = None  # the last step after which evaluation ran
    evaluations_since_best: int = 0  # in a row, none of them better
    sums: Mapping[str, float] = field(default_factory=dict)  # of the steps since the last logged line, if saved then
    scaler: Mapping[str, float] = field(default_factory=dict)  # of fp16, see distributed/accelerator.py

    def after_step(self, updated: bool, scaler: Mapping[str, float] | None = None) -> "TrainState":
        """Return the state one step later.

        Args:
            updated: False if the step changed no weights. It is not counted in a row if its loss had too large a scale
                in fp16, and the next one has half of it. From 1 down there is another reason.
            scaler: the state of fp16's scaler after the step; empty in other precisions.
        """
        scaler = scaler or {}
        overflowed = 1 <= scaler.get("loss_scale", 0) < self.scaler.get("loss_scale", math.inf)
        skipped = 0 if updated else self.skipped_in_a_row + (not overflowed)
        updates = self.updates + updated
        return replace(self, step=self.step + 1, updates=updates, skipped_in_a_row=skipped, scaler=scaler)

    def after_evaluation(self, loss: float | None) -> "TrainState":
        """Return the state after an evaluation; `loss` is None without held-out data, and the best only if finite."""
        after = replace(self, evaluated_step=self.step)
        if loss is None:
            return after
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(after, best_loss=loss, best_step=self.step, evaluations_since_best=0)
        return replace(after, evaluations_since_best=self.evaluations_since_best + 1)

    @classmethod
    def from_json(cls, values: Any) -> "TrainState":
        """Return the state whose `asdict` was written to a file.

        Raises:
            ValueError: if no run can stand there.
        """
        names = [field.name for field in fields(cls) if field.name not in ("sums", "scaler")]
        added = {"evaluations_since_best": 0, "sums": {}, "scaler": {}}  # which earlier versions have not
        if not isinstance(values, dict) or added.keys() | values.keys() != {*names, "sums", "scaler"}:
            raise ValueError(f"`state` must hold {', '.join(names)}, but holds {shown(values)}")
        values = added | values
        for name in ("sums", "scaler"):
            numbers = values[name]
            if not isinstance(numbers, dict) or not all(type(value) is float for value in numbers.values()):
                raise ValueError(f"`state.{name}` must be an object of numbers, but is {shown(numbers)}")
        scaler = values["scaler"]
        is_whole = {*scaler} == {"loss_scale", "steps_at_loss_scale"} and scaler["loss_scale"] > 0
        if scaler and not (is_whole and all(0 <= value < math.inf for value in scaler.values())):
            raise ValueError(f"`state.scaler` must be empty, or a scale above 0 and steps, but is {shown(scaler)}")
        step, loss = values["step"], values["best_loss"]
        if type(step) is not int or step < 0:
            raise ValueError(f"`state.step` must be a whole number that is not negative, but is {shown(step)}")
        for name in names:
            may_be_absent = name in ("best_step", "evaluated_step") and values[name] is None
            is_count = type(values[name]) is int and 0 <= values[name] <= step
            if name != "best_loss" and not may_be_absent and not is_count:
                raise ValueError(f"`state.{name}` must be a whole number up to {step}, but is {shown(values[name])}")
        if values["updates"] + values["skipped_in_a_row"] > step:
            raise ValueError(f"`state.updates` must leave room for the skipped steps, but is {values['updates']}")
        if loss is not None and not (type(loss) is float and math.isfinite(loss)):
            raise ValueError(f"`state.best_loss` must be a finite number, but is {shown(loss)}")
        if (loss is None) != (values["best_step"] is None):
            raise ValueError("`state.best_loss` and `state.best_step` must both be there, but one is null")
        return cls(**values)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(
    root: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    state: TrainState,
    identity: dict,
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        weights: every parameter that is trained, by name.
        moments: of each of them, by the names in MOMENTS.
        identity: settings and digests that must be equal for a run to continue from here.

    Raises:
        OSError: if it could not be written; older checkpoints are untouched then.
    """
    folder = step_folder(root, state.step)
    with complete_folder(folder) as temporary:
        write_safetensors(temporary / "model.safetensors", weights)
        for moment in MOMENTS:
            write_safetensors(temporary / f"{moment}.safetensors", moments[moment])
        write_json(temporary / "state.json", {"format": FORMAT, "state": asdict(state), "identity": identity})
        manifest = {file.name: manifest_entry(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", manifest)
    return folder


def prune(root: Path, keep: int, best_step: int | None, also: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest `keep`, the best, and those of the steps `also`.

    The newest by step are kept, and the newest by time of writing: after a run has resumed from before a damaged
    checkpoint, new ones have an earlier step than that one, and must not be removed in its favour.
    """
    if keep < 1:
        raise ValueError(f"`keep` must be at least 1, but is {keep}")
    found = folders(root)
    written = sorted(found, key=_written_at, reverse=True)
    kept = {_name(step) for step in (best_step, *also)}
    for folder in found:
        if folder not in found[:keep] and folder not in written[:keep] and folder.name not in kept:
            discard(folder)


def folders(root: Path) -> list[Path]:
    """Return the checkpoints under `root`, newest first, damaged ones too."""
    return [path for path in _entries(root) if _is_named(path) and path.is_dir() and not path.is_symlink()]


def find_newest(root: Path, verbose: bool) -> Path | None:
    """Return the newest checkpoint that is whole, or None if there has never been one.

    A damaged one is named on stderr and the one before it taken.

    Raises:
        CheckpointError: if `root` cannot be read, or holds names like a checkpoint's and nothing whole: a run never
            starts anew in silence.
    """
    entries = _entries(root)
    for entry in entries:
        try:
            verify(entry)
            return entry
        except CheckpointError as error:
            if verbose:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if entries:
        raise CheckpointError(
            f"of {counted(len(entries), 'checkpoint')} in {root} none is whole: pass `--resume never`"
        )
    return None


def verify(folder: Path) -> None:
    """Raise CheckpointError unless a checkpoint has the content that its manifest states, and a run can use it."""
    check_kind(folder, "a folder")
    check_manifest(folder / "manifest.json", {*TENSOR_FILES, "state.json"})
    state, _ = read_state(folder)
    if folder.name != _name(state.step):
        raise CheckpointError(f"{folder} must be named {_name(state.step)}, after the step in its state.json")
    check_tensors(*(folder / name for name in TENSOR_FILES))


def read_state(folder: Path) -> tuple[TrainState, dict]:
    """Return the state of the run and its identity.

    Raises:
        CheckpointError: if state.json is not in this version's format.
    """
    file = folder / "state.json"
    saved = read_json(file)
    found = saved.get("format") if isinstance(saved, dict) else None
    if repr(found) != repr(FORMAT):  # == takes 1.0 and True for 1
        raise CheckpointError(
            f"{file} must have the checkpoint format {FORMAT} of this version, but has {shown(found)}"
        )
    if saved.keys() != {"format", "state", "identity"} or not isinstance(saved["identity"], dict):
        raise CheckpointError(f"{file} must hold `format`, `state` and an object `identity`, but holds {shown(saved)}")
    try:
        return TrainState.from_json(saved["state"]), saved["identity"]
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every parameter that is trained, by name, from a checkpoint that was verified.

    Raises:
        CheckpointError: if they cannot be read.
    """
    return read_tensors(folder / "model.safetensors")


def read_moments(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return exp_avg and exp_avg_sq by parameter name, from a checkpoint that was verified.

    Raises:
        CheckpointError: if they cannot be read.
    """
    return {moment: read_tensors(folder / f"{moment}.safetensors") for moment in MOMENTS}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name; raise CheckpointError if they cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}") from error


def difference(saved: dict, current: dict) -> str | None:
    """Return the first key in which two identities differ, with both values, in words; None if they are equal."""
    found = next(differences(saved, current), None)
    return found and "`{}` was {!r} and is now {!r}".format(*found)


def differences(saved: dict, current: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every key in which two identities differ, under its dotted name, with both values."""
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}", before, now


def _name(step: int | None) -> str | None:
    return None if step is None else step_folder(Path(), step).name


def _entries(root: Path) -> list[Path]:
    """Return all entries named like a checkpoint, latest step first: also files, links and renamed folders."""
    try:
        found = [path for path in root.iterdir() if path.name.startswith("step-")]
    except FileNotFoundError as error:
        if root.is_symlink():
            raise CheckpointError(f"{root} is a link to nothing") from error
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}") from error
    return sorted(found, key=lambda path: (_step_in(path), _is_named(path), path.name), reverse=True)


def _step_in(path: Path) -> int:
    digits = re.match(r"step-(\d{1,18})", path.name, re.ASCII)
    return int(digits[1]) if digits else -1


def _is_named(path: Path) -> bool:
    """Return True if the name is one that `save` gives, False for one such as step-1 or step-00000001.bak."""
    return path.name == _name(_step_in(path))


def _written_at(folder: Path) -> int:
    """Return the time of a checkpoint's last file, in nanoseconds; before all others if it is missing."""
    try:
        return (folder / "manifest.json").stat().st_mtime_ns
    except OSError:
        return -1
