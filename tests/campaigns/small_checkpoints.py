"""Checkpoints of a few hundred bytes whose content follows from their step, for campaigns that make thousands."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpt2ft import checkpoint
from gpt2ft.checkpoint import TrainState

IDENTITY = {"steps": 1000, "training": {"seed": 0}, "initial_weights": "f" * 64}


def content(step: int, width: int = 4) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The weights after a step, and Adam's moments."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"wte": (5, width), "bias": (width,)}
    drawn = [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)]
    return drawn[0], {"exp_avg": drawn[1], "exp_avg_sq": drawn[2]}


def state_after(step: int) -> TrainState:
    best = max(step // 4 * 4, 1)
    return TrainState(step, updates=step, best_loss=2.0, best_step=best, evaluated_step=best)


def save(root: Path, step: int, width: int = 4) -> Path:
    """Save through the function that runs call."""
    weights, moments = content(step, width)
    return checkpoint.save(root, weights, moments, state_after(step), IDENTITY)


def check_content(folder: Path) -> None:
    """Raise AssertionError unless a checkpoint loads and holds what was there after its step."""
    state, identity = checkpoint.read_state(folder)
    assert folder == checkpoint.step_folder(folder.parent, state.step), folder
    weights, moments = content(state.step)
    files = [(checkpoint.read_weights(folder), weights)]
    files += [(load_file(folder / f"{name}.safetensors"), expected) for name, expected in moments.items()]
    assert asdict(state) == asdict(state_after(state.step)), folder
    assert identity == IDENTITY, folder
    for found, expected in files:
        assert found.keys() == expected.keys(), folder
        assert all(torch.equal(found[name], expected[name]) for name in expected), folder


def stamp(folder: Path) -> None:
    """Make the manifest right again, so that what is wrong must be found without it."""
    files = [folder / name for name in (*checkpoint.TENSOR_FILES, "state.json")]
    contents = {file.name: file.read_bytes() for file in files}
    manifest = {
        name: {"bytes": len(bytes_), "sha256": hashlib.sha256(bytes_).hexdigest()} for name, bytes_ in contents.items()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
