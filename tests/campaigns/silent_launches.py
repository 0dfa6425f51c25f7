"""Launches that look like training on all processes and are not: how each is refused, and after how many seconds.

    python tests/campaigns/silent_launches.py [NAME ...]

None is refused by the launcher itself. A machine that does nothing else should need less than 10 seconds for each.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from processes import run, torchrun

SCRIPT = "launch/sft.py"
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
USE_TWO = f"use `torchrun --standalone --nproc_per_node 2 {SCRIPT} --output"
TWO = "num_processes: 2\nnum_machines: 1\nmain_process_port: 0\n"
LAUNCH = ["accelerate", "launch"]
TORCHRUN = torchrun(2)


@dataclass(frozen=True)
class Silent:
    """One launch.

    Attributes:
        words: what stands before the script.
        said: what the refusal must contain.
        config: of Accelerate, given by --config_file.
    """

    words: list[str]
    said: str
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)


SILENT = {
    "accelerate --cpu starts one of two": Silent(
        [*LAUNCH, "--cpu", "--num_processes", "2", "--num_machines", "1"],
        f"accelerate launch was told to start 2 processes, but started 1: {USE_TWO}",
    ),
    "MULTI_CPU starts one of two": Silent(
        LAUNCH,
        f"accelerate launch was told to start 2 processes, but started 1: {USE_TWO}",
        config=f"distributed_type: MULTI_CPU\nuse_cpu: true\n{TWO}",
    ),
    "FSDP without a version": Silent(
        [*LAUNCH, "--use_fsdp", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"],
        "fsdp_version must be 2, but is 1: set it in `fsdp_config`",
        environment=ON_CPU,
    ),
    "a key of FSDP misspelt": Silent(
        LAUNCH,
        "accelerate ignores `fsdp_config.fsdp_verion`, which is unknown: did you mean fsdp_version?",
        config=f"distributed_type: FSDP\nfsdp_config: {{fsdp_verion: 2}}\n{TWO}",
        environment=ON_CPU,
    ),
    "DDP with a section for FSDP": Silent(
        LAUNCH,
        "accelerate ignores `fsdp_config`, as `distributed_type` is MULTI_GPU: set that to FSDP, or leave the section",
        config=f"distributed_type: MULTI_GPU\nfsdp_config: {{fsdp_version: 2}}\n{TWO}",
        environment=ON_CPU,
    ),
    "ZeRO-1": Silent(
        LAUNCH,
        "zero_stage must be 2 or 3, but is 1",
        config=f"distributed_type: DEEPSPEED\ndeepspeed_config: {{zero_stage: 1}}\n{TWO}",
        environment=ON_CPU,
    ),
    "clipping by DeepSpeed": Silent(
        LAUNCH,
        "the launcher's gradient_clipping must be none, but is 0.3: use `--training.max_grad_norm`",
        config=f"distributed_type: DEEPSPEED\ndeepspeed_config: {{zero_stage: 2, gradient_clipping: 0.3}}\n{TWO}",
        environment=ON_CPU,
    ),
    "srun without torchrun": Silent(
        ["python"],
        "2 processes were started by mpirun or srun, but each would train alone: start torchrun once on each machine",
        environment=ON_CPU | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
    ),
    "mpirun without torchrun": Silent(
        ["python"],
        "2 processes were started by mpirun or srun, but each would train alone: start torchrun once on each machine",
        environment=ON_CPU | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ),
    "srun with two torchruns side by side": Silent(
        TORCHRUN,
        "2 launchers were started by mpirun or srun, but each trains its own 2 processes: start one on each machine",
        environment=ON_CPU | {"SLURM_STEP_NUM_TASKS": "2"},
    ),
}


@dataclass(frozen=True)
class Outcome:
    code: int
    seconds: float
    errors: list[str]  # the sentences
    printed: str
    has_begun: bool  # to write the output folder


def launch(silent: Silent, folder: Path) -> Outcome:
    """Starts it, without a GPU and without a launcher around this process; all its processes have ended then."""
    words = [*silent.words]
    if silent.config:
        (folder / "accelerate.yaml").write_text(silent.config)
        words += ["--config_file", str(folder / "accelerate.yaml")]
    command = [*words, SCRIPT, "--output", folder / "run"]
    since = time.monotonic()
    ended = run(command, code=None, HF_HOME=folder / "hf", **silent.environment)
    seconds = time.monotonic() - since
    errors = [line.removeprefix("error: ") for line in ended.errors]
    return Outcome(ended.code, seconds, errors, ended.printed, (folder / "run").exists())


def problem(silent: Silent, outcome: Outcome) -> str | None:
    """What is wrong with how a launch ended; None if it was refused as it must be."""
    if outcome.code == 0 or outcome.has_begun:
        return "it was not refused"
    if len(outcome.errors) != 1 or silent.said not in outcome.errors[0]:
        return f"it said {outcome.errors or outcome.printed[-1000:]}"
    return None


def main(names: list[str]) -> int:
    wrong = 0
    for name in names or SILENT:
        with tempfile.TemporaryDirectory() as folder:
            outcome = launch(SILENT[name], Path(folder))
        found = problem(SILENT[name], outcome)
        wrong += found is not None
        print(f"{name:40} {outcome.seconds:5.1f} s   code {outcome.code}   {found or outcome.errors[0]}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
