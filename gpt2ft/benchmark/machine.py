"""Limits of this machine: products of matrices, copies, and the peak that a share is of."""

import time
from collections.abc import Callable

import torch

PEAKS = {  # bf16 with sums in float32, without sparsity, TFLOP/s, by NVIDIA's data sheets; an A10G's is 70 in practice
    "A10G": 70, "A10": 125, "L4": 121, "L40S": 362, "A100": 312, "H100": 989, "H200": 989, "GH200": 989,
}  # fmt: skip
ROWS, INNER, COLUMNS = 4096, 768, 3072  # the product of a stream with a matrix of gpt2's MLP


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of matrices of a model's shapes."""
    # Random: of ones a GPU draws less power, and is faster than it will be.
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((ROWS, INNER), (INNER, COLUMNS)))
    return 2 * ROWS * INNER * COLUMNS / _fastest(device, lambda: left @ right)


def copied_bytes(device: torch.device) -> float:
    """Return the bytes/s of a copy within the device's memory, those read and those written."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(device, lambda: target.copy_(source))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the published peak of this card in bf16; None where none is known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    found = [peak for card, peak in PEAKS.items() if card in name.replace("-", " ").split()]
    return found[0] * 1e12 if found else None


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """Return how long some work takes, until the device has done it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def _fastest(device: torch.device, work: Callable[[], object], times: int = 5) -> float:
    in_a_row = 1 if device.type == "cpu" else 50  # a GPU needs tens of microseconds for one, no more than to be asked

    def many() -> None:
        for _ in range(in_a_row):
            work()

    return min(seconds_of(device, many) for _ in range(times)) / in_a_row
