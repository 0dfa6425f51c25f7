"""One process of several hangs, dies or fails: it is named, all end, and the launcher starts them again.

And several machines, each a launcher with an address of its own on this one.
"""

import json
import re
import socket
import time
from contextlib import ExitStack

import processes
import pytest
from processes import ON_CPU, free_port, torchrun
from safetensors.torch import load_file

from gpt2ft.settings.recipes import to_yaml
from gpt2ft.settings.scripts import SFTSettings

STEPS = 7  # evaluation after 3, 6 and 7, saving after every second
PATIENCE = 15  # a silence of 7.5 seconds is too long, and 15 in a step without a sign of life
ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_machines", "1"]
ON_ONE_MACHINE = {
    "torchrun": torchrun(2),
    "accelerate launch": [*ACCELERATE, "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.fixture
def recipe(tiny_model_folder, tmp_path):
    settings = SFTSettings(
        model={
            "path": str(tiny_model_folder),
            "random_init": True,
            "dropout": 0.1,
            "neftune_alpha": 0.5,
        },
        data={"train": ["quickstart@0.4"], "eval": ["quickstart:held_out"], "max_rank": 1, "max_length": 256},
        training={
            "steps": STEPS,
            "tokens_per_micro_batch": 512,
            "micro_batches_per_step": 4,
            "eval_every": 3,
            "save_every": 2,
            "log_every": 1,
            "sample_prompts": 1,
            "sample_tokens": 4,
        },
        optimizer={"learning_rate": 1e-2},
        output=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def start(recipe, tmp_path):
    """start(words of the launcher, trouble="dies:1:4", output=..., resume=...): a training run under way."""
    environment = ON_CPU | {"GPT2FT_PATIENCE": PATIENCE, "TROUBLE_FOLDER": tmp_path}
    with ExitStack() as stack:

        def start(launcher, trouble="none:0:0", output="run", resume="auto", **more):
            command = [*launcher, "tests/runs/troubled.py", trouble, recipe, "--output", tmp_path / output]
            command += ["--resume", resume]
            return stack.enter_context(processes.start(command, **environment, **more))

        yield start


def same_bits(one, other):
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    return all(bool((expected[name] == found[name]).all()) for name in expected)


def losses(folder):
    """By step; of what was done again, the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


# --- hanging --------------------------------------------------------------------------------------------------------

NAMED = {
    "freezes": r"error: no heartbeat for \d+ s of rank 1 \(host .*\), last at \w+",  # up to half a second before
    "sleeps": r"error: no process has got on for \d+ s, .* rank 1 \(host .*\), last at step 2",
}


@pytest.mark.parametrize(
    ("trouble", "launcher"),
    [
        ("sleeps", "torchrun"),
        pytest.param("freezes", "torchrun", marks=pytest.mark.long),
        pytest.param("freezes", "accelerate launch", marks=pytest.mark.campaign),
        pytest.param("sleeps", "accelerate launch", marks=pytest.mark.campaign),
    ],
)
def test_one_that_hangs_is_named_and_all_end(trouble, launcher, start, tmp_path):
    """Torchrun gives one that is frozen half a minute to end by itself."""
    ended = start(ON_ONE_MACHINE[launcher], f"{trouble}:1:2").finish(code=None, seconds=600)
    seconds = time.time() - float((tmp_path / trouble).read_text())
    assert ended.code != 0
    assert len(ended.errors) == 1, ended.printed
    assert re.match(NAMED[trouble], ended.errors[0])
    assert ("in sleeps" in ended.stderr) is (trouble == "sleeps")  # its own stack
    assert re.search(r"exitcode\s*: 69", ended.printed)
    assert seconds < 100


@pytest.mark.campaign
def test_the_loss_of_the_first_process_and_of_its_store_is_named(start, tmp_path):
    """Started by hand, the first process keeps the store."""
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start(["python"], "freezes:0:2", RANK=rank, LOCAL_RANK=rank, **group) for rank in range(2)]
    ended = ranks[1].finish(code=69, seconds=600)
    assert re.match(r"error: the store on 127.0.0.1 does not answer", ended.errors[0])


# --- starting again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble", [pytest.param("dies", marks=pytest.mark.long), pytest.param("sleeps", marks=pytest.mark.campaign)]
)
def test_the_launcher_starts_all_again_and_they_end_in_the_same_bits(trouble, start, tmp_path):
    """Told to begin anew, they do so once: a restart goes on."""
    start(torchrun(2), output="undisturbed").finish(seconds=600)
    ended = start(torchrun(2, "--max_restarts", "1"), f"{trouble}:1:4", resume="never").finish(seconds=600)
    assert (tmp_path / trouble).exists()
    assert re.search(r"resuming .*step-0000000[34]", ended.stdout)
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert len(losses(tmp_path / "run")) == STEPS
    assert same_bits(tmp_path / "undisturbed", tmp_path / "run")


# --- several machines -----------------------------------------------------------------------------------------------


def machines(start, each=1, trouble="none:0:0", restarts=1, **more):
    """Two launchers that meet at a port."""
    words = ["torchrun", "--nnodes", "2", "--nproc_per_node", each, "--max_restarts", restarts]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "test"]
    return [start([*words, "--local_addr", f"127.0.0.{number}"], trouble, **more) for number in (1, 2)]


@pytest.mark.long
def test_two_machines_train_as_one_process_does(start, run_sft, tmp_path):
    run_sft(tmp_path / "alone", steps=STEPS, micro_batches_per_step=4)
    for machine in machines(start):
        machine.finish(seconds=600)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(losses(tmp_path / "run")) == STEPS
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["processes"] == 2


@pytest.mark.long
def test_a_process_lost_on_another_machine_is_replaced(start, tmp_path):
    for machine in machines(start, each=2, output="undisturbed"):
        machine.finish(seconds=900)
    ended = [machine.finish(seconds=900) for machine in machines(start, each=2, trouble="dies:3:4")]
    assert (tmp_path / "dies").exists()
    said = "".join(each.stdout for each in ended)
    assert re.search(r"resuming .*step-0000000[34]", said)
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert same_bits(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.campaign
def test_a_process_that_fails_on_another_machine_ends_all(start):
    """Whose launcher starts nothing again."""
    both = machines(start, trouble="fails:1:2", restarts=0)
    ended = [machine.finish(code=None, seconds=900) for machine in both]
    assert 0 not in [each.code for each in ended]
    assert "error on rank 1: no space left on any device" in "".join(each.stderr for each in ended)


@pytest.mark.long
def test_a_process_with_another_learning_rate_is_named_before_the_first_step(start, tmp_path):
    ended = start(torchrun(2), "differs:1:0").finish(code=None, seconds=600)
    assert ended.code != 0
    assert ended.errors
    assert all(error.startswith("error: all processes must train the same run, ") for error in ended.errors)
    assert "`optimizer.learning_rate`" in ended.errors[0]
    assert f"rank 1 (host {socket.gethostname()})" in ended.errors[0]
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.campaign
def test_machines_that_do_not_share_the_output_folder_are_refused(start, tmp_path):
    ended = start(torchrun(2), "elsewhere:1:0").finish(code=None, seconds=600)
    assert ended.code != 0
    said = f"rank 1 (host {socket.gethostname()}) does not find in {tmp_path / 'run of another'} what the first process"
    assert len(ended.errors) == 1
    assert said in ended.errors[0]
    assert not (tmp_path / "run" / "manifest.json").exists()
