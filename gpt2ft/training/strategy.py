"""Model and optimizer on the processes: a full copy on each (DDP), or in shards (FSDP2, ZeRO).

The loop, the checkpoints, the samples and the exports see no difference: a strategy updates the model by the gradients
that the backward passes have added up, and gathers the model and Adam's moments in full. All processes must call it
together, as gathering is a collective.

Weights, gradients, their sums over processes and Adam's moments are float32 in every strategy. Under bf16 and fp16
matrices are multiplied in these by torch.autocast: FSDP's and DeepSpeed's own mixed precision, which round the
parameters of norms and the sums of gradients too, are off. In fp16 Accelerate's scaler multiplies the loss; `update`
divides the gradient by its scale before anything else is done with it.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2ft.checkpoint import MOMENTS
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.accelerator import autocast, device_sum, dtype_of, is_deepspeed
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import cast_frozen_matrices, load_trainable_parameters, trainable_parameters
from gpt2ft.training.preflight import PreflightError, check_same_parameters

Moments = Mapping[str, Mapping[str, Tensor]]  # exp_avg and exp_avg_sq, by parameter name


class Strategy(Protocol):
    """A model and its optimizer, ready to train.

    Attributes:
        model: TargetLogProbs, wrapped for training.
        optimizer: its learning rate must be set before the backward pass, because DeepSpeed updates within it.
    """

    model: nn.Module
    optimizer: Any

    def update(self) -> float:
        """Clip the gradient, step unless it is not finite, and clear it. Return its norm before clipping."""

    def full_model(self) -> GPT2 | None:
        """Return the model with its current weights on the main process, None on the others.

        Callers may move it to another device and back, but not change it: it may be the model in training.
        """

    def moments(self) -> Moments:
        """Return Adam's moments in full on the main process, an empty mapping on the others.

        An update, or `load_moments`, must have come before.
        """

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        """Make the next update the one after `updates` others, with these moments; None stands for zeros.

        An update must have come before, such as the memory probe's: optimizers allocate moments in their first.
        """


def prepare(
    accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Strategy:
    """Wrap a model, with the weights it is to start from, and its optimizer for the strategy that was launched.

    Raises:
        LaunchError: if the wrapped model is not of that strategy.
        PreflightError: if the optimizer or the head would see other parameters than the model.
    """
    kinds = {"ddp": DDP, "fsdp2": FSDP2, "zero2": ZeRO2, "zero3": ZeRO3}
    asked = launch_checks.strategy()
    strategy = kinds[asked](accelerator, model, optimizer, max_grad_norm)
    launch_checks.check_wrapped(asked, strategy.model, accelerator.num_processes)
    return strategy


def cast_frozen(accelerator: Any, gpt2: GPT2) -> None:
    """Cast frozen matrices to bf16 or fp16 where they are multiplied in it: half the memory, the same products.

    DeepSpeed holds all parameters in one type, so there they are only rounded, as embeddings are looked up in them too:
    it is the same run.
    """
    cast_frozen_matrices(gpt2, dtype_of(accelerator))
    if is_deepspeed(accelerator):
        cast_frozen_matrices(gpt2, torch.float32)


class DDP:
    """The full model on each process. Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel".

    With a single process it is the model itself.
    """

    def __init__(
        self, accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.is_main = accelerator.is_main_process
        self.gpt2 = model.gpt2
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._check_parameters(model)

    def _check_parameters(self, model: TargetLogProbs) -> None:
        check_same_parameters(model, self.model)

    def update(self) -> float:
        self.accelerator.unscale_gradients(self.optimizer)  # of fp16; it does nothing in other precisions
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = float(_full(norm))
        # One NaN would make Adam's moments NaN for good.
        if math.isfinite(norm):
            self.optimizer.step()  # and the scaler's, after it
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # has found what is not finite, and lowers the scale
        self.optimizer.zero_grad()
        return norm

    def full_model(self) -> GPT2 | None:
        return self.gpt2 if self.is_main else None

    def moments(self) -> Moments:
        state = self.optimizer.state

        def gather(parameter: Tensor, moment: str) -> Tensor:
            is_allocated = moment in state.get(parameter, {})  # by the first update
            return _full(state[parameter][moment] if is_allocated else torch.zeros_like(parameter))

        return _moments(self.gpt2, gather, self.is_main)

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        self.optimizer.state.clear()
        if moments is None:
            return
        is_fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for name, parameter in trainable_parameters(self.gpt2).items():
            # The fused kernel reads the step on the device, the others on the CPU.
            step = torch.tensor(float(updates), device=parameter.device if is_fused else "cpu")
            self.optimizer.state[parameter] = {"step": step} | {
                moment: _sharded_like(parameter, moments[moment][name]) for moment in MOMENTS
            }


class FSDP2(DDP):
    """Parameters, gradients and moments in shards; each block is gathered when it runs.

    Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", in its second form,
    `torch.distributed.fsdp.fully_shard`: parameters keep their names, and each is sharded along its rows.
    """

    def __init__(
        self, accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._full_copy = _full_copy_on_main(accelerator, model.gpt2)
        model.forward = autocast(accelerator)(model.forward)  # Accelerate does so under DDP, but not under FSDP2
        super().__init__(accelerator, model, optimizer, max_grad_norm)

    def _check_parameters(self, model: TargetLogProbs) -> None:
        """Compare names: shards are new parameters, and a table untied by wrapping would have a second name."""
        if [name for name, _ in self.model.named_parameters()] != self._names:
            raise PreflightError("FSDP has changed the names of the parameters")

    def _to_shards(self) -> None:
        """Free gathered parameters, so that model and optimizer hold the same shards.

        A forward pass without a backward pass leaves the parameters outside the blocks gathered.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_model(self) -> GPT2 | None:
        self._to_shards()
        return _fill(self._full_copy, self.gpt2, lambda parameter: _full(parameter.detach()))

    def moments(self) -> Moments:
        self._to_shards()
        return super().moments()

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        self._to_shards()
        super().load_moments(moments, updates)


