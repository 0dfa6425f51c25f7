"""How a model and its optimizer lie on the processes: one whole copy on each (DDP), or in shards (FSDP2, ZeRO).

The loop, the checkpoints, the samples and the exports see no difference: a strategy makes an update of what the
backward passes have added up, and gives the model and Adam's moments back whole. All processes must ask together.

Weights, gradients, their sums over processes and Adam's moments are float32 on all of them. Under bf16, matrices are
multiplied in bf16 by torch.autocast: FSDP's and DeepSpeed's own mixed precision, which round the parameters of norms
and the sums of gradients too, are off.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2ft.checkpoint import MOMENTS
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.accelerator import autocast, is_deepspeed, precision_of
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import cast_frozen_matrices, load_trainable_parameters, trainable_parameters
from gpt2ft.training.preflight import PreflightError, check_same_parameters

Moments = Mapping[str, Mapping[str, Tensor]]  # exp_avg and exp_avg_sq, by parameter name


class Strategy(Protocol):
    """A model and its optimizer, ready to train.

    Attributes:
        model: TargetLogProbs, wrapped.
        optimizer: whose learning rate is to be set before the backward pass (DeepSpeed updates within it).
    """

    model: nn.Module
    optimizer: Any

    def update(self) -> float:
        """Clips the gradient, steps unless it is not finite, and clears it. Returns its norm before clipping."""

    def full_model(self) -> GPT2 | None:
        """The model as it is now, on the main process; None on the others. Not to be changed, but for its device."""

    def moments(self) -> Moments:
        """Whole, on the main process; empty on the others. There must have been an update, or `load_moments`."""

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        """Has the next update be the one after `updates` others, with these moments; None for zero.

        There must have been an update, such as the rehearsal's.
        """


def prepare(
    accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Strategy:
    """Hands a model, with the weights it is to start from, and its optimizer to what the launcher asked for.

    Raises:
        LaunchError: if that is not what they get.
        PreflightError: if the optimizer or the head would see other parameters than the model.
    """
    kinds = {"ddp": DDP, "fsdp2": FSDP2, "zero2": ZeRO2, "zero3": ZeRO3}
    asked = launch_checks.strategy()
    strategy = kinds[asked](accelerator, model, optimizer, max_grad_norm)
    launch_checks.check_wrapped(asked, strategy.model, accelerator.num_processes)
    return strategy


def cast_frozen(accelerator: Any, gpt2: GPT2) -> None:
    """Frozen matrices in bf16 where they are used in it. Not under DeepSpeed, which holds all in one type."""
    if precision_of(accelerator) == "bf16" and not is_deepspeed(accelerator):
        cast_frozen_matrices(gpt2, torch.bfloat16)


class DDP:
    """The whole model on each process; DDP (Li et al. 2020, "PyTorch Distributed") where there are several."""

    def __init__(
        self, accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.is_main = accelerator.is_main_process
        self.gpt2 = model.gpt2
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._check_parameters(model)

    def _check_parameters(self, model: TargetLogProbs) -> None:
        check_same_parameters(model, self.model)

    def update(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = float(_whole(norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def full_model(self) -> GPT2 | None:
        return self.gpt2 if self.is_main else None

    def moments(self) -> Moments:
        state = self.optimizer.state

        def get(parameter: Tensor, moment: str) -> Tensor:
            has_it = moment in state.get(parameter, {})
            return _whole(state[parameter][moment] if has_it else torch.zeros_like(parameter))

        return _moments(self.gpt2, get, self.is_main)

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        self.optimizer.state.clear()
        if moments is None:
            return
        is_fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for name, parameter in trainable_parameters(self.gpt2).items():
            step = torch.tensor(float(updates), device=parameter.device if is_fused else "cpu")  # where it is read
            self.optimizer.state[parameter] = {"step": step} | {
                moment: _like(moments[moment][name], parameter) for moment in MOMENTS
            }


class FSDP2(DDP):
    """Parameters, gradients and moments in shards, each block gathered when it runs.

    Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", in its second form,
    `torch.distributed.fsdp.fully_shard`: parameters keep their names, and each is sharded along its rows.
    """

    def __init__(
        self, accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._copy = _copy_for_main(accelerator, model.gpt2)
        model.forward = autocast(accelerator)(model.forward)  # Accelerate does so for DDP, but not here
        super().__init__(accelerator, model, optimizer, max_grad_norm)

    def _check_parameters(self, model: TargetLogProbs) -> None:
        """They are others now, and the optimizer's too; a table that is no longer one would have a second name."""
        if [name for name, _ in self.model.named_parameters()] != self._names:
            raise PreflightError("FSDP has changed the names of the parameters")

    def _to_shards(self) -> None:
        """Everything in shards, as the optimizer has it: an evaluation leaves what belongs to no block gathered."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_model(self) -> GPT2 | None:
        self._to_shards()
        return _filled(self._copy, self.gpt2, lambda parameter: _whole(parameter.detach()))

    def moments(self) -> Moments:
        self._to_shards()
        return super().moments()

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        self._to_shards()
        super().load_moments(moments, updates)


class ZeRO2:
    """Gradients and moments in shards, the model whole: ZeRO stage 2.

    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", by DeepSpeed, whose
    engine clips and updates inside the last backward pass of a step.
    """

    def __init__(
        self, accelerator: Any, model: TargetLogProbs, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._rank = accelerator.process_index
        self._copy = _copy_for_main(accelerator, model.gpt2)
        self.gpt2 = model.gpt2
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._adam = self.optimizer.optimizer.optimizer  # of Accelerate's wrapper of DeepSpeed's wrapper

    def update(self) -> float:
        return float(self.model.get_global_grad_norm())

    def full_model(self) -> GPT2 | None:
        from deepspeed.utils import safe_get_full_fp32_param

        return _filled(self._copy, self.gpt2, safe_get_full_fp32_param)

    def moments(self) -> Moments:
        from deepspeed.utils import safe_get_full_optimizer_state

        return _moments(self.gpt2, safe_get_full_optimizer_state, self._rank == 0)

    def load_moments(self, moments: Moments | None, updates: int) -> None:
        """DeepSpeed allocates moments in its first update."""
        self._link_moments()
        for name, parameter in trainable_parameters(self.gpt2).items():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, moments[moment][name] if moments else None)
        for state in self._adam.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(updates))

    def _link_moments(self) -> None:
        """DeepSpeed notes where each parameter's moments lie once the first group of parameters is updated, when those
        of the second are not there yet (0.19.8): here again."""
        engine = self.optimizer.optimizer
        engine._hp_optimizer_states_linked = False
        engine._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor | None) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        whole = torch.zeros_like(parameter) if value is None else value.to(parameter.device)
        safe_set_full_optimizer_state(parameter, whole, moment)


class ZeRO3(ZeRO2):
    """Parameters in shards too, each module's gathered when it runs: ZeRO stage 3."""

    def _link_moments(self) -> None:
        """They lie beside the shard."""

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor | None) -> None:
        """The shards of a parameter are equal parts of its elements, the last filled up: each process sets its own."""
        from deepspeed.utils import safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        local = torch.zeros(size, device=parameter.ds_tensor.device)
        if value is not None:
            mine = value.flatten()[self._rank * size : (self._rank + 1) * size]
            local[: len(mine)] = mine
        safe_set_local_optimizer_state(parameter, local, moment)


