"""A small training run in this process: the quickstart's data, a model of one tenth, a few seconds."""

import json

import pytest
import torch

from gpt2ft import quickstart
from gpt2ft.settings import SFTSettings
from gpt2ft.training import distributed


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """The quickstart's vocabulary with a shape of 2 layers x 32."""
    folder = tmp_path_factory.mktemp("tiny_model")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((quickstart.MODEL / name).read_bytes())
    config = json.loads((quickstart.MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 32, "n_head": 2, "n_layer": 2}))
    return folder


@pytest.fixture(scope="session")
def tiny_weights_folder(tiny_model_folder, tmp_path_factory):
    """The same shape with random weights in it."""
    from gpt2ft.runs.assemble import load_policy
    from gpt2ft.runs.export import write_folder
    from gpt2ft.settings import ModelSettings

    folder = tmp_path_factory.mktemp("tiny_weights") / "model"
    policy = load_policy(ModelSettings(path=str(tiny_model_folder), random_init=True), seed=3)
    write_folder(folder, policy.weights(), policy.gpt2.config, policy.tokenizer)
    return folder


@pytest.fixture(scope="session")
def run_sft(tiny_model_folder, tmp_path_factory):
    """Trains: run_sft(output, steps=7, seed=0, objective=SFT(), ...). 3 steps of 6 streams make an epoch.

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
        **training,
    ):
        from accelerate.state import AcceleratorState, GradientState

        from gpt2ft.runs.sft import FineTuning
        from gpt2ft.runs.train import train

        settings = SFTSettings(
            model={
                "path": str(path or tiny_model_folder),
                "random_init": path is None,
                "dropout": dropout,
                "attention_dropout": dropout,
            },
            lora=lora or {},
            data={
                "train": ["quickstart"],
                "eval": ["quickstart:held_out"],
                "max_rank": max_rank,
                "max_length": 256,
                "cache": str(cache),
            },
            training={
                "steps": steps,
                "seed": seed,
                "tokens_per_micro_batch": 1024,
                "micro_batches_per_step": 6,
                "eval_every": 3,
                "save_every": 2,
                "log_every": 1,
                "sample_prompts": 1,
                "sample_tokens": 8,
            }
            | training,
            optimizer={"learning_rate": learning_rate},
            output=str(output),
            resume=resume,
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.manual_seed(int.from_bytes(str(output).encode()[-4:], "big"))  # what was drawn before must not matter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_cores", lambda: 1)  # threads only get in each other's way at this size
            train(settings, FineTuning(settings, objective))

    return run
