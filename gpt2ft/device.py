"""The device that is computed on: found or refused, its precision, what compiling for it takes, the CPU's cores.

Training, benchmark, evaluation, chat and server all ask here.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from gpt2ft.errors import Gpt2ftError, is_first_on_machine
from gpt2ft.system import bound_cores

TRUE = ("1", "true", "t", "yes", "y", "on")  # in variables of Accelerate
DEVICE_FILES = ("dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so*")
OF_DRIVER, OF_PCI = "proc/driver/nvidia/gpus/*", "sys/bus/pci/devices/*"
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor and class in PCI
OLDEST_FOR_TRITON = (7, 0)  # compute capability

PrecisionName = Literal["fp32", "bf16", "fp16"]
# Caches of 1024 products by shape, 0.25 MiB each, one of oneDNN and one of every thread of PyTorch: 1.5 GB where the
# attention of each stream has shapes of its own. Kept or made again, a product takes the same time.
CACHES_OF_SHAPES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
SHAPES_KEPT = 128

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceError(Gpt2ftError):
    """A GPU that is there and cannot be used."""


def to_device(numbers: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on a device, which is not waited for: a copy of pinned memory does not block."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


# --- CPU or GPU -----------------------------------------------------------------------------------------------------


def device_type() -> Literal["cuda", "mps", "cpu"]:
    """Return what is computed on: a GPU if PyTorch can use one, unless the CPU was asked for.

    Apple's GPUs (mps) have no float64, so sums lie on the CPU beside them (distributed/accelerator.py), and no
    collectives, so several processes are on the CPU.
    """
    if asks_for_cpu():
        return "cpu"
    if torch.cuda.is_available() and torch.cuda.device_count() > 0:
        return "cuda"
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return "mps" if is_alone and torch.backends.mps.is_available() else "cpu"


def on_cuda() -> bool:
    """Return True if an NVIDIA GPU is computed on."""
    return device_type() == "cuda"


def asks_for_cpu() -> bool:
    """Return True if the environment asks for the CPU: by Accelerate's variable, or by hiding every GPU."""
    hides_all = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return hides_all or os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


def check_gpu() -> None:
    """Check that a GPU is used where there is one, unless the CPU was asked for.

    Raises:
        DeviceError: saying why PyTorch cannot use it.
    """
    if asks_for_cpu():
        return
    if on_cuda():
        gpu, problem = torch.cuda.get_device_name(_device()), _why_it_fails()
    else:
        gpu = find_gpu(is_for_cpus=_is_for_cpus())
        problem = gpu and _why_not_available()
    if problem:
        raise DeviceError(
            f"this machine has a GPU ({gpu}), but PyTorch {torch.__version__} cannot use it: {problem}; or set "
            "ACCELERATE_USE_CPU=true to compute on the CPU"
        )


def find_gpu(root: Path = Path("/"), is_for_cpus: bool = False) -> str | None:
    """Return the file by which the system shows an NVIDIA GPU, with or without a driver; None if it shows none.

    Args:
        is_for_cpus: PyTorch is a build for CPUs, as in the container of the server, which sees in /proc and /sys what
            its host has: then the device itself must be there.
    """
    files = [file for pattern in DEVICE_FILES for file in root.glob(pattern)]
    if not is_for_cpus:
        files += [*root.glob(OF_DRIVER), *_pci_gpus(root)]
    return str(files[0]) if files else None


def _pci_gpus(root: Path) -> Iterator[Path]:
    for device in root.glob(OF_PCI):
        try:
            vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor.strip() == NVIDIA and kind.startswith(DISPLAY):
            yield device


def _is_for_cpus() -> bool:
    return torch.version.cuda is None and torch.version.hip is None


def _why_not_available() -> str:
    """Return why PyTorch sees no GPU, in its own words where it has some, and what to do."""
    if _is_for_cpus():
        return "it is built for CPUs; install a build for CUDA (https://pytorch.org/get-started/locally)"
    reason = ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0].strip().rstrip(".")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f" CUDA_VISIBLE_DEVICES is {shown!r}: name one that is there." if shown is not None else ""
    return (
        f"{reason or 'no device is visible'} (built for CUDA {torch.version.cuda}, driver {_driver() or 'not loaded'})."
        f"{hidden} Install or update NVIDIA's driver, take a build of PyTorch for the CUDA version of this driver, or, "
        "in a container, start that with --gpus all"
    )


