"""Trains one small run after the other in the same processes, to be started by torchrun.

    torchrun --nproc_per_node N tests/runs/many_processes.py CASES

CASES is a JSON file: [{"kind": "sft", "settings": {...}, "stop_after": 3, "goes_on_from": FOLDER}, ...]. Importing
takes longer than any of these runs, so a launch does many. The strategy is what the environment asks for, as of the
launcher. A run that goes on from a folder does so in a copy. Graphs of compiled blocks are computed by PyTorch's own
kernels, which takes seconds: that Inductor's are right is tested in tests/model/test_compiled.py.
"""

import json
import math
import os
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from gpt2ft.distributed import accelerator
from gpt2ft.objectives.sft import SFT
from gpt2ft.runs.evaluation import HeldOutEvaluation
from gpt2ft.runs.train import train
from gpt2ft.runs.train_dpo import PreferenceTuning
from gpt2ft.runs.train_sft import FineTuning
from gpt2ft.settings.scripts import DPOSettings, SFTSettings
from gpt2ft.training.tracking import Tracker


class Stopped(Exception):
    pass


class SometimesNaN(SFT):
    """Of few streams, whatever process they are on, the loss is not a number."""

    def loss(self, log_probs, stream):
        loss = super().loss(log_probs, stream)
        return loss * math.nan if int(stream.tokens.sum()) % 16 == 12 else loss


evaluate = HeldOutEvaluation.__call__


def rising(evaluation, step):
    """The held-out loss that this process has found, as if it rose."""
    return evaluate(evaluation, step) * step


def task_of(kind, settings):
    if kind == "dpo":
        return PreferenceTuning(settings)
    return FineTuning(settings, SometimesNaN() if kind == "sometimes nan" else None)


def run(case):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if case.get("goes_on_from") and int(os.environ["RANK"]) == 0:
        shutil.copytree(case["goes_on_from"], case["settings"]["output"])
    settings = (DPOSettings if case["kind"] == "dpo" else SFTSettings)(**case["settings"])
    steps = []

    def advance(tracker):
        steps.append(None)
        if len(steps) == case.get("stop_after"):
            raise Stopped

    Tracker.advance = advance
    HeldOutEvaluation.__call__ = rising if case["kind"] == "impatient" else evaluate
    try:
        train(settings, task_of(case["kind"], settings))
    except Stopped:
        assert case.get("stop_after")


def shard_everything(make):
    """Small parameters too, which DeepSpeed leaves whole."""

    def plugin(*arguments):
        made = make(*arguments)
        made.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    return plugin


def leave_gradients_to_us():
    """Switch off DeepSpeed's own checks of gradients, which some versions leave out: ours must do without."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module, kind in ((stage3, "DeepSpeedZeroOptimizer_Stage3"), (stage_1_and_2, "DeepSpeedZeroOptimizer")):
        module.is_invalid_grad_norm = lambda norm: False
        getattr(module, kind).has_overflow = lambda optimizer, partition_gradients=True: False


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        leave_gradients_to_us()
    torch.compile = partial(torch.compile, backend="aot_eager")
    accelerator.available_cores = lambda: 1  # threads only get in each other's way at this size
    accelerator._deepspeed_plugin = shard_everything(accelerator._deepspeed_plugin)
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *group: None
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case)
    destroy()