def _copy_for_main(accelerator: Any, gpt2: GPT2) -> GPT2 | None:
    """A model in the memory of the main process, to be filled with the whole weights where it keeps shards."""
    if not accelerator.is_main_process:
        return None
    whole = copy.deepcopy(gpt2.cpu()).eval()  # on the device there may be no room for two
    gpt2.to(accelerator.device)
    return whole


def _filled(whole: GPT2 | None, shards: GPT2, get: Callable[[Tensor], Tensor]) -> GPT2 | None:
    """A copy with the weights of now, one by one: no process holds more than one of them whole beside it."""
    weights = {}
    for name, parameter in trainable_parameters(shards).items():
        tensor = get(parameter)
        if whole is not None:
            weights[name] = tensor.cpu()
    if whole is not None:
        load_trainable_parameters(whole, weights)
    return whole


def _moments(gpt2: GPT2, get: Callable[[Tensor, str], Tensor], is_main: bool) -> Moments:
    """One by one too; kept by the main process alone."""
    found: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in trainable_parameters(gpt2).items():
        for moment in MOMENTS:
            tensor = get(parameter, moment)
            if is_main:
                found[moment][name] = tensor.cpu()
    return found if is_main else {}


def _whole(tensor: Tensor) -> Tensor:
    """All shards together, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, laid out and placed as a parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        shard = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        return shard.to(parameter.device)  # the parameter may be offloaded
    return whole.to(parameter.device)
