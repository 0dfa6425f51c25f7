"""launch/cluster: what is handed to Slurm and SkyPilot, run here with stand-ins for the programs of a cluster.

Each stand-in writes down what it was called with; torchrun's plays a run that ends well, fails, or is told to stop.
"""

import importlib.util
import os
import re
import shutil
import sys

import pytest
import yaml
from processes import ROOT, run

from gpt2ft.distributed.signals import Preempted

SBATCH = ROOT / "launch" / "cluster" / "slurm.sbatch"
SKYPILOT = ROOT / "launch" / "cluster" / "skypilot.yaml"
TASK = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
ENDS = {  # of torchrun: what its processes do first, and its exit code, which is 1 whatever theirs is
    "well": "save; exit 0",
    "failed": "save; exit 1",
    "told": "trap 'save; exit 1' TERM; touch \"$LOG.started\"; told; for _ in $(seq 200); do sleep 0.05; done; exit 9",
    "while copying": 'save; until [ -e "$LOG.copying" ]; do sleep 0.01; done; exit 0',
    "told too early": "trap 'exit 1' TERM; told; for _ in $(seq 200); do sleep 0.05; done; exit 9",
}
NOTHING_MORE = "told() { :; }"
BY_SLURM = "told() { kill -TERM $PPID; }"  # which signals what srun has started
TORCHRUN = """
echo "torchrun $*" >> "$LOG"
save() { mkdir -p "$SAVED/step-00000002" "$SAVED/.step-00000003.1.tmp"; echo new > "$SAVED/step-00000002/state.json"; }
"""
RSYNC = f"""#!{sys.executable}
import os, pathlib, shutil, sys, time
options, (source, target) = sys.argv[1:-2], map(pathlib.Path, sys.argv[-2:])
with open(os.environ["LOG"], "a") as log:
    print("rsync", *sys.argv[1:], file=log)
if os.environ.get("NO_BUCKET"):
    sys.exit(23)
if "--delete-after" in options:
    copying = pathlib.Path(os.environ["LOG"] + ".copying")
    copying.touch(exist_ok=False)  # no two at once
    time.sleep(float(os.environ.get("COPY_TAKES", 0)))
    shutil.rmtree(target / source.name, ignore_errors=True)
ignore = shutil.ignore_patterns(".*") if ".*" in options else None
shutil.copytree(source, target / source.name, ignore=ignore, dirs_exist_ok=True)
if "--delete-after" in options:
    copying.unlink()
"""


class Cluster:
    """A folder with stand-ins on its path, and what they were called with."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.saved = folder / "runs" / "oasst-gpt2" / "checkpoints"
        (folder / "bin").mkdir()

    def program(self, name, body):
        file = self.folder / "bin" / name
        file.write_text(body if body.startswith("#!") else f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)

    def run(self, script, *arguments, **environment):
        """Its exit code and what it printed."""
        known = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "LOG": str(self.log),
            "SAVED": str(self.saved),
        }
        ended = run(["bash", script, *arguments], code=None, **(known | environment))
        return ended.code, ended.printed

    def calls(self, name):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[0] == name]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def options(call):
    """{option: value} of a call of torchrun's, and what follows them."""
    words = call.split()[1:]
    count = next(number for number, word in enumerate(words) if number % 2 == 0 and not word.startswith("--"))
    return dict(zip(words[:count:2], words[1:count:2], strict=True)), words[count:]


# --- Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sbatch(cluster):
    """sbatch(how the run ends): exit code and output of the script on two nodes with 4 GPUs each."""
    hostnames = 'if [ "$1 $2" = "show hostnames" ]; then printf "node-1\\nnode-2\\n"; fi'
    cluster.program("scontrol", f'echo "scontrol $*" >> "$LOG"; {hostnames}')
    cluster.program("srun", 'echo "srun $*" >> "$LOG"; while [ "$1" != bash ]; do shift; done; "$@"')

    def sbatch(ends, *arguments, **environment):
        cluster.program("torchrun", f"{TORCHRUN}{BY_SLURM}; {ENDS[ends]}")
        slurm = {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "RUNS": str(cluster.folder / "runs"),
        }
        return cluster.run(SBATCH, *(arguments or ("launch/sft.py", "oasst-gpt2")), **(slurm | environment))

    return sbatch


def test_slurm_starts_torchrun_once_on_each_node(cluster, sbatch):
    assert sbatch("well") == (0, "")
    (call,) = cluster.calls("torchrun")
    given, command = options(call)
    assert given == {
        "--nnodes": "2",
        "--nproc_per_node": "4",
        "--max_restarts": "3",
        "--rdzv_id": "17",
        "--rdzv_backend": "c10d",
        "--rdzv_endpoint": "node-1:29500",
    }
    assert command == ["launch/sft.py", "oasst-gpt2", "--output", str(cluster.saved.parent)]
    assert "requeue" not in cluster.log.read_text()


