"""One process of several hangs, dies or fails: it is named, all end, and the launcher starts them again.

And several machines, each a launcher with an address of its own on this one.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from gpt2ft.settings.parsing import RECIPES, to_yaml
from gpt2ft.settings.scripts import SFTSettings

STEPS = 7  # evaluation after 3, 6 and 7, saving after every second
PATIENCE = 15  # a silence of 5 seconds is too long, and 15 at one place
TORCHRUN = ["torch.distributed.run"]
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1"]
ON_ONE_MACHINE = {
    "torchrun": [*TORCHRUN, "--standalone", "--nproc_per_node", "2"],
    "accelerate launch": [*ACCELERATE, "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.fixture
def recipe(tiny_model_folder, tmp_path):
    settings = SFTSettings(
        model={
            "path": str(tiny_model_folder),
            "random_init": True,
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        data={"train": ["quickstart"], "eval": ["quickstart:held_out"], "max_rank": 1, "max_length": 256},
        training={
            "steps": STEPS,
            "tokens_per_micro_batch": 1024,
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
    """start(words of the launcher, trouble="dies:1:4", output=...): a process; what it says is in the file .said."""
    started = []
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(RECIPES.parents[1]),
        "GPT2FT_PATIENCE": str(PATIENCE),
        "TROUBLE_FOLDER": str(tmp_path),
    }

    def start(launcher, trouble="none:0:0", output="run", **more):
        script = str(Path(__file__).parent / "troubled.py")
        module = ["-m", *launcher] if launcher else []
        command = [sys.executable, *module, script, trouble, str(recipe), "--output", str(tmp_path / output)]
        said = tmp_path / f"said{len(started)}"
        with open(said, "w") as file:
            process = subprocess.Popen(
                command, env=environment | more, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        process.said = said
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            left = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in left:
                each.kill()
            psutil.wait_procs(left)


def errors(process):
    return [line for line in process.said.read_text().splitlines() if line.startswith("error")]


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
    "freezes": r"error: rank 1 \(host .*\) has not been heard of for \d+ s; it was last at step [12], .*: ending",
    "sleeps": r"error: rank 1 \(host .*\) stands at step 2, counting \(in sleeps, troubled.py:\d+\); no process",
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
    """Long before any collective gives up. Torchrun gives one that is frozen half a minute to end by itself."""
    process = start(ON_ONE_MACHINE[launcher], f"{trouble}:1:2")
    assert process.wait(timeout=200) != 0
    seconds = time.time() - float((tmp_path / trouble).read_text())
    said = process.said.read_text()
    assert len(errors(process)) == 1, said
    assert re.match(NAMED[trouble], errors(process)[0])
    assert re.search(r"exitcode\s*: 69", said)
    assert seconds < 100


@pytest.mark.campaign
def test_the_loss_of_the_first_process_and_of_its_store_is_named(start, tmp_path):
    """Started by hand, the first process keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(
            [],
            "freezes:0:2",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    assert ranks[1].wait(timeout=200) == 69
    assert re.match(r"error: the store at 127.0.0.1:\d+, on the first machine, has not answered", errors(ranks[1])[0])


# --- starting again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble", [pytest.param("dies", marks=pytest.mark.long), pytest.param("sleeps", marks=pytest.mark.campaign)]
)
def test_the_launcher_starts_all_again_and_they_end_in_the_same_bits(trouble, start, tmp_path):
    undisturbed = start(ON_ONE_MACHINE["torchrun"], output="undisturbed")
    assert undisturbed.wait(timeout=200) == 0
    process = start([*ON_ONE_MACHINE["torchrun"], "--max_restarts", "1"], f"{trouble}:1:4")
    assert process.wait(timeout=200) == 0, process.said.read_text()
    assert (tmp_path / trouble).exists()
    assert re.search(r"resuming .*step-0000000[34]", process.said.read_text())
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert len(losses(tmp_path / "run")) == STEPS
    assert same_bits(tmp_path / "undisturbed", tmp_path / "run")


# --- several machines -----------------------------------------------------------------------------------------------


def machines(start, each=1, trouble="none:0:0", restarts=1, **more):
    """Two launchers that meet at a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", str(each), "--max_restarts", str(restarts)]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
    return [start([*words, "--local_addr", f"127.0.0.{number}"], trouble, **more) for number in (1, 2)]


@pytest.mark.long
def test_two_machines_train_as_one_process_does(start, run_sft, tmp_path):
    run_sft(tmp_path / "alone", steps=STEPS, micro_batches_per_step=4)
    both = machines(start)
    assert [process.wait(timeout=200) for process in both] == [0, 0], both[0].said.read_text()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(losses(tmp_path / "run")) == STEPS
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["processes"] == 2


@pytest.mark.long
def test_a_process_lost_on_another_machine_is_replaced(start, tmp_path):
    undisturbed = machines(start, each=2, output="undisturbed")
    assert [process.wait(timeout=300) for process in undisturbed] == [0, 0]
    both = machines(start, each=2, trouble="dies:3:4")
    assert [process.wait(timeout=300) for process in both] == [0, 0], both[0].said.read_text()
    assert (tmp_path / "dies").exists()
    said = "".join(process.said.read_text() for process in both)
    assert re.search(r"resuming .*step-0000000[34]", said)
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert same_bits(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.campaign
def test_a_process_that_fails_on_another_machine_ends_all(start):
    """Whose launcher starts nothing again."""
    both = machines(start, trouble="fails:1:2", restarts=0)
    assert 0 not in [process.wait(timeout=300) for process in both]
    assert "error on rank 1: no space left on any device" in both[1].said.read_text() + both[0].said.read_text()


@pytest.mark.campaign
def test_machines_that_do_not_share_the_output_folder_are_refused(start, tmp_path):
    process = start(ON_ONE_MACHINE["torchrun"], "elsewhere:1:0")
    assert process.wait(timeout=200) != 0
    said = f"rank 1 (host {socket.gethostname()}) does not find in {tmp_path / 'run of another'} what the first process"
    assert len(errors(process)) == 1
    assert said in errors(process)[0]
    assert not (tmp_path / "run" / "manifest.json").exists()
