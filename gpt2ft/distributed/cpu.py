"""FSDP2, DeepSpeed and fp16 on the CPUs of one machine, to test what GPUs will do.

Accelerate knows them on GPUs only. Asked for FSDP on CPUs it trains by DDP without a word, and in float32 where it is
asked for fp16; DeepSpeed gets a process group of which Accelerate sees one process, and compiles an operator that
nothing here needs. Each is set right below and nowhere else. On a machine whose GPUs are used nothing here runs.
"""

import os
import sys
from typing import Any

import torch

from gpt2ft.distributed.rendezvous import COLLECTIVE_TIMEOUT


def prepare_for_fsdp() -> None:
    """Have Accelerate take FSDP's path, which it opens to several GPUs alone."""
    from accelerate.state import DistributedType, PartialState

    _name_cpu_as_accelerator()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.pop("ACCELERATE_USE_CPU", None)  # Accelerate would read it again


def prepare_for_deepspeed() -> Any:
    """Return the process group to ask for; leave out the operator that is compiled for sums within one machine."""
    _name_cpu_as_accelerator()
    import deepspeed.comm  # noqa: F401
    from accelerate.utils import InitProcessGroupKwargs

    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would switch DeepSpeed off
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the name in the package is another module's
    return InitProcessGroupKwargs(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def prepare_for_fp16(accelerator: Any) -> None:
    """Give Accelerate the scaler that it makes for GPUs alone, and have it cast."""
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True


def _name_cpu_as_accelerator() -> None:
    """Keep DeepSpeed, which Accelerate imports for FSDP too, from warning that it has found no GPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
