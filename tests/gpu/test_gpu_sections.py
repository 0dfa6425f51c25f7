"""Each check of `pytest -m gpu` at small sizes on the CPU: none may be wrong for reasons of its own."""

import json
import warnings

import pytest
import sections
import torch
import training_runs
from accelerate.state import AcceleratorState, GradientState
from host_waits import counted_waits
from section_process import run_section
from sizes import TINY

from gpt2ft.benchmark import training
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.runs import benchmark
from gpt2ft.training.optimizer import adamw

CPU = torch.device("cpu")
LONG = ("sft_medium", "lora_medium", "dpo", "runs", "resume", "sft_usual", "dpo_usual")


def forget_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    """Small models in the place of published ones, and runs in this process in the place of new ones."""
    forget_accelerator()

    def start(*words, stop_after=0, code=0):
        forget_accelerator()
        ended = 0
        try:
            training_runs.main(stop_after, *map(str, words))
        except SystemExit as end:
            ended = end.code or 0
        torch.use_deterministic_algorithms(False)
        assert ended == code

    monkeypatch.setattr(training_runs, "start", start)
    tiny = GPT2Config(vocab_size=benchmark.ROWS, n_embd=16, n_layer=2, n_head=2)
    monkeypatch.setattr(benchmark, "published_config", lambda name: tiny)
    # As on a GPU: the other kind reads a number of each parameter.
    monkeypatch.setattr(training, "adamw", lambda *given, **named: adamw(*given, **(named | {"fused": True})))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in sections.SECTIONS]
)
def test_a_section_holds_on_a_cpu(name, tmp_path):
    figures = list(sections.SECTIONS[name].check(CPU, TINY, tmp_path))
    assert figures
    assert json.loads(json.dumps(figures)) == figures


def test_a_section_in_a_process_of_its_own_leaves_its_figures(tmp_path):
    run_section("log_probs", "cpu", tmp_path / "gpu.jsonl", 120)
    *figures, end = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {(line["section"], line["attention"]) for line in figures} == {
        ("log_probs", "segments"),
        ("log_probs", "dense"),
    }
    assert (end["section"], end["passed"]) == ("log_probs", True)


def test_a_section_that_takes_too_long_is_ended_and_noted(tmp_path):
    with pytest.raises(AssertionError, match=r"longer than 0.1 s"):
        run_section("log_probs", "cpu", tmp_path / "gpu.jsonl", 0.1)
    [end] = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert (end["section"], end["passed"]) == ("log_probs", False)
    assert "longer than 0.1 s" in end["told"]


def test_waits_are_those_that_a_gpu_warns_of(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counted_waits(torch.device("cuda")) as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [wait.rpartition(":")[0] for wait in waits] == [__file__] * 2
    assert modes == ["warn", "default"]
    assert not torch.is_warn_always_enabled()
