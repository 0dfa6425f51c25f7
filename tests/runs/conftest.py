"""Small training runs in this process: a part of the quickstart's data, a model of one hundredth, a second or two."""

import shutil
from contextlib import contextmanager

import pytest
import torch

from gpt2ft.settings.scripts import DPOSettings, ReferenceSettings, SFTSettings


@pytest.fixture(scope="session")
def run_sft(tiny_model_folder, one_thread, tmp_path_factory):
    """Trains: run_sft(output, steps=7, seed=0, objective=SFT(), ...). Steps of 6 streams, 17 to an epoch.

    `path` is a folder with weights to start from, `lora` the settings of adapters.
    """
    cache = tmp_path_factory.mktemp("cache")

    def run(
        output,
        steps,
        resume="auto",
        seed=0,
        learning_rate=1e-2,
        max_rank=1,
        objective=None,
        dropout=0.1,
        path=None,
        lora=None,
        data=None,
        **training,
    ):
        from gpt2ft.runs.train_sft import FineTuning

        settings = SFTSettings(
            model={
                "path": str(path or tiny_model_folder),
                "random_init": path is None,
                "dropout": dropout,
                "neftune_alpha": 5 * dropout,  # noise wherever there is dropout
            },
            lora=lora or {},
            data=quickstart_data(cache) | {"max_rank": max_rank} | (data or {}),
            training=SMALL_STEPS | {"steps": steps, "seed": seed} | training,
            optimizer={"learning_rate": learning_rate},
            output=str(output),
            resume=resume,
        )
        train_here(settings, FineTuning(settings, objective))

    return run


@pytest.fixture(scope="session")
def run_dpo(tiny_weights_folder, one_thread, tmp_path_factory):
    """Tunes on preferences: run_dpo(output, steps=4, path=..., dpo={...}, lora={...}, data={...}, ...).

    All runs share a cache, and with it the reference, unless `data` names another.
    """
    cache = tmp_path_factory.mktemp("cache")

    def run(
        output,
        steps,
        resume="auto",
        seed=0,
        learning_rate=1e-3,
        path=None,
        dpo=None,
        lora=None,
        data=None,
        only_reference=False,
        report=None,
        later=(),
        **training,
    ):
        from gpt2ft.runs import compute_reference
        from gpt2ft.runs.train_dpo import PreferenceTuning

        extra = {"report": report, "later": later} if only_reference else {}
        settings = (ReferenceSettings if only_reference else DPOSettings)(
            **extra,
            model={"path": str(path or tiny_weights_folder)},
            lora=lora or {},
            data=quickstart_data(cache) | (data or {}),
            training=SMALL_STEPS | {"steps": steps, "seed": seed} | training,
            optimizer={"learning_rate": learning_rate},
            dpo=dpo or {},
            output=str(output),
            resume=resume,
        )
        if only_reference:
            forget_accelerator()
            compute_reference.run(settings)
        else:
            train_here(settings, PreferenceTuning(settings))

    return run


@pytest.fixture(scope="session")
def stopped_after():
    """`with stopped_after(step):` a run that must stop dead after that step, as by a kill between two."""

    class Interrupted(Exception):
        pass

    @contextmanager
    def stopped_after(step):
        from gpt2ft.training.tracking import Tracker

        done = []

        def advance(self):
            done.append(None)
            if len(done) == step:
                raise Interrupted

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracker, "advance", advance)
            with pytest.raises(Interrupted):
                yield

    return stopped_after


@pytest.fixture(scope="session")
def own_trees(tmp_path_factory):
    """A half of the quickstart's trees in a file of their own."""
    from gpt2ft import quickstart

    file = tmp_path_factory.mktemp("data") / "trees.jsonl"
    file.write_text("".join(quickstart.TREES.read_text(encoding="utf-8").splitlines(keepends=True)[::2]), "utf-8")
    return file


@pytest.fixture(scope="session")
def finished(run_sft, own_trees, tmp_path_factory):
    """A run of 7 steps to be verified, and left as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_sft(folder, 7, data={"train": [str(own_trees)]}, keep_for_verification=2)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def another(run_sft, own_trees, tmp_path_factory):
    """The same with another seed."""
    folder = tmp_path_factory.mktemp("another") / "run"
    run_sft(folder, 7, data={"train": [str(own_trees)]}, seed=1)
    return folder


SMALL_STEPS = {
    "tokens_per_micro_batch": 512,
    "micro_batches_per_step": 6,
    "eval_every": 3,
    "save_every": 2,
    "log_every": 1,
    "sample_prompts": 1,
    "sample_tokens": 8,
}


def quickstart_data(cache):
    return {"train": ["quickstart@0.4"], "eval": ["quickstart:held_out"], "max_length": 256, "cache": str(cache)}


def train_here(settings, task):
    from gpt2ft.runs.train import train

    torch.manual_seed(int.from_bytes(settings.output.encode()[-4:], "big"))  # what was drawn before must not matter
    forget_accelerator()
    train(settings, task)


def forget_accelerator():
    """Let the next run start its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
