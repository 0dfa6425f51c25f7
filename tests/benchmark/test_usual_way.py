"""The usual way, step by step: it must compute what ours computes, or its speed is that of something else."""

import multiprocessing
import signal
from types import SimpleNamespace

import pytest
import torch

from gpt2ft.benchmark import made_up
from gpt2ft.benchmark import usual as usual_module
from gpt2ft.benchmark.made_up import made_up_group, made_up_tree
from gpt2ft.benchmark.usual import TRL, Transformers, Worker, take_step, usual_way
from gpt2ft.benchmark.work import amounts_of
from gpt2ft.data.packing import build_pairs, build_stream, number_replies
from gpt2ft.data.token_tree import weigh
from gpt2ft.errors import SettingsError
from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.dpo import DPO, reply_log_probs
from gpt2ft.objectives.sft import SFT
from gpt2ft.random import generator
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.training import PreferenceSettings

VOCABULARY = 500
TINY = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    """Almost all of the time goes by its length."""
    monkeypatch.setattr(made_up, "VOCABULARY", VOCABULARY)


class OneStep:
    """A step of two micro-batches of hand-made trees."""

    micro_batches_per_step = 2

    def __init__(self, make):
        self.made = [[make(generator(seed, "trees", number)) for seed in range(2)] for number in range(2)]

    def trees(self, step, number):
        return self.made[number]

    def streams(self):
        for trees in self.made:
            numbered = number_replies(trees)
            stream = build_stream(numbered, 4096, 4096)
            yield numbered, stream


def usual(kind, what):
    side = kind(BenchmarkSettings(what=what, batch_size=3), TINY, torch.device("cpu"), torch.float32)
    side.update = lambda: None  # the gradients stay
    ours = GPT2(TINY)
    ours.load_state_dict({name.removeprefix("transformer."): value for name, value in of_model(side).items()})
    return side, ours, TargetLogProbs(ours, VOCABULARY, "segments")


def of_model(side, gradients=False):
    found = {name: p.grad if gradients else p.detach() for name, p in side.model.named_parameters()}
    return {name: value for name, value in found.items() if name != "lm_head.weight"}


def assert_same_gradient(side, ours):
    theirs = {name.removeprefix("transformer."): value for name, value in of_model(side, gradients=True).items()}
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - theirs[name]).abs().max() / parameter.grad.abs().max()
        assert difference < 1e-3, name


@pytest.mark.parametrize("kind", [Transformers, pytest.param(TRL, marks=pytest.mark.long)])
def test_conversations_have_the_gradient_of_all_their_paths(kind):
    side, ours, model = usual(kind, "sft")
    work = OneStep(lambda random: weigh(made_up_tree(random), "leaves"))
    take_step(side, side.settings, work, 0)
    streams = [stream for _, stream in work.streams()]
    normalizer = sum(map(SFT().normalizer, streams))
    for stream in streams:
        (SFT().loss(model(stream), stream) / normalizer).backward()
    assert_same_gradient(side, ours)


@pytest.mark.parametrize("kind", [Transformers, pytest.param(TRL, marks=pytest.mark.long)])
def test_preferences_have_the_gradient_of_all_their_pairs(kind):
    side, ours, model = usual(kind, "dpo")
    work, objective = OneStep(made_up_group), DPO(PreferenceSettings())
    pairs = amounts_of(work, 0).pairs
    side.settings = side.settings.model_copy(update={"batch_size": pairs})  # TRL's loss is the mean of a batch
    take_step(side, side.settings, work, 0)
    for trees, stream in work.streams():
        pairs_alone = build_pairs(trees, torch.zeros(64).numpy(), 64, 64)
        with torch.no_grad():
            of_replies = torch.nan_to_num(reply_log_probs(model(stream), with_pairs(stream, pairs_alone)))
        built = build_pairs(trees, of_replies.numpy(), 64, 64)
        stream = with_pairs(stream, built)
        (objective.loss(model(stream), stream) / pairs).backward()
    assert_same_gradient(side, ours)


def with_pairs(stream, pairs):
    from dataclasses import replace

    return replace(stream, pairs=pairs)


@pytest.mark.parametrize("kind", [Transformers, pytest.param(TRL, marks=pytest.mark.long)])
def test_the_reference_alone_leaves_no_gradient(kind):
    side, _, _ = usual(kind, "reference")
    take_step(side, side.settings, OneStep(made_up_group), 0)
    assert all(parameter.grad is None for parameter in side.model.parameters())


def test_a_process_that_has_ended_is_told_in_a_sentence():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(SettingsError, match="`batch_size`"):
        Worker(ours).step()


def test_ctrl_c_ends_the_process_without_a_word_of_its_own(monkeypatch):
    seen = []

    class Process:
        def __init__(self, **_):
            pass

        def start(self):
            seen.append(signal.getsignal(signal.SIGINT))  # which a new process inherits if it is ignored

        def terminate(self):
            seen.append("terminate")

        def join(self):
            seen.append("join")

    context = SimpleNamespace(Process=Process)
    monkeypatch.setattr(usual_module.multiprocessing, "get_context", lambda _: context)
    before = signal.getsignal(signal.SIGINT)
    with usual_way(BenchmarkSettings(against="transformers"), TINY, torch.device("cpu"), torch.float32):
        assert signal.getsignal(signal.SIGINT) == before
    assert seen == [signal.SIG_IGN, "terminate", "join"]
