"""What `accelerate launch` was told, as read from its command line and its config file."""

import pytest
from processes import ROOT

from gpt2ft.distributed.launcher_arguments import find_launch

SCRIPT = "launch/sft.py"
TWO_ON_CPU = (ROOT / "accelerate_configs" / "cpu.yaml").read_text(encoding="utf-8")


@pytest.fixture
def config(tmp_path):
    """config(text): a config file of Accelerate's."""

    def write(text, name="accelerate.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def launched_by(monkeypatch, tmp_path):
    """launched_by("accelerate launch ..."): what such a parent of this process was told."""
    import psutil
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))

    class Parent:
        def parent(self):
            return self

        def cmdline(self):
            return self.words

    def launched_by(line, default_config=None):
        Parent.words = line.split()
        monkeypatch.setattr(psutil, "Process", Parent)
        if default_config:
            monkeypatch.setattr(config_args, "default_config_file", default_config)
        return find_launch()

    return launched_by


@pytest.fixture
def asked_for(launched_by):
    """asked_for("accelerate launch ..."): how many processes such a parent of this process was told to start."""

    def asked_for(line, default_config=None):
        launch = launched_by(line, default_config)
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


def test_a_config_is_read_as_accelerate_reads_it(launched_by, config):
    written = {
        "a.json": '{"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}',
        "a.yaml": "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}",
    }
    for name, text in written.items():
        file = config(text, name)
        launch = launched_by(f"python /usr/bin/accelerate launch --config_file {file} {SCRIPT}")
        assert launch.file == file
        assert launch.config["fsdp_config"] == {"fsdp_version": 2}
        assert launch.config["distributed_type"] == "FSDP"
        assert launch.processes is None
