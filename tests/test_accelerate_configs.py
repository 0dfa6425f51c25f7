"""accelerate_configs/*.yaml are understood as they are meant, and the commands in their comments can be run."""

import argparse
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PROCESSES = {
    "cpu": 2,
    "single_gpu": 1,
    "multi_gpu": 4,
    "multi_node": 8,
    "fsdp2": 4,
    "deepspeed_zero2": 4,
    "deepspeed_zero3": 4,
}
TOPOLOGY = {  # without rdzv_backend and same_network, which have defaults on the command line that overrule a config
    "compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank", "mixed_precision",
    "use_cpu", "gpu_ids", "main_process_ip", "main_process_port", "fsdp_config", "deepspeed_config",
}  # fmt: skip
NESTED = {
    "fsdp_version", "fsdp_reshard_after_forward", "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_cpu_ram_efficient_loading", "fsdp_offload_params", "zero_stage", "offload_optimizer_device",
    "offload_param_device", "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_multinode_launcher",
}  # fmt: skip
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
TOLD = {
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    },
    "deepspeed_zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "deepspeed_zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
VARIABLES = {  # that the comments set, and who reads them
    "ACCELERATE_USE_FSDP": "accelerate",
    "FSDP_VERSION": "accelerate",
    "ACCELERATE_USE_DEEPSPEED": "accelerate",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "accelerate",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "accelerate",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "torch",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "torch",
    "NCCL_SOCKET_IFNAME": "NCCL",
}
with_each_config = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def launcher():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def comments(file):
    """The comment above the settings, without its marks."""
    lines = file.read_text(encoding="utf-8").split("compute_environment")[0].splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines)


def launches(file):
    """The commands in it: ({variable: value}, [words])."""
    found = []
    for line in comments(file).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if re.search(r"(accelerate launch|torchrun) --", line) else []
        variables = {}
        while words and re.fullmatch(r"[A-Z0-9_]+=\S+", words[0]):
            name, value = words.pop(0).split("=")
            variables[name] = value
        if words and words[0] in ("accelerate", "torchrun"):
            found.append((variables, words))
    return found


def test_all_configs_are_here():
    assert {file.stem for file in CONFIGS} == PROCESSES.keys()


@with_each_config
def test_configs_say_where_to_train_and_nothing_of_what(file):
    """Read by accelerate's own loader, which refuses unknown keys; no hyper-parameter is among them."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == PROCESSES[file.stem]
    assert config.mixed_precision == ("no" if file.stem == "cpu" else "bf16")
    assert yaml.safe_load(file.read_text(encoding="utf-8")).keys() <= TOPOLOGY


@with_each_config
def test_no_is_quoted(file):
    """A bare `no` is False in YAML."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(values["mixed_precision"], str)
    assert isinstance(values["distributed_type"], str)


def test_the_launcher_knows_every_nested_key(launcher):
    """It ignores one that it does not know, without a word: FSDP's first version, or ZeRO's second stage, would run."""
    known = {action.dest for action in launcher._actions}
    seen = set()
    for file in CONFIGS:
        for section in ("fsdp_config", "deepspeed_config"):
            keys = yaml.safe_load(file.read_text(encoding="utf-8")).get(section, {}).keys()
            assert keys <= known & NESTED, file
            seen |= keys
    assert seen == NESTED


@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "single_gpu"])
def test_what_the_launcher_tells_the_processes(name, launcher, monkeypatch):
    """By the launcher's own code, up to where it would start torchrun."""
    import torch.distributed.run
    from accelerate.commands.launch import launch_command

    for variable in [variable for variable in os.environ if variable.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(variable)
    started = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: started.append((args, dict(os.environ))))
    several = name == "multi_node"
    file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    options = ["--machine_rank", "1", "--rdzv_backend", "c10d"] if several else []  # the first would try its port
    launch_command(launcher.parse_args(["--config_file", file, *options, "launch/sft.py"]))
    ((args, told),) = started
    assert args.nproc_per_node == str(PROCESSES[name] // (2 if several else 1))
    assert (args.rdzv_backend, args.rdzv_endpoint) == (("c10d", "10.0.0.1:29500") if several else ("static", ""))
    assert told["ACCELERATE_MIXED_PRECISION"] == ("no" if name == "cpu" else "bf16")
    ours = {
        key: value for key, value in told.items() if key.startswith(("ACCELERATE_USE_", "ACCELERATE_DEEP", "FSDP_"))
    }
    assert ours.items() >= TOLD.get(name, {}).items()
    assert bool(ours) == (name in TOLD)
    assert not told.keys() & {"ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"}


def test_blocks_that_are_sharded_exist():
    from gpt2ft.model import gpt2

    fsdp = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    assert hasattr(gpt2, fsdp["fsdp_transformer_layer_cls_to_wrap"])


@with_each_config
def test_commands_in_the_comments_can_be_run(file, launcher):
    """Their options, files, recipes and variables exist."""
    from torch.distributed.run import get_args_parser

    commands = launches(file)
    kinds = [words[0] for _, words in commands]
    assert kinds == ["accelerate"] if file.stem == "single_gpu" else ["accelerate", "torchrun"]
    for variables, words in commands:
        parser = launcher if words[0] == "accelerate" else get_args_parser()
        arguments = words[2:] if words[0] == "accelerate" else words[1:]
        numbered = ["0" if word == "$RANK" else word for word in arguments]
        args = strict(parser, numbered)
        script, recipe = args.training_script, args.training_script_args
        assert (ROOT / script).is_file()
        assert all((ROOT / "launch" / "recipes" / f"{name}.yaml").is_file() for name in recipe)
        assert variables.keys() <= VARIABLES.keys()
        if words[0] == "accelerate":
            assert ROOT / args.config_file == file
    for name in re.findall(r"\b[A-Z0-9_]+(?==)", comments(file)):
        assert name in VARIABLES, name
    for name in re.findall(r"\b\w+\.yaml\b", comments(file)):
        assert (file.parent / name).is_file()


def strict(parser, arguments):
    """Parsed, but what is unknown fails the test instead of ending it."""
    parser.exit_on_error = False
    try:
        return parser.parse_args(arguments)
    except (argparse.ArgumentError, SystemExit) as error:
        pytest.fail(f"{arguments}: {error}")


@pytest.mark.parametrize("name", [name for name, reader in VARIABLES.items() if reader != "NCCL"])
def test_somebody_reads_the_variables(name):
    import accelerate
    import torch

    folder = {"accelerate": Path(accelerate.__file__).parent, "torch": Path(torch.__file__).parent / "distributed"}
    files = sorted(folder[VARIABLES[name]].rglob("*.py"))
    prefix, _, rest = name.partition("_")
    spellings = (f'"{name}"', f'"{rest}"') if prefix == "FSDP" else (f'"{name}"',)  # accelerate puts some together
    assert any(spelling in file.read_text(encoding="utf-8") for file in files for spelling in spellings)