def test_slurm_hands_on_what_follows_the_recipe(cluster, sbatch):
    code, _ = sbatch("well", "launch/dpo.py", "my/own.yaml", "--training.steps", "3 000")
    assert code == 0
    assert cluster.calls("srun")[0].endswith(f"3 000 --output {cluster.folder}/runs/own")


def test_slurm_queues_a_run_again_that_was_told_to_stop_and_has_saved(cluster, sbatch):
    assert Preempted.exit_code == 75
    code, _ = sbatch("told")
    assert code == 75
    assert cluster.calls("scontrol")[1:] == ["scontrol requeue 17"]


@pytest.mark.parametrize(("ends", "expected"), [("failed", 1), ("told too early", 75)])
def test_slurm_does_not_queue_a_run_again_that_failed_or_made_no_step(cluster, sbatch, ends, expected):
    code, _ = sbatch(ends)
    assert code == expected
    assert len(cluster.calls("torchrun")) == 1
    assert "requeue" not in cluster.log.read_text()


@pytest.mark.parametrize(("code", "is_queued_again"), [(75, True), (1, False), (2, False), (130, False)])
def test_slurm_goes_by_the_exit_code_of_the_step(cluster, sbatch, code, is_queued_again):
    cluster.program("srun", f'mkdir -p "$SAVED/step-00000002"; exit {code}')
    assert sbatch("well")[0] == code
    assert ("scontrol requeue 17" in cluster.calls("scontrol")) == is_queued_again


def test_slurm_says_what_is_missing(sbatch):
    code, printed = sbatch("well", "launch/sft.py")
    assert (code, printed.startswith("usage: ")) == (2, True)
    code, printed = sbatch("well", RUNS="")
    assert code != 0
    assert "RUNS: must be a folder that all nodes share" in printed


def test_slurm_gives_torchrun_less_time_than_it_has():
    text = SBATCH.read_text(encoding="utf-8")
    signal, seconds = re.search(r"^#SBATCH --signal=(\w+)@(\d+)$", text, re.M).groups()
    assert signal == "TERM"  # what torchrun passes on; it dies of others
    assert int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1]) < int(seconds)


# --- SkyPilot -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sky_run(cluster):
    """sky_run(how the run ends, rank): exit code and output of the task's run block on one of two machines."""
    bucket = cluster.folder / "bucket"
    before = bucket / "oasst-gpt2" / "checkpoints" / "step-00000001"
    before.mkdir(parents=True)
    (before / "state.json").write_text("old")
    (cluster.folder / "gpt2ft" / "bin").mkdir(parents=True)
    (cluster.folder / "gpt2ft" / "bin" / "activate").touch()
    cluster.program("rsync", RSYNC)
    cluster.program("sudo", 'echo "sudo $*" >> "$LOG"; [ "$1" != tee ] || cat >> "$LOG"')
    cluster.program("sleep", 'echo "sleep $1" >> "$LOG"; exec /bin/sleep 0.05')
    notice = '[ -n "$TAKEN_AWAY" ] && [ -e "$LOG.started" ]'
    cluster.program("curl", f'echo "curl $*" >> "$LOG"; case "$*" in *api/token) echo secret;; *) {notice};; esac')
    script = cluster.folder / "run.sh"
    added = '\ncode=$?\necho "waits for the bucket"\nexit $code\n'  # as SkyPilot does
    script.write_text(TASK["run"].replace("/bucket", str(bucket)) + added)

    def sky_run(ends, rank, **environment):
        cluster.program("torchrun", f"{TORCHRUN}{NOTHING_MORE}; {ENDS[ends]}")
        sky = {
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "4",
            "SKYPILOT_TASK_ID": "sky-managed-1",
        }
        return cluster.run(script, **(TASK["envs"] | sky | {"BUCKET": "mine"} | environment))

    return sky_run


@pytest.mark.parametrize("rank", [0, 1])
def test_skypilot_starts_torchrun_once_on_each_machine(cluster, sky_run, rank):
    code, printed = sky_run("well", rank)
    assert (code, printed) == (0, "waits for the bucket\n")
    (call,) = cluster.calls("torchrun")
    given, command = options(call)
    assert given == {
        "--nnodes": "2",
        "--nproc_per_node": "4",
        "--max_restarts": "3",
        "--rdzv_id": "sky-managed-1",
        "--rdzv_backend": "c10d",
        "--rdzv_endpoint": "10.0.0.1:29500",
    }
    assert command == ["launch/sft.py", "oasst-gpt2", "--output", str(cluster.saved.parent)]


