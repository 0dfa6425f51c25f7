"""Damage that checkpoints suffer: a function for each kind of ACCIDENTS, at random where there is a choice."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import save, stamp

from gpt2ft import checkpoint
from gpt2ft.checkpoint_verification import MAX_JSON_BYTES

TENSORS = checkpoint.TENSOR_FILES
FILES = (*TENSORS, "state.json", "manifest.json")


@dataclass
class Case:
    """The checkpoints that a kind of damage works on.

    Attributes:
        newest, older: two checkpoints of one run.
        outside: a folder beside theirs, for what links and payloads may reach; it has a checkpoint in it, whole.
    """

    newest: Path
    older: Path
    outside: Path
    random: random.Random

    def any(self, names: tuple[str, ...] = FILES) -> Path:
        return self.newest / self.random.choice(names)


# --- what disks, copies and kills do --------------------------------------------------------------------------------


def bit_flipped(case: Case) -> None:
    file = case.any()
    data = bytearray(file.read_bytes())
    data[case.random.randrange(len(data))] ^= 1 << case.random.randrange(8)
    file.write_bytes(data)


def cut_short(case: Case) -> None:
    file = case.any()
    os.truncate(file, case.random.randrange(1, file.stat().st_size - 1))  # a manifest may lack its last newline


def extended(case: Case) -> None:
    with open(case.any(), "ab") as handle:
        handle.write(case.random.randbytes(case.random.randrange(1, 65)) + b"\0")


def emptied(case: Case) -> None:
    case.any().write_bytes(b"")


def zeros_written(case: Case) -> None:
    """Write zeros, as where a block never reached the disk."""
    file = case.any()
    data = bytearray(file.read_bytes())
    start = case.random.randrange(len(data) - 16)
    data[start : start + 16] = bytes(16)
    file.write_bytes(data)


def missing(case: Case) -> None:
    case.any().unlink()


def half_deleted(case: Case) -> None:
    for name in case.random.sample(FILES, case.random.randrange(2, len(FILES) + 1)):
        (case.newest / name).unlink()


def swapped(case: Case) -> None:
    one, other = (case.newest / name for name in case.random.sample(FILES, 2))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def file_of_the_older(case: Case) -> None:
    name = case.random.choice(FILES)
    shutil.copy(case.older / name, case.newest / name)


# --- manifests ------------------------------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON file in place; a change that returns something gives the whole new content."""
    values = json.loads(file.read_text())
    replaced = change(values)
    file.write_text(json.dumps(values if replaced is None else replaced))


def manifest_no_json(case: Case) -> None:
    texts = [b"", b"{", b"\xff\xfe{}", b"tea", b"{'a': 1}", "{}".encode("utf-16"), case.random.randbytes(200)]
    (case.newest / "manifest.json").write_bytes(case.random.choice(texts))


def manifest_of_another_type(case: Case) -> None:
    value = case.random.choice([list(FILES[:-1]), [], {}, "model.safetensors", 1, 1e400, None, True])
    (case.newest / "manifest.json").write_text(json.dumps(value))


def manifest_entry(case: Case) -> None:
    """One entry is of a wrong type, or states what cannot be."""

    def change(manifest):
        name = case.random.choice(FILES[:-1])
        entry = manifest[name]
        manifest[name] = case.random.choice(
            [None, [], "x", list(entry.values()), {}, {"bytes": entry["bytes"]}, {"sha256": entry["sha256"]}]
            + [entry | {"bytes": wrong} for wrong in (-1, 0, 1e400, None, True, str(entry["bytes"]), 10**40, [1])]
            + [entry | {"bytes": float(entry["bytes"])}, entry | {"also": 1}]
            + [
                entry | {"sha256": wrong}
                for wrong in ("", None, 0, ["f" * 64], "f" * 64, entry["sha256"].upper() + "=")
            ]
        )

    rewrite(case.newest / "manifest.json", change)


PATHS = ("../x", "/etc/passwd", "..", ".", "", "a/b", "model.safetensors/", "./state.json", "x\0", "x\n", "\ud800", "x")


def manifest_with_another_name(case: Case) -> None:
    def change(manifest):
        name = case.random.choice((*PATHS, f"../{case.older.name}/state.json", str(case.outside / "secret")))
        manifest[name] = manifest[case.random.choice(FILES[:-1])]

    rewrite(case.newest / "manifest.json", change)


def manifest_with_a_path_for_a_name(case: Case) -> None:
    """The files it points at are there, with the content that it states."""

    def change(manifest):
        name = case.random.choice(FILES[:-1])
        there = case.random.choice([f"../{case.newest.name}/{name}", str(case.newest / name), f"./{name}"])
        manifest[there] = manifest.pop(name)

    rewrite(case.newest / "manifest.json", change)


def manifest_lacks_a_name(case: Case) -> None:
    rewrite(case.newest / "manifest.json", lambda manifest: manifest.pop(case.random.choice(FILES[:-1])) and None)


# --- what the manifest states, and is wrong all the same --------------------------------------------------------------


def step_of_another(case: Case) -> None:
    rewrite(case.newest / "state.json", lambda saved: saved["state"].update(step=case.random.randrange(5, 10**9)))
    stamp(case.newest)


def format_of_another(case: Case) -> None:
    wrong = case.random.choice([0, 2, 10**30, -1, "1", 1.0, None, True, [1]])
    rewrite(case.newest / "state.json", lambda saved: saved.update(format=wrong))
    stamp(case.newest)


