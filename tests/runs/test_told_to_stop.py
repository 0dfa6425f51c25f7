"""A run that is told to stop finishes its step, saves and ends; the same command then ends in the same bits."""

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from threading import current_thread, main_thread

import psutil
import pytest
import torch
from processes import ON_CPU, start, torchrun, wait_until
from safetensors.torch import load_file

from gpt2ft import checkpoint
from gpt2ft.data.plan import Plan
from gpt2ft.distributed.signals import Preempted
from gpt2ft.settings.recipes import to_yaml
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.training.tracking import Tracker

STEPS = 7  # evaluation after 3, 6 and 7, saving after every second
RUN = {"steps": STEPS, "log_every": 3}


@pytest.fixture(scope="module")
def uninterrupted(run_sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_sft(folder, **RUN)
    return folder


def same_end(one, other):
    for name in ("model", "best"):
        expected, found = (load_file(folder / name / "model.safetensors") for folder in (one, other))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    files = (folder / "metrics.jsonl" for folder in (one, other))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for line in [line for found in lines for line in found]:
        del line["time"]
        line.pop("train/tokens_per_second", None)
    assert lines[0] == lines[1]
    assert sum("eval/loss" in line for line in lines[0]) == 4
    assert sum("train/loss" in line for line in lines[0]) == 3


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        *((signal.SIGTERM, step) for step in (3, STEPS)),
        *(pytest.param(signal.SIGTERM, step, marks=pytest.mark.long) for step in (1, 2, 4, 5, 6)),
        (signal.SIGUSR1, 2),
    ],
)
def test_during_a_step(step, number, uninterrupted, run_sft, tmp_path, monkeypatch):
    """Just that step is saved; an evaluation that is due after it is left out and made up for."""
    done = []

    def advance(self):
        done.append(None)
        if len(done) == step:
            send(number)
            send(number)  # as a launcher does

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", advance)
        with pytest.raises(Preempted, match=f"has saved step {step}"):
            run_sft(tmp_path / "run", **RUN)
    assert checkpoint.find_newest(tmp_path / "run" / "checkpoints", verbose=True).name.endswith(str(step))
    assert not (tmp_path / "run" / "model").exists()
    run_sft(tmp_path / "run", **RUN)
    same_end(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize(
    "evaluation", [2, pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)]
)
def test_during_evaluation(evaluation, uninterrupted, run_sft, tmp_path, monkeypatch):
    """Of step 0, 3, 6: it is cut short, and made up for."""
    asked, whole = [], Plan.stream

    def stream(self, micro_batch):
        if self.chunks.stores[0].source == "quickstart:held_out":
            asked.append(None)
            if len(asked) == 12 * evaluation - 2:  # twelve held-out streams
                send(signal.SIGTERM)
        return whole(self, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "stream", stream)
        with pytest.raises(Preempted):
            run_sft(tmp_path / "run", **RUN)
    assert len(asked) >= 12 * evaluation - 2
    run_sft(tmp_path / "run", **RUN)
    same_end(uninterrupted, tmp_path / "run")


def test_during_saving(uninterrupted, run_sft, tmp_path, monkeypatch):
    write, sent = checkpoint.write_json, []

    def write_json(file, value):
        if not sent:
            sent.append(file)
            send(signal.SIGTERM)
        write(file, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", write_json)
        with pytest.raises(Preempted, match="has saved step 3"):
            run_sft(tmp_path / "run", **RUN)
    assert sent
    run_sft(tmp_path / "run", **RUN)
    same_end(uninterrupted, tmp_path / "run")


def main_thread_waits():
    """Tells whether the main thread stands in the result of a future."""
    standing = traceback.extract_stack(sys._current_frames()[main_thread().ident])
    return any("concurrent" in call.filename and call.name == "result" for call in standing)


def test_while_it_waits_for_data(uninterrupted, run_sft, tmp_path, monkeypatch):
    """The streams of the third step are late, and the signal comes while the main thread waits for them."""
    whole, sent = Plan.training_stream, []

    def training_stream(self, step, number):
        if step == 2 and current_thread().name.startswith("streams") and not sent:
            wait_until(main_thread_waits)
            sent.append(number)
            send(signal.SIGTERM)
        return whole(self, step, number)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "training_stream", training_stream)
        with pytest.raises(Preempted, match="has saved step [23]"):
            run_sft(tmp_path / "run", **RUN)
    assert sent
    run_sft(tmp_path / "run", **RUN)
    same_end(uninterrupted, tmp_path / "run")


# --- in processes of their own --------------------------------------------------------------------------------------

LAUNCHERS = {"accelerate launch": ["accelerate", "launch"], "torchrun": torchrun(2)}
SCRIPT = "launch/sft.py"


def is_worker(process):
    with suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        return SCRIPT in words and not {"launch", "--standalone"} & set(words)
    return False


def steps_done(run):
    file = run / "metrics.jsonl"
    return sum("train/loss" in line for line in file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    ("launcher", "to_one_worker"),
    [
        ("torchrun", False),
        pytest.param("accelerate launch", False, marks=pytest.mark.long),
        pytest.param("torchrun", True, marks=pytest.mark.long),
    ],
)
def test_under_a_launcher(launcher, to_one_worker, tiny_model_folder, tmp_path):
    """SIGTERM to the launcher alone, or to one process of two. All save, and none is left behind."""
    settings = SFTSettings(
        model={"path": str(tiny_model_folder), "random_init": True},
        data={"train": ["quickstart"], "max_rank": 1, "max_length": 256},
        training={"steps": 100_000, "tokens_per_micro_batch": 256, "micro_batches_per_step": 2, "log_every": 1},
        output=str(tmp_path / "run"),
    )
    (tmp_path / "endless.yaml").write_text(to_yaml(settings))
    with start([*LAUNCHERS[launcher], SCRIPT, tmp_path / "endless.yaml"], **ON_CPU) as started:
        wait_until(lambda: steps_done(tmp_path / "run") >= 3)
        workers = [child for child in started.descendants() if is_worker(child)]
        assert len(workers) == (2 if launcher == "torchrun" else 1)
        (workers[-1] if to_one_worker else started).send_signal(signal.SIGTERM)
        ended = started.finish(code=None)
        assert ended.code != 0
        assert "SIGTERM: finishing this step and saving" in ended.stderr or to_one_worker
        # the launcher of one process does not wait for it
        found = wait_until(lambda: checkpoint.find_newest(tmp_path / "run" / "checkpoints", verbose=False))
        state, _ = checkpoint.read_state(found)
        assert state.step >= 3
        psutil.wait_procs(workers, timeout=300)
        assert not any(worker.is_running() for worker in workers)