def test_skypilots_first_machine_restores_shares_and_copies(cluster, sky_run):
    """In that order; what is half-written stays out of the bucket."""
    assert sky_run("well", 0)[0] == 0
    runs, bucket = cluster.folder / "runs", cluster.folder / "bucket"
    order = [line for line in cluster.log.read_text().splitlines() if not line.startswith(("sleep", "curl"))]
    assert order == [
        f"rsync -a {bucket}/oasst-gpt2 {runs}/",
        "sudo tee /etc/exports",
        f"{runs} 10.0.0.1(rw,no_subtree_check)",
        f"{runs} 10.0.0.2(rw,no_subtree_check)",
        "sudo exportfs -ra",
        *cluster.calls("torchrun"),
        *cluster.calls("rsync")[1:],
    ]
    assert (cluster.saved / "step-00000001" / "state.json").read_text() == "old"
    assert (bucket / "oasst-gpt2" / "checkpoints" / "step-00000002" / "state.json").read_text() == "new\n"
    assert not list(bucket.rglob(".*"))
    assert list(cluster.saved.glob(".*"))


def test_skypilots_last_copy_waits_for_the_one_under_way(cluster, sky_run):
    assert sky_run("while copying", 0, COPY_TAKES="0.5") == (0, "waits for the bucket\n")
    assert (cluster.folder / "bucket/oasst-gpt2/checkpoints/step-00000002").exists()
    assert len(cluster.calls("rsync")) >= 3


def test_skypilots_other_machines_use_the_folder_of_the_first(cluster, sky_run):
    assert sky_run("well", 1)[0] == 0
    runs = cluster.folder / "runs"
    assert cluster.calls("sudo") == [f"sudo mount -t nfs4 -o actimeo=3 10.0.0.1:{runs} {runs}"]
    assert cluster.calls("rsync") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_skypilot_hears_of_a_failure_once_the_bucket_has_everything(cluster, sky_run, rank):
    code, printed = sky_run("failed", rank)
    assert (code, printed) == (1, "waits for the bucket\n")
    assert (cluster.folder / "bucket/oasst-gpt2/checkpoints/step-00000002").exists() == (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_is_taken_away_makes_all_save_and_skypilot_start_others(cluster, sky_run, rank):
    code, printed = sky_run("told", rank, TAKEN_AWAY="yes")
    assert (code, printed) == (75, "waits for the bucket\n")
    assert code in TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert (cluster.folder / "runs" / "taken_away").exists()  # where the others look
    assert (cluster.saved / "step-00000002").exists()
    assert (cluster.folder / "bucket/oasst-gpt2/checkpoints/step-00000002").exists() == (rank == 0)
    assert ("sleep 120" in cluster.calls("sleep")) == (rank == 1)  # or the first could not copy
    assert any("X-aws-ec2-metadata-token: secret" in call for call in cluster.calls("curl"))


def test_a_machine_stops_when_another_is_taken_away(cluster, sky_run):
    (cluster.folder / "runs").mkdir()
    (cluster.folder / "runs" / "taken_away").touch()
    assert sky_run("told", 1)[0] == 75
    assert cluster.calls("curl") == []


def test_nothing_is_trained_or_copied_when_the_bucket_cannot_be_read(cluster, sky_run):
    """A copy of an empty folder would empty the bucket."""
    code, _ = sky_run("well", 0, NO_BUCKET="yes")
    assert code != 0
    assert cluster.calls("torchrun") == []
    assert len(cluster.calls("rsync")) == 1


def test_skypilots_recipe_and_script_exist():
    assert (ROOT / TASK["envs"]["SCRIPT"]).is_file()
    assert (ROOT / "launch" / "recipes" / f"{TASK['envs']['RECIPE']}.yaml").is_file()


def test_skypilot_reads_the_task(tmp_path, monkeypatch):
    if importlib.util.find_spec("sky") is None:
        pytest.skip("skypilot is not installed: `pip install skypilot`")
    monkeypatch.setenv("HOME", str(tmp_path))
    from sky.task import Task

    task = Task.from_yaml_config(TASK, env_overrides=[("BUCKET", "my-runs")])
    assert task.num_nodes == 2
    assert task.storage_mounts["/bucket"].name == "my-runs"
    (resources,) = task.resources
    assert resources.use_spot
    assert resources.accelerators == {"A10G": 4}


# --- both -----------------------------------------------------------------------------------------------------------


def scripts(tmp_path):
    blocks = [tmp_path / f"skypilot_{name}.sh" for name in ("setup", "run")]
    for block in blocks:
        block.write_text("#!/bin/bash\n" + TASK[block.stem.partition("_")[2]])
    return [SBATCH, *blocks]


def test_bash_can_read_them(tmp_path):
    for script in scripts(tmp_path):
        run(["bash", "-n", script])


def test_shellcheck_finds_nothing(tmp_path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: `apt-get install shellcheck`")
    for script in scripts(tmp_path):
        assert run(["shellcheck", "--exclude=SC1090,SC1091", script]).stdout == ""


@pytest.mark.parametrize("file", [SBATCH, SKYPILOT], ids=lambda file: file.name)
def test_they_name_no_hyper_parameter(file):
    text = file.read_text(encoding="utf-8")
    commands = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert re.findall(r"--(?:training|optimizer|data|model|lora|dpo)\.\w+", commands) in ([], ["--section.key"])