def _driver(root: Path = Path("/")) -> str | None:
    """Return the version of NVIDIA's kernel module, such as 535.54.03."""
    try:
        found = re.search(r"Module.*?(\d+\.[\d.]+)", (root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found and found[1]


def _why_it_fails() -> str:
    """Run one kernel on the GPU of this process; return why it failed, such as a card that the build has none for."""
    try:
        torch.zeros(1, device=_device()).add_(1).item()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0].strip()
    return ""


def _device() -> torch.device:
    """Return the GPU that Accelerate gives this process."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


# --- precision ------------------------------------------------------------------------------------------------------


def choose_precision(asked: str, without_bf16: PrecisionName = "fp16") -> PrecisionName:
    """Return the precision of matrix products; auto is bf16 on GPUs that have it, `without_bf16` on other NVIDIA GPUs,
    and fp32 otherwise.

    A GPU without bf16 emulates it: that is done where it is asked for, and said. From here on no product in float32 is
    rounded to TF32, and few products in bf16 on a CPU are kept by their shapes.

    Raises:
        DeviceError: if an Apple GPU is to compute in anything but fp32.
    """
    # Vendors' images let it be: checks in float32 would fail, and fp32 would not be fp32.
    torch.set_float32_matmul_precision("highest")
    for capacity in CACHES_OF_SHAPES:  # read at the first product in bf16 on a CPU
        os.environ.setdefault(capacity, str(SHAPES_KEPT))
    if device_type() == "mps" and asked not in ("auto", "fp32"):
        raise DeviceError(
            f"on Apple's GPUs `precision` must be fp32, but is {asked}: leave it out, or set ACCELERATE_USE_CPU=true"
        )
    if asked in ("fp32", "fp16") or not on_cuda():
        return "fp32" if asked == "auto" else asked
    with torch.cuda.device(_device()):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name()
    chosen = "bf16" if has_bf16 or asked == "bf16" else without_bf16
    if not has_bf16 and is_first_on_machine():
        remedy = {"fp32": ", which takes more memory", "bf16": ", emulated: `precision fp16` should be faster"}
        print(f"warning: {name} has no bf16: computing in {chosen}{remedy.get(chosen, '')}", file=sys.stderr)
    return chosen


# --- compiling ------------------------------------------------------------------------------------------------------


def compiler_problem() -> str | None:
    """Return why nothing can be compiled for the GPU here, and what to do; None if it can.

    Triton builds a module for Python in C whenever it meets a new driver or an empty cache. So does this, in the same
    way, because a compiler without Python's or C's headers is no less common than none.
    """
    if problem := _switched_off():
        return problem
    if find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    if torch.cuda.get_device_capability() < OLDEST_FOR_TRITON:
        return f"Triton compiles for compute capability 7.0 and newer, but {torch.cuda.get_device_name()} is older"
    return _c_compiler_problem()


def cpp_compiler_problem() -> str | None:
    """Return why nothing can be compiled for the CPU here, and what to do; None if it can."""
    if problem := _switched_off():
        return problem
    compiler = os.environ.get("CXX") or "g++"  # as PyTorch has it
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}: install g++"


def _switched_off() -> str | None:
    for switch in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(switch) == "1":
            return f"{switch}=1 switches compiling off: leave it out"
    return None


def _c_compiler_problem() -> str | None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "there is no C compiler" + (f" {compiler}, which CC names" if compiler else "") + ": install gcc"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does, for Debian
    headers = sysconfig.get_path("include", scheme)
    with TemporaryDirectory() as folder:
        source = Path(folder, "module.c")
        source.write_text("#include <Python.h>\n")
        command = [compiler, source, "-shared", "-fPIC", f"-I{headers}", "-o", source.with_suffix(".so")]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode == 0:
        return None
    said = built.stderr.splitlines() or [f"it ends with {built.returncode}"]
    first = next((line for line in said if "error" in line), said[0]).strip()
    return (
        f"{compiler} cannot build a module for Python ({first}): install the headers of Python "
        f"{sysconfig.get_python_version()} and of C, on Debian `apt-get install python3-dev libc6-dev`"
    )


def hardware() -> dict[str, str | int]:
    """Return the kind of hardware that this process computes on, as far as bits depend on it."""
    if on_cuda():
        return {"device": torch.cuda.get_device_name(_device()), "cuda": str(torch.version.cuda)}
    if device_type() == "mps":
        return {"device": f"Apple GPU, {platform.machine()}, macOS {platform.mac_ver()[0]}"}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": f"CPU, {platform.machine()}, {instructions}", "threads": torch.get_num_threads()}


# --- cores ----------------------------------------------------------------------------------------------------------


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may keep busy: those it is bound to, within its cgroups' quotas."""
    # Of 2.5 cores 2: threads beyond a quota are all stopped together, while others wait for them.
    return max(1, int(min([bound_cores(), *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each cgroup around this process allows, in version 2 and 1; a container may see itself as
    the root, or under the path of its host."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                if controllers:
                    quota, period = ((top / folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (top / folder / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    yield int(quota) / int(period)
            except (OSError, ValueError):  # this cgroup has no quota, or is not shown here
                continue