def state_field(case: Case) -> None:
    """A field that is missing, unknown, of another type, negative, not finite or more than can be."""

    def change(saved):
        state = saved["state"]
        name = case.random.choice(list(state))
        if case.random.random() < 0.2:
            del state[name]
        elif case.random.random() < 0.1:
            state["also"] = 1
        else:
            wrong = ["4", [4], {}, True, -1, 10**40, float("nan"), float("inf"), 1e400, "\ud800" * 999]
            wrong += [] if name == "best_loss" else [4.0, 5, -(10**40)]
            state[name] = case.random.choice(wrong)

    rewrite(case.newest / "state.json", change)
    stamp(case.newest)


def state_of_another_type(case: Case) -> None:
    def change(saved):
        whole = case.random.choice([[], None, 1, "state", {}, [saved], {"state": saved["state"], "format": 1}])
        part, value = case.random.choice(("state", "identity")), case.random.choice([[], None, 1, "x", [1]])
        extra = case.random.choice([saved | {part: value}, saved | {"also": 1}])
        return case.random.choice([{"format": 1, "state": saved}, extra, whole]) or "nothing"

    rewrite(case.newest / "state.json", change)
    stamp(case.newest)


def state_no_json(case: Case) -> None:
    texts = [b"{", b"\xff\xfe{}", b"tea", "{}".encode("utf-16"), b"!!python/object/apply:os.system ['touch x']"]
    (case.newest / "state.json").write_bytes(case.random.choice([*texts, case.random.randbytes(99)]))
    stamp(case.newest)


def deep_json(case: Case) -> None:
    depth = case.random.choice([33, 500, 990, 10_000, 1_000_000])
    opening, closing = case.random.choice([("[", "]"), ('{"a":', "}")])
    deep = opening * depth + "1" + closing * depth
    name = case.random.choice(["state.json", "manifest.json"])
    whole = json.loads((case.newest / name).read_text())
    shape = case.random.choice(["%s", '{"format": 1, "identity": %s, "state": ' + json.dumps(whole.get("state")) + "}"])
    (case.newest / name).write_text(shape % deep)
    if name == "state.json":
        stamp(case.newest)


def large_json(case: Case) -> None:
    name = case.random.choice(["state.json", "manifest.json"])
    size = MAX_JSON_BYTES + case.random.randrange(1, 10**6)
    filler = case.random.choice([b" ", b"[],", b"9", b'"'])
    with open(case.newest / name, "r+b") as handle:
        start = b"" if filler == b" " else b"["
        handle.write(start + filler * size)
        if case.random.random() < 0.5:
            handle.truncate(2**33)  # sparse: it takes no room on the disk, and would in memory
    if name == "state.json" and (case.newest / name).stat().st_size < 2**30:
        stamp(case.newest)


def file_of_another_run(case: Case) -> None:
    """A whole file of a whole checkpoint of the same step, of a model of another shape."""
    other = save(case.outside / "other_run", 4, width=case.random.randrange(5, 40))
    for name in case.random.sample(TENSORS, case.random.randrange(1, len(TENSORS))):
        shutil.copy(other / name, case.newest / name)
    stamp(case.newest)


def not_finite(case: Case) -> None:
    def change(tensors):
        flat = tensors[case.random.choice(list(tensors))].view(-1)
        flat[case.random.randrange(len(flat))] = case.random.choice([float("nan"), float("inf"), float("-inf")])

    rewrite_tensors(case.any(TENSORS), change)
    stamp(case.newest)


def negative_square(case: Case) -> None:
    def change(tensors):
        flat = tensors[case.random.choice(list(tensors))].view(-1)
        flat[case.random.randrange(len(flat))] = -case.random.random() - 1e-3

    rewrite_tensors(case.newest / "exp_avg_sq.safetensors", change)
    stamp(case.newest)


def rewrite_tensors(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def another_dtype(case: Case) -> None:
    dtype = case.random.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool])
    several = case.random.random() < 0.3
    for file in [case.newest / name for name in TENSORS] if several else [case.any(TENSORS)]:
        rewrite_tensors(file, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    stamp(case.newest)


def another_name(case: Case) -> None:
    def change(tensors):
        name = case.random.choice(list(tensors))
        how = case.random.randrange(4)
        if how != 0:
            tensors[case.random.choice(["x", f"{name}.", "../x", "\n", "é" * 500])] = tensors[name].clone()
        if how != 1:
            del tensors[name]
        if how == 3:
            tensors.clear()

    rewrite_tensors(case.any(TENSORS), change)
    stamp(case.newest)


def another_shape(case: Case) -> None:
    def change(tensors):
        shapes = [(4, 5), (20,), (1, 5, 4), (2, 2, 5), (5, 4, 1), (0,), (5, 3), (6, 4)]
        tensors["wte"] = torch.ones(case.random.choice(shapes))

    rewrite_tensors(case.any(TENSORS), change)
    stamp(case.newest)


ACCIDENTS = (
    bit_flipped,
    cut_short,
    extended,
    emptied,
    zeros_written,
    missing,
    half_deleted,
    swapped,
    file_of_the_older,
    manifest_no_json,
    manifest_of_another_type,
    manifest_entry,
    manifest_with_another_name,
    manifest_with_a_path_for_a_name,
    manifest_lacks_a_name,
    step_of_another,
    format_of_another,
    state_field,
    state_of_another_type,
    state_no_json,
    deep_json,
    large_json,
    file_of_another_run,
    not_finite,
    negative_square,
    another_dtype,
    another_name,
    another_shape,
)