class ZeRO2:
    """Gradients and moments in shards, the model in full on each process: ZeRO stage 2.

    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", by DeepSpeed, whose
    engine clips and updates inside the last backward pass of a step.
    """

    def __init__(
        self, accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._rank = accelerator.process_index
        self._full_copy = _full_copy_on_main(accelerator, model.gpt2)
        self.gpt2 = model.gpt2
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._zero = self.optimizer.optimizer  # DeepSpeed's wrapper, in Accelerate's
        self._adam = self._zero.optimizer
        self._check_gradients(accelerator)

    def _check_gradients(self, accelerator: Any) -> None:
        """Have DeepSpeed drop a step if a gradient is not finite on any process.

        Its own check depends on version, stage, types and offloading. So each gradient is looked at as the backward
        pass gives it, and our answer is given where DeepSpeed takes its decision in every one of them.
        """
        self._largest = torch.zeros((), device=accelerator.device)  # in size, of the step's gradients; NaN if one is
        self._has_updated: bool | None = None  # unless DeepSpeed has asked
        decide = self._zero._update_scale

        def look(gradient: Tensor) -> None:
            largest = torch.linalg.vector_norm(gradient, math.inf, dtype=torch.float32)
            self._largest = torch.maximum(self._largest, largest)

        def decide_with_ours(overflow: bool) -> None:
            found = device_sum(accelerator, (~self._largest.isfinite()).double())
            self._zero.overflow = overflow or bool(found)
            self._has_updated = not self._zero.overflow  # its own check sees norms that are too large for float32
            decide(self._zero.overflow)

        for parameter in trainable_parameters(self.gpt2).values():
            parameter.register_hook(look)
        self._zero._update_scale = decide_with_ours

    def update(self) -> float:
        """Return the norm of the update that the last backward pass has made already; NaN if it has made none."""
        has_updated, self._has_updated = self._has_updated, None
        self._largest.zero_()
        if has_updated is None:
            raise PreflightError("this version of DeepSpeed updates weights unasked: install one that is supported")
        return float(self.model.get_global_grad_norm()) if has_updated else math.nan

    def full_model(self) -> GPT2 | None:
        from deepspeed.utils import safe_get_full_fp32_param

        return _fill(self._full_copy, self.gpt2, safe_get_full_fp32_param)

    def moments(self) -> Moments:
        from deepspeed.utils import safe_get_full_optimizer_state

        return _moments(self.gpt2, safe_get_full_optimizer_state, self._rank == 0)

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        self._link_moments()
        for name, parameter in trainable_parameters(self.gpt2).items():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, moments[moment][name] if moments else None)
        for state in self._adam.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(updates))

    def _link_moments(self) -> None:
        """Have DeepSpeed note again where each parameter's moments lie.

        It does so as soon as the first group of parameters is updated, when the second has no moments yet (0.19.8).
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor | None) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        full = torch.zeros_like(parameter) if value is None else value.to(parameter.device)
        safe_set_full_optimizer_state(parameter, full, moment)


class ZeRO3(ZeRO2):
    """Parameters in shards too; those of each module are gathered when it runs: ZeRO stage 3."""

    def _link_moments(self) -> None:
        """Do nothing: in stage 3 moments lie beside their shard."""

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor | None) -> None:
        """Set this process's shard: equal parts of a parameter's elements, the last one padded."""
        from deepspeed.utils import safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        local = torch.zeros(size, device=parameter.ds_tensor.device)
        if value is not None:
            mine = value.flatten()[self._rank * size : (self._rank + 1) * size]
            local[: len(mine)] = mine
        safe_set_local_optimizer_state(parameter, local, moment)


def _full_copy_on_main(accelerator: Any, gpt2: GPT2) -> GPT2 | None:
    """Return a copy in the main process's CPU memory, which `_fill` gives the weights gathered from shards."""
    if not accelerator.is_main_process:
        return None
    full = copy.deepcopy(gpt2.cpu()).eval()  # on the device there may be no room for two
    gpt2.to(accelerator.device)
    return full


def _fill(full: GPT2 | None, shards: GPT2, gather: Callable[[Tensor], Tensor]) -> GPT2 | None:
    """Load the current weights into the full copy, gathered one by one: a device never holds a second model."""
    weights = {}
    for name, parameter in trainable_parameters(shards).items():
        tensor = gather(parameter)
        if full is not None:
            weights[name] = tensor.cpu()
    if full is not None:
        load_trainable_parameters(full, weights)
    return full


def _moments(gpt2: GPT2, gather: Callable[[Tensor, str], Tensor], is_main: bool) -> Moments:
    """Gather Adam's moments one by one; the main process alone keeps them."""
    found: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in trainable_parameters(gpt2).items():
        for moment in MOMENTS:
            tensor = gather(parameter, moment)
            if is_main:
                found[moment][name] = tensor.cpu()
    return found if is_main else {}


def _full(tensor: Tensor) -> Tensor:
    """Gather the shards of a tensor on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_like(parameter: Tensor, full: Tensor) -> Tensor:
    """Return a full tensor, which every process has, in the layout and on the device of a parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        shard = distribute_tensor(full, mesh, placements, src_data_rank=None)
        return shard.to(parameter.device)  # the parameter may be offloaded
    return full.to(parameter.device)
