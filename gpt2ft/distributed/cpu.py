"""FSDP2 and DeepSpeed on the CPUs of one machine: to test here what several GPUs will do.

Accelerate knows both on GPUs only. Asked for FSDP on CPUs it trains by DDP without a word; DeepSpeed gets a process
group of which Accelerate sees one process, and compiles an operator that nothing here needs. Each is set right below,
before the Accelerator is made, and nowhere else. On a machine with GPUs that are used, nothing here runs.
"""

import os
import sys
from typing import Any


def ready_for_fsdp() -> None:
    """Has Accelerate take FSDP's path, which it opens to several GPUs alone."""
    from accelerate.state import DistributedType, PartialState

    _say_nothing_of_the_cpu()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would be asked again


def ready_for_deepspeed() -> Any:
    """Leaves out the compiled operator (of faster sums within one machine); the process group to be asked for."""
    _say_nothing_of_the_cpu()
    import deepspeed.comm  # noqa: F401
    from accelerate.utils import InitProcessGroupKwargs

    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would switch DeepSpeed off
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the name in the package is another module's
    return InitProcessGroupKwargs(backend="gloo")


def _say_nothing_of_the_cpu() -> None:
    """DeepSpeed, which Accelerate imports for FSDP too, warns that it has found no GPU unless it is told so."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
