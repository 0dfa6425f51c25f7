"""What has the CPU wait for a GPU: told by the GPU's own warnings there, and from the operators where there is none."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def counted_waits(device: torch.device, copies: bool = False) -> Iterator[list[str]]:
    """Give a list that at the end of the block holds where, or by which operator, the CPU has waited each time.

    Args:
        copies: where there is no GPU, count copies to and from the device too: all tensors then belong on it.
    """
    if device.type != "cuda":
        with HostWaits() as waits, Copies(waits.found) if copies else nullcontext():
            yield waits.found
        return
    found: list[str] = []
    warns_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(warns_always)
    found += [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


class HostWaits(TorchDispatchMode):
    """Counts what has the CPU wait for a GPU: numbers that are read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        masks = [index for index in arguments[1] if index is not None] if name in ("index", "index_put_") else []
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")
        if name in reads or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


class Copies(TorchFunctionMode):
    """Counts what would have the CPU wait for a copy, as seen in how it is called: lists of numbers, either way."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        places = [value for value in (*arguments[1:], keywords.get("device")) if isinstance(value, (torch.device, str))]
        makes = name in ("tensor", "as_tensor") and keywords.get("device") is not None
        moves = name in ("to", "cpu", "cuda") and (places or name != "to") and not keywords.get("non_blocking")
        index = arguments[1] if name in ("__getitem__", "__setitem__") else ()
        lists = any(isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,)))
        if name == "tolist" or makes or moves or lists:
            self.found.append(name)
        return function(*arguments, **keywords)
