"""What a launcher may ask for, what it must leave to the recipe, and what it must have understood."""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from torch import nn

from gpt2ft.device import asks_for_cpu
from gpt2ft.distributed import launch_checks
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.launcher_arguments import Launch

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true"}
LAUNCHERS = ("ACCELERATE_", "FSDP_", "OMPI_", "PMI_", "MV2_", "SLURM_", "TORCHELASTIC_", "PJRT_", "GROUP_", "WORLD_")


@pytest.fixture
def launched_with(monkeypatch):
    """launched_with(NAME=value, ...): what a launcher has set."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch_checks, "find_launch", lambda: None)

    def launched_with(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launched_with


@pytest.mark.parametrize(
    ("environment", "strategy"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "bf16"}, "ddp"),
        (FSDP2, "fsdp2"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, "fsdp2"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp2"),
        (ZERO2, "zero2"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}, "zero3"),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}, "ddp"),
    ],
)
def test_what_a_launcher_may_ask_for(environment, strategy, launched_with):
    launched_with(**environment)
    assert launch_checks.strategy() == strategy
    launch_checks.check(4, 2)


@pytest.mark.parametrize(
    ("environment", "facts"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, ["fsdp_version", "but is 1", "`fsdp_config`", "--fsdp_version 2"]),
        (FSDP2 | {"FSDP_VERSION": "1"}, ["fsdp_version", "but is 1"]),
        (FSDP2 | ZERO2, ["FSDP", "DeepSpeed", "both"]),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, ["zero_stage", "but is 1", "--zero_stage 2"]),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, ["deepspeed_config_file", "but is ds.json"]),
        (
            ZERO2 | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"},
            ["gradient_clipping", "but is 1.0", "--training.max_grad_norm"],
        ),
        (
            ZERO2 | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ["gradient_accumulation_steps", "but is 4", "2 follow", "`training.micro_batches_per_step`"],
        ),
        *(
            (FSDP2 | {name: "true"}, [name.lower(), "but is true", "--training.activation_checkpointing"])
            for name in ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD")
        ),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, ["fsdp_auto_wrap_policy", "but is SIZE_BASED_WRAP"]),
        (
            FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "MLP"},
            ["fsdp_transformer_layer_cls_to_wrap", "must be Block", "but is MLP"],
        ),
        (FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "block"}, ["must be Block", "but is block"]),
        (FSDP2 | {"FSDP_IGNORED_MODULES": "wte"}, ["fsdp_ignored_modules", "but is wte"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM", "use MULTI_GPU or FSDP"]),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ["`parallelism_config`", "not supported"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["dynamo_backend", "but is INDUCTOR", "compiled anyway"]),
        ({"PJRT_DEVICE": "TPU"}, ["PJRT_DEVICE", "TPU"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["mixed_precision", "no, bf16 or fp16", "but is fp8"]),
    ],
)
def test_what_it_may_not(environment, facts, launched_with):
    launched_with(**environment)
    with pytest.raises(LaunchError) as refusal:
        launch_checks.check(4, 2)
    assert all(fact in str(refusal.value) for fact in facts), refusal.value
    assert "\n" not in str(refusal.value)


def test_deepspeed_that_is_not_installed(launched_with, monkeypatch):
    launched_with(**ZERO2)
    monkeypatch.setattr(launch_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="DeepSpeed.* not installed: `pip install deepspeed`"):
        launch_checks.check(4, 2)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_launchers_side_by_side(name, launched_with):
    """One for each machine is right, and after a restart one alone may be all that is left."""
    launched_with(WORLD_SIZE="2", GROUP_WORLD_SIZE="1", **{name: "4"})
    with pytest.raises(LaunchError, match=r"4 launchers were started .* own 2 processes: .*--nnodes 4 .*_per_node 2"):
        launch_checks.check(4, 2)
    launched_with(GROUP_WORLD_SIZE="4")
    launch_checks.check(4, 2)
    launched_with(GROUP_WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT="1")
    launch_checks.check(4, 2)


# --- the config of accelerate launch --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fsdp_config": {"fsdp_verion": 2}}, r"`fsdp_config.fsdp_verion`, .*: did you mean fsdp_version\?"),
        (
            {"fsdp_config": {"offload_parms": True}},
            r"`fsdp_config.offload_parms`, .*: did you mean fsdp_offload_params\?",
        ),
        ({"deepspeed_config": {"zero_stag": 3}}, r"`deepspeed_config.zero_stag`, .*: did you mean zero_stage\?"),
        ({"dynamo_config": {"dynamo_backed": "no"}}, r"`dynamo_config.dynamo_backed`, .*did you mean dynamo_backend\?"),
        ({"fsdp_config": {"xyzzy": 1}}, r"`fsdp_config.xyzzy`, .*: leave it out"),
        (
            {"deepspeed_config": {"zero_stage": 3}},
            "`deepspeed_config`, as `distributed_type` is FSDP: set that to D",
        ),
    ],
)
def test_what_accelerate_would_ignore(config, said, launched_with, monkeypatch):
    launched_with(**FSDP2)
    launch = Launch(2, "conf.yaml", {"distributed_type": DistributedType.FSDP} | config)
    monkeypatch.setattr(launch_checks, "find_launch", lambda: launch)
    with pytest.raises(LaunchError, match=f"^conf.yaml: accelerate ignores {said}"):
        launch_checks.check(4, 2)


@pytest.mark.parametrize(
    ("section", "is_refused"),
    [
        ({"dynamo_backend": "INDUCTOR"}, True),
        ({"dynamo_mode": "max-autotune"}, True),
        ({"backend": "aot_eager", "use_dynamic": False}, True),
        ({"dynamo_backend": "NO"}, False),
        ({}, False),
    ],
)
def test_a_model_that_accelerate_would_compile_too(section, is_refused, launched_with, monkeypatch):
    launched_with()
    launch = Launch(2, "conf.yaml", {"distributed_type": DistributedType.MULTI_GPU, "dynamo_config": section})
    monkeypatch.setattr(launch_checks, "find_launch", lambda: launch)
    with pytest.raises(LaunchError, match=r"conf.yaml: `dynamo_config`") if is_refused else nullcontext():
        launch_checks.check(4, 2)


def test_a_cpu_that_was_asked_for(launched_with, monkeypatch):
    """A config's use_cpu reaches a process that is launched alone, and no other: so it is passed on."""
    launched_with()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(launch_checks, "find_launch", lambda: Launch(2, "conf.yaml", {}, uses_cpu=True))
    assert not asks_for_cpu()
    launch_checks.check(4, 2)
    assert asks_for_cpu()


