"""Processes that would train different runs are told apart before the first step, by what differs."""

import socket
from types import SimpleNamespace

import accelerate.utils
import pytest

from gpt2ft.distributed.agreement import check_agreement
from gpt2ft.distributed.launch_checks import LaunchError

FACTS = {
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
    "lora": {"targets": ["q", "v"]},
    "initial_weights": "a1",
    "data_content": ["b2", "c3"],
    "versions": {"torch": "2.13.0"},
    "step": 7,
}


@pytest.fixture
def compare(monkeypatch):
    """compare(other): what this process finds, the first of three, where the last has other facts."""

    def compare(other):
        def gather(mine):
            return [*mine, *mine, ("worker2", dict(flat(other)))]

        monkeypatch.setattr(accelerate.utils, "gather_object", gather)
        check_agreement(SimpleNamespace(num_processes=3), FACTS)

    def flat(facts, prefix=""):
        for key, value in facts.items():
            yield from flat(value, f"{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return compare


def test_the_same_facts_agree(compare):
    compare(FACTS)


def test_one_process_agrees_with_itself():
    check_agreement(SimpleNamespace(num_processes=1), FACTS)


@pytest.mark.parametrize(
    ("change", "named", "remedy"),
    [
        ({"optimizer": {"learning_rate": 2e-3, "schedule": "cosine"}}, "optimizer.learning_rate", "same settings"),
        ({"optimizer": {"learning_rate": 1e-3}}, "optimizer.schedule", "same settings"),
        ({"lora": {"targets": ["q"]}}, "lora.targets", "same settings"),
        ({"initial_weights": "z"}, "initial_weights", "the model"),
        ({"data_content": ["b2", "z"]}, "data_content", "the files"),
        ({"versions": {"torch": "2.12.0"}}, "versions.torch", "packages"),
        ({"step": 6}, "step", "`output`"),
        ({"more": 1}, "more", "same settings"),
    ],
)
def test_what_differs_is_named_with_rank_and_host(compare, change, named, remedy):
    with pytest.raises(LaunchError) as refused:
        compare(FACTS | change)
    said = str(refused.value)
    assert f"`{named}`" in said
    assert f"rank 0 (host {socket.gethostname()})" in said
    assert "rank 2 (host worker2)" in said
    assert remedy in said
