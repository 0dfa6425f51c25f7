"""Checkpoints that are made to hurt: a function for each kind of HOSTILE, like those of damage.py."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import torch
from damage import TENSORS, Case
from small_checkpoints import stamp

from gpt2ft.checkpoint_verification import MAX_JSON_BYTES


class Payload:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def pickled(case: Case) -> None:
    """With the name of another format, with and without the manifest's blessing."""
    file = case.any()
    payload = Payload(case.outside / f"trace-{case.random.randrange(10**9)}")
    if case.random.random() < 0.5:
        torch.save({"wte": payload}, file, _use_new_zipfile_serialization=case.random.random() < 0.5)
    else:
        file.write_bytes(pickle.dumps(payload, protocol=case.random.randrange(6)))
    if file.name != "manifest.json" and case.random.random() < 0.8:
        stamp(case.newest)


def with_header(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def lying_length(case: Case) -> None:
    """Of the header."""
    file = case.any(TENSORS)
    data = file.read_bytes()
    sizes = [
        2**62,
        2**63,
        2**64 - 1,
        10**8,
        MAX_JSON_BYTES,
        len(data),
        len(data) - 8,
        0,
        1,
        case.random.randrange(10**9),
    ]
    file.write_bytes(struct.pack("<Q", case.random.choice(sizes)) + data[8:])
    stamp(case.newest)


def lying_header(case: Case) -> None:
    """Shapes that are not those of the data: enormous, overflowing, negative, overlapping, with holes."""
    data = case.random.randbytes(96)
    four = "[5, 4]"
    bodies = [
        f'{{"wte": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}}}'
        for dtype, shape, start, end in [
            ("F32", "[1000000000000]", 0, 96),
            ("F32", "[4294967296, 4294967296]", 0, 96),
            ("F32", "[9223372036854775807, 2]", 0, 96),
            ("F32", "[-1, 4]", 0, 96),
            ("F32", "[24.0]", 0, 96),
            ("F32", "[0, 1000000000000]", 0, 0),
            ("F32", four, 0, 80),
            ("F32", four, 16, 96),
            ("F32", four, 80, 0),
            ("F32", four, 0, 2**62),
            ("F32", four, -16, 64),
            ("F999", four, 0, 80),
            ("__import__", four, 0, 80),
        ]
    ]
    bodies += ["{}", "[]", "null", "{", "[" * 10_000, '{"a":' * 10_000, '{"__metadata__": {"a": 1}}', "\0" * 64]
    overlapping = {
        name: {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]} for name in ("wte", case.random.choice("bcd"))
    }
    bodies.append(json.dumps(overlapping))
    with_header(case.any(TENSORS), case.random.choice(bodies).encode(), data)
    stamp(case.newest)


def large_header(case: Case) -> None:
    file = case.any(TENSORS)
    entry = '"%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    count = case.random.choice([1000, 80_000])
    body = "{" + ", ".join(entry % number for number in range(count)) + "}"
    if case.random.random() < 0.5:
        body = json.dumps({"__metadata__": {"x": "y" * MAX_JSON_BYTES}})
    with_header(file, body.encode(), b"")
    stamp(case.newest)


def linked_file(case: Case) -> None:
    """A link to a file with the content that the manifest states, or to what should not be read."""
    file = case.any()
    target = case.outside / f"{file.name}.{case.random.randrange(10**9)}"
    shutil.copy(file, target)
    targets = [target, os.path.relpath(target, file.parent), case.older / file.name, file, "/dev/zero", "/dev/null"]
    targets += ["/dev/random", case.outside, f"../{case.older.name}/{file.name}", case.outside / "absent"]
    file.unlink()
    file.symlink_to(case.random.choice(targets))


def linked_folder(case: Case) -> None:
    shutil.rmtree(case.newest)
    whole = case.outside / "whole" / case.newest.name
    targets = [whole, os.path.relpath(whole, case.newest.parent), case.older, case.older.name, case.newest.name]
    case.newest.symlink_to(case.random.choice([*targets, case.outside / "absent", "/", "/dev/zero"]))


def no_file(case: Case) -> None:
    """A folder or a pipe, which would block whoever opens it."""
    file = case.any()
    file.unlink()
    (os.mkfifo if case.random.random() < 0.5 else os.mkdir)(file)


def no_folder(case: Case) -> None:
    shutil.rmtree(case.newest)
    how = case.random.randrange(3)
    if how == 0:
        case.newest.write_bytes(case.random.randbytes(case.random.randrange(100)))
    else:
        (os.mkfifo if how == 1 else os.mkdir)(case.newest)


def another_folder_name(case: Case) -> None:
    """A whole checkpoint under a name that is not its own."""
    names = ["step-4", "step-00000005", "step-00000004.bak", "step-00000004 (copy)"]
    names += [
        "step-0000000004",
        f"step-{case.random.randrange(5, 10**9):08d}",
        f"step-{case.random.randrange(5, 9999)}",
    ]
    case.newest = case.newest.rename(case.newest.with_name(case.random.choice(names)))


HOSTILE = (
    pickled,
    lying_length,
    lying_header,
    large_header,
    linked_file,
    linked_folder,
    no_file,
    no_folder,
    another_folder_name,
)