@pytest.mark.parametrize(("has_gpu", "variable"), [(False, ""), (True, "ACCELERATE_USE_CPU=true ")])
def test_the_command_advised_has_the_arguments_given_and_a_variable_only_where_it_changes_something(
    has_gpu, variable, launched_with, monkeypatch
):
    launched_with()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(launch_checks.torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(sys, "argv", ["launch/sft.py", "my-data", "--data.train", "a b.jsonl"])
    monkeypatch.setattr(launch_checks, "find_launch", lambda: Launch(2, None, {}, uses_cpu=True))
    with pytest.raises(LaunchError) as refusal:
        launch_checks.check(4, 1)
    command = "torchrun --standalone --nproc_per_node 2 launch/sft.py my-data --data.train 'a b.jsonl'"
    assert f"`{variable}{command}`" in str(refusal.value)


def test_a_section_completed_as_accelerate_does(launched_with, monkeypatch):
    launched_with(**FSDP2)
    sections = {"fsdp_config": {"version": 2, "fsdp_offload_params": False}, "deepspeed_config": {}}
    monkeypatch.setattr(launch_checks, "find_launch", lambda: Launch(2, "conf.yaml", sections))
    launch_checks.check(4, 2)
    with pytest.raises(LaunchError, match="was told to start 2 processes, but started 4"):
        launch_checks.check(4, 4)


# --- what Accelerate has understood ---------------------------------------------------------------------------------


def given(kind, processes):
    return SimpleNamespace(num_processes=processes, distributed_type=DistributedType(kind))


@pytest.mark.parametrize(
    ("environment", "kind"),
    [({}, "MULTI_CPU"), ({}, "MULTI_GPU"), (FSDP2, "FSDP"), (ZERO2, "DEEPSPEED")],
)
def test_what_was_asked_for_is_given(environment, kind, launched_with):
    launched_with(**environment)
    launch_checks.check_given(given(kind, 2), 2)


@pytest.mark.parametrize(
    ("environment", "kind", "processes", "said"),
    [
        ({}, "NO", 1, "2 processes were started, but each would train alone as 1 of 1: use `"),
        (ZERO2, "DEEPSPEED", 1, "2 processes were started, but each would train alone as 1 of 1: use `"),
        ({}, "NO", 2, "their models would not be kept equal: use `"),
        (FSDP2, "MULTI_CPU", 2, "FSDP2, but Accelerate would train by MULTI_CPU: use `"),
        (ZERO2, "MULTI_CPU", 2, "DeepSpeed ZeRO-2, but Accelerate would train by MULTI_CPU"),
        ({}, "FSDP", 2, "DDP, but Accelerate would train by FSDP"),
        ({}, "XLA", 2, "but Accelerate would train by XLA"),
    ],
)
def test_what_is_something_else_is_refused(environment, kind, processes, said, launched_with):
    launched_with(**environment)
    with pytest.raises(LaunchError, match=said):
        launch_checks.check_given(given(kind, processes), 2)


# --- what the model is wrapped in -----------------------------------------------------------------------------------


class DeepSpeedEngine(nn.Module):
    """Known by its name: importing the real one takes seconds."""

    def zero_optimization_stage(self):
        return 3


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """A model in each of what it may be wrapped in, by strategy."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    sharded = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    yield {
        "nothing": nn.Linear(2, 2),
        "ddp": DistributedDataParallel(nn.Linear(2, 2)),
        "fsdp2": sharded,
        "zero3": DeepSpeedEngine(),
    }
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_model_is_wrapped_in_what_was_asked_for(strategy, wrapped):
    launch_checks.check_wrapped(strategy, wrapped[strategy], processes=2)
    others = [model for name, model in wrapped.items() if name != strategy]
    assert len(others) == 3
    for other in others:
        with pytest.raises(LaunchError, match=r"on 2 processes .* must be wrapped in .*, but is in .*: use `"):
            launch_checks.check_wrapped(strategy, other, processes=2)


def test_one_process_needs_no_wrapping_for_ddp(wrapped):
    launch_checks.check_wrapped("ddp", wrapped["nothing"], processes=1)
    launch_checks.check_wrapped("ddp", wrapped["ddp"], processes=1)  # as torchrun has it
    with pytest.raises(LaunchError, match="must be wrapped in DDP, but is in FSDP2"):
        launch_checks.check_wrapped("ddp", wrapped["fsdp2"], processes=1)
    launch_checks.check_wrapped("fsdp2", wrapped["fsdp2"], processes=1)
    with pytest.raises(LaunchError, match="must be wrapped in DeepSpeed ZeRO-2, but is in DeepSpeed ZeRO-3"):
        launch_checks.check_wrapped("zero2", wrapped["zero3"], processes=2)


def test_a_compiled_model_is_seen_through(wrapped):
    compiled = nn.Module()
    compiled._orig_mod = wrapped["ddp"]
    launch_checks.check_wrapped("ddp", compiled, processes=2)
