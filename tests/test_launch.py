"""A launch trains with all the processes it was told to start, together.

Those that would not are refused: see tests/campaigns/silent_launches.py, and what can be seen without starting any in
tests/distributed/test_launch_checks.py.
"""

import json
import os

import pytest
from processes import OF_LAUNCHERS, ROOT, run, torchrun

SCRIPT = "launch/sft.py"
RECIPE = """
model: {path: quickstart, random_init: true}
data: {train: [quickstart], max_rank: 1, max_length: 256}
training: {steps: 1, tokens_per_micro_batch: 256, micro_batches_per_step: 2, sample_prompts: 0}
"""
TWO_ON_CPU = (ROOT / "accelerate_configs" / "cpu.yaml").read_text(encoding="utf-8")


@pytest.fixture
def launch(tmp_path):
    """launch(words before the script, **environment): how a training run of one step has ended, and its folder."""

    def launch(*words, **environment):
        (tmp_path / "one_step.yaml").write_text(RECIPE)
        command = [*words, SCRIPT, tmp_path / "one_step.yaml", "--output", tmp_path / "run"]
        no_accelerate_config = {"HF_HOME": tmp_path / "hf"}
        return run(command, seconds=150, **no_accelerate_config, **environment), tmp_path / "run"

    return launch


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "accelerate.yaml").write_text(text)
        return str(tmp_path / "accelerate.yaml")

    return write


# --- what must work -------------------------------------------------------------------------------------------------


def outcome(folder):
    """How many processes trained, and the loss of the one step."""
    assert (folder / "model" / "config.json").is_file()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return json.loads((folder / "manifest.json").read_text())["processes"], first["train/loss"]


@pytest.fixture(scope="module")
def losses():
    """The loss of each launch that worked: they train on the same thing."""
    return []


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (["python"], 1),
        (["accelerate", "launch"], 1),
        pytest.param(torchrun(2), 2, marks=pytest.mark.long),
    ],
    ids=["python", "accelerate launch", "torchrun"],
)
def test_these_launches_train_the_same(launch, losses, words, processes):
    environment = {"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
    ended, folder = launch(*words, **environment)
    assert not ended.errors
    trained, loss = outcome(folder)
    assert trained == processes
    losses.append(loss)
    assert losses == [pytest.approx(losses[0], rel=1e-5)] * len(losses)
    assert ended.printed.count("finished: ") == 1


@pytest.mark.long
def test_accelerate_with_two_processes_on_a_cpu(launch, config):
    words = ["accelerate", "launch", "--config_file", config(TWO_ON_CPU)]
    ended, folder = launch(*words, ACCELERATE_USE_CPU="true")
    assert not ended.errors
    assert outcome(folder)[0] == 2


# --- the same checks without starting anything ----------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch):
    """start(micro-batches a step, **environment): the accelerator that this process would train with."""
    for name in [name for name in os.environ if name.startswith(OF_LAUNCHERS)]:
        monkeypatch.delenv(name)

    def start(micro_batches_per_step, **environment):
        import torch
        from accelerate.state import AcceleratorState, GradientState

        from gpt2ft.distributed.accelerator import start_accelerator

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        threads = torch.get_num_threads()
        try:
            return start_accelerator("fp32", micro_batches_per_step)
        finally:
            torch.set_num_threads(threads)

    return start


@pytest.fixture
def refusal(start):
    """refusal(micro-batches a step, **environment): why such a launch is refused."""
    from gpt2ft.distributed.accelerator import LaunchError

    def refusal(micro_batches_per_step, **environment):
        with pytest.raises(LaunchError) as error:
            start(micro_batches_per_step, **environment)
        return str(error.value)

    return refusal


def test_accumulation_follows_from_the_micro_batches(start):
    assert start(6).gradient_accumulation_steps == 6


@pytest.mark.parametrize(
    ("micro_batches", "processes", "instead"), [(6, 4, "4 or 8"), (3, 8, "8"), (1, 2, "2"), (7, 3, "6 or 9")]
)
def test_micro_batches_that_the_processes_cannot_share_equally(refusal, micro_batches, processes, instead):
    assert refusal(micro_batches, WORLD_SIZE=str(processes)) == (
        f"`training.micro_batches_per_step` must be a multiple of the {processes} processes, "
        f"but is {micro_batches}: use {instead}"
    )


def test_the_launcher_has_no_say_in_accumulation(refusal, start):
    said = refusal(6, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert said.startswith("the launcher's gradient_accumulation_steps must be left out, but is 4: 6 follow from ")
    assert "but is 1: 6 follow" in refusal(6, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1")
    assert start(4, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4").gradient_accumulation_steps == 4


def test_accelerate_itself_refuses_it_in_its_config(config):
    from accelerate.commands.config.config_args import load_config_from_file

    with pytest.raises(ValueError, match=r"unknown keys .*gradient_accumulation_steps"):
        load_config_from_file(config(TWO_ON_CPU + "gradient_accumulation_steps: 4\n"))


def test_a_precision_that_is_not_ours_is_refused(refusal):
    assert "mixed_precision must be no or bf16, but is fp16" in refusal(1, ACCELERATE_MIXED_PRECISION="fp16")


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_of_mpirun_or_srun_are_refused(refusal, name):
    assert "4 processes were started by mpirun or srun, but each would train alone" in refusal(4, **{name: "4"})


@pytest.fixture
def asked_for(monkeypatch, tmp_path):
    """asked_for("accelerate launch ..."): how many processes such a parent of this process was told to start."""
    import psutil
    from accelerate.commands.config import config_args

    from gpt2ft.distributed.launcher_arguments import find_launch

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))

    class Parent:
        def parent(self):
            return self

        def cmdline(self):
            return self.words

    def asked_for(line, default_config=None):
        Parent.words = line.split()
        monkeypatch.setattr(psutil, "Process", Parent)
        if default_config:
            monkeypatch.setattr(config_args, "default_config_file", default_config)
        launch = find_launch()
        return launch.processes if launch else None

    return asked_for


@pytest.mark.parametrize(
    "launcher",
    [
        "/usr/bin/python3 /usr/bin/accelerate launch",
        "/usr/bin/python3 /usr/bin/accelerate-launch",
        "python -m accelerate.commands.launch",
        "python -m accelerate.commands.accelerate_cli launch",
    ],
)
def test_a_parent_that_was_told_how_many_is_understood(launcher, asked_for, config):
    assert asked_for(f"{launcher} --cpu --num_processes 2 {SCRIPT} --training.steps 3") == 2
    assert asked_for(f"{launcher} --num-processes=4 {SCRIPT}") == 4
    assert asked_for(f"{launcher} --config_file {config(TWO_ON_CPU)} {SCRIPT}") == 2
    assert asked_for(f"{launcher} --config_file {config(TWO_ON_CPU)} --num_processes 1 {SCRIPT}") == 1
    assert asked_for(f"{launcher} {SCRIPT} --num_processes 2") is None


def test_the_users_own_accelerate_config_counts_too(asked_for, config):
    default = config(TWO_ON_CPU.replace("MULTI_GPU", "MULTI_CPU"))
    assert asked_for(f"python /usr/bin/accelerate launch {SCRIPT}", default) == 2
    assert asked_for(f"python /usr/bin/accelerate launch --cpu {SCRIPT}", default) is None


@pytest.mark.parametrize("parent", ["", "bash", "pytest tests/accelerate", f"python launch {SCRIPT} --num_processes 2"])
def test_any_other_parent_was_told_nothing(parent, asked_for):
    assert asked_for(parent) is None
