"""Steps of the real loop, timed whole: training/fit.py with a model of random weights, and nothing to log or save.

One more step, after those that are timed, tells where the time goes and how often the host waits. A GPU notes by itself
when it comes to a phase: to time each would have it wait for the host between them.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpt2ft.benchmark.machine import seconds_of
from gpt2ft.benchmark.made_up import VOCABULARY
from gpt2ft.benchmark.work import Work
from gpt2ft.checkpoint import TrainState
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.accelerator import autocast
from gpt2ft.model.attention import choose_backend
from gpt2ft.model.compiled import Recompiled, choose_compiling
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import apply_lora
from gpt2ft.objectives.dpo import DPO
from gpt2ft.objectives.objective import Objective
from gpt2ft.objectives.sft import SFT
from gpt2ft.random import seed_for
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.training import OptimizerSettings, PreferenceSettings, TrainingSettings
from gpt2ft.training.fit import LoopInputs, fit
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.strategy import Strategy, cast_frozen, prepare

PHASES = ("forward", "backward", "optimizer")
WAITS = {"cuda": ("cudaStreamSynchronize", "cudaEventSynchronize")}  # elsewhere numbers that would be read from a GPU


class Silent:
    """A tracker that writes nothing."""

    def advance(self) -> None: ...

    def log(self, step: int, metrics: dict[str, float | str]) -> None: ...

    def show(self, step: int, metrics: dict[str, float], seconds_left: float) -> None: ...


def random_model(settings: BenchmarkSettings, config: GPT2Config) -> GPT2:
    """Return a model with GPT-2's initial weights."""
    return GPT2(config).initialize(torch.Generator().manual_seed(seed_for(settings.seed, "weights")))


class Training:
    """Our way: each `step` is one of the loop, before it the reference of preferences where they are compared."""

    def __init__(self, settings: BenchmarkSettings, config: GPT2Config, accelerator: Any, work: Work) -> None:
        self.settings, self.accelerator, self.work = settings, accelerator, work
        self.backend = choose_backend(settings.attention, accelerator.device, "attention")
        gpt2 = random_model(settings, config)
        if settings.lora.rank:
            random = torch.Generator().manual_seed(seed_for(settings.seed, "adapters"))
            apply_lora(gpt2, settings.lora, range(VOCABULARY - 4, VOCABULARY), random)
            cast_frozen(accelerator, gpt2)
        gpt2.activation_checkpointing = settings.activation_checkpointing
        self.parameters = sum(parameter.numel() for parameter in gpt2.parameters())
        self.trained = sum(parameter.numel() for parameter in gpt2.parameters() if parameter.requires_grad)
        self.compiles = choose_compiling(
            settings.compile, accelerator.device, self.backend, launch_checks.strategy(), "compile"
        )
        num_ids = min(VOCABULARY, config.vocab_size)
        model = TargetLogProbs(gpt2.to(accelerator.device), num_ids, self.backend, compiles=self.compiles)
        optimizer = adamw(
            gpt2, OptimizerSettings(), fused=accelerator.device.type == "cuda", lora_plus_ratio=settings.lora.plus_ratio
        )
        strategy = prepare(accelerator, model, optimizer, max_grad_norm=1.0)
        objective: Objective = DPO(PreferenceSettings()) if settings.compares else SFT()
        self.inputs = LoopInputs(
            accelerator=accelerator, strategy=strategy, objective=objective, batches=work, steps=0,
            training=TrainingSettings(seed=settings.seed), optimization=OptimizerSettings(schedule="constant"),
            tracker=Silent(), evaluate=lambda step: None, save=lambda state: None,
        )  # fmt: skip
        self.state = TrainState()
        self.graphs = 0

    def step(self) -> float:
        """Return the seconds of the next step.

        Raises:
            Recompiled: if anything was compiled for it that is not the first.
        """
        seconds = seconds_of(self.accelerator.device, self.advance)
        before, self.graphs = self.graphs, graphs_compiled()
        if self.state.step > 1 and self.graphs > before:
            raise Recompiled(f"step {self.state.step} compiled {self.graphs - before} graphs more")
        return seconds

    def advance(self) -> None:
        """Compute a step: of `reference` the log-probs alone, of `dpo` these and an update by them."""
        if self.settings.compares:
            self.pass_of_reference()
        if self.settings.what == "reference":
            self.state = self.state.after_step(updated=False)
        else:
            self.state = fit(replace(self.inputs, steps=self.state.step + 1), self.state)

    @torch.no_grad()
    def pass_of_reference(self) -> None:
        """Compute the log-probs of this process's streams, which training reads from a store."""
        accelerator, model = self.accelerator, self.inputs.strategy.model
        model.eval()
        for number in range(accelerator.process_index, self.work.micro_batches_per_step, accelerator.num_processes):
            stream = self.work.training_stream(self.state.step, number).to(accelerator.device)
            with autocast(accelerator):
                model(stream).cpu().double()
        model.train()

    def profile(self) -> dict[str, Any]:
        """Return where the time of one more step goes: seconds by phase, and how often the host waited."""
        device, strategy = self.accelerator.device, self.inputs.strategy
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=kinds) as profiler, recorded(self.accelerator, strategy) as spans:
            whole = self.step()
        phases = {name: seconds for name in PHASES if (seconds := sum(map(seconds_between, spans[name])))}
        phases["the rest"] = max(0.0, whole - sum(phases.values()))
        waits = WAITS.get(device.type, ("aten::_local_scalar_dense",))
        return {
            "seconds_by_phase": phases,
            "host_waits": sum(event.count for event in profiler.key_averages() if event.key in waits),
        }


class recorded:
    """Note when each phase begins and ends within the block: a list of pairs of marks by phase."""

    def __init__(self, accelerator: Any, strategy: Strategy) -> None:
        self.device = accelerator.device
        self.named = [(strategy.model, "forward"), (accelerator, "backward"), (strategy, "update")]
        self.own = [vars(owner).get(method) for owner, method in self.named]  # None: the class alone has it
        self.spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in PHASES}

    def __enter__(self) -> dict[str, list[tuple[Any, Any]]]:
        for (owner, method), phase in zip(self.named, PHASES, strict=True):
            setattr(owner, method, self.noting(self.spans[phase], getattr(owner, method)))
        return self.spans

    def __exit__(self, *exception: object) -> None:
        for (owner, method), own in zip(self.named, self.own, strict=True):
            setattr(owner, method, own) if own else delattr(owner, method)

    def noting(self, spans: list[tuple[Any, Any]], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = mark(self.device)
            result = function(*args, **kwargs)
            spans.append((start, mark(self.device)))
            return result

        return call


def mark(device: torch.device) -> Any:
    """Return the time, or an event by which a GPU will note it when it comes to it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(span: tuple[Any, Any]) -> float:
    """Return the seconds between two marks, of which a GPU must have come to the second."""
    start, end = span
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def graphs_compiled() -> int:
    """Return how many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
