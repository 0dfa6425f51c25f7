"""A launch trains with all the processes it was told to start, together.

Those that would not are refused: see tests/campaigns/silent_launches.py, and what can be seen without starting any in
tests/distributed.
"""

import json

import pytest
from processes import ROOT, run, torchrun

SCRIPT = "launch/sft.py"
RECIPE = """
model: {path: TINY_MODEL, random_init: true}
data: {train: [quickstart], max_rank: 1, max_length: 256}
training: {steps: 1, tokens_per_micro_batch: 256, micro_batches_per_step: 2, sample_prompts: 0}
"""
TWO_ON_CPU = (ROOT / "accelerate_configs" / "cpu.yaml").read_text(encoding="utf-8")


@pytest.fixture
def launch(tmp_path, tiny_model_folder):
    """launch(words before the script, **environment): how a training run of one step has ended, and its folder."""

    def launch(*words, **environment):
        (tmp_path / "one_step.yaml").write_text(RECIPE.replace("TINY_MODEL", str(tiny_model_folder)))
        command = [*words, SCRIPT, tmp_path / "one_step.yaml", "--output", tmp_path / "run"]
        no_accelerate_config = {"HF_HOME": tmp_path / "hf"}
        return run(command, seconds=600, **no_accelerate_config, **environment), tmp_path / "run"

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
        pytest.param(
            ["accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0],
            2,
            marks=pytest.mark.long,
        ),
    ],
    ids=["python", "accelerate launch", "torchrun", "accelerate launch without a config"],
)
def test_these_launches_train_the_same(launch, losses, words, processes):
    ended, folder = launch(*words)
    assert not ended.errors
    trained, loss = outcome(folder)
    assert trained == processes
    losses.append(loss)
    assert losses == [pytest.approx(losses[0], rel=1e-5)] * len(losses)
    assert ended.printed.count("finished: ") == 1


@pytest.mark.long
def test_accelerate_with_two_processes_on_a_cpu(launch, config):
    words = ["accelerate", "launch", "--config_file", config(TWO_ON_CPU)]
    ended, folder = launch(*words)
    assert not ended.errors
    assert outcome(folder)[0] == 2


def test_accelerate_itself_refuses_it_in_its_config(config):
    from accelerate.commands.config.config_args import load_config_from_file

    with pytest.raises(ValueError, match=r"unknown keys .*gradient_accumulation_steps"):
        load_config_from_file(config(TWO_ON_CPU + "gradient_accumulation_steps: 4\n"))
