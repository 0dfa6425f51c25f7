"""The objective of labelled replies: TRL's loss on one batch, a mean over a step however it is cut into streams."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gpt2ft.objectives.kto import KTO
from gpt2ft.objectives.losses import start_loss
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.stream import Pairs, TokenStream
from gpt2ft.training.evaluate import mean_baseline

SETTINGS = PreferenceSettings(loss="kto", beta=0.3, desirable_weight=0.8, undesirable_weight=1.5)
PROCESS = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


def random_examples(number, seed=0, drift=0.5):
    """Examples as (is desirable, log-probs of the reply and of the unrelated one, their reference)."""
    random = torch.Generator().manual_seed(seed)

    def values(size):
        return -3 * torch.rand(size, generator=random, dtype=torch.float64)

    found = []
    for index in range(number):
        sizes = torch.randint(1, 9, (2,), generator=random).tolist()
        own, other = values(sizes[0]), values(sizes[1])
        found.append((index % 3 != 0, own, other, [float(values(sizes[0]).sum()), float(other.sum()) - drift * index]))
    return found


def make_stream(examples, size=120, replies=24):
    """The stream of some examples, with a tail, and the log-probs of its targets."""
    parts = [part for _, own, other, _ in examples for part in (own, other)]
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.long)
    known = torch.tensor([value for *_, values in examples for value in values], dtype=torch.float64)
    signs = torch.tensor([1.0 if desirable else -1.0 for desirable, *_ in examples])
    lengths, reference, weights = torch.ones(replies), torch.zeros(replies).double(), torch.zeros(replies // 2)
    lengths[: len(parts)], reference[: len(parts)], weights[: len(examples)] = sizes.float(), known, signs
    targets = int(sizes.sum())
    groups, is_real = torch.zeros(size, dtype=torch.long), torch.zeros(size)
    groups[:targets] = torch.repeat_interleave(torch.arange(len(parts)), sizes)
    is_real[:targets] = 1
    index, rankings = torch.arange(replies).view(-1, 2), torch.zeros(replies // 2, dtype=torch.long)
    pairs = Pairs(index, weights, reference, lengths, rankings=rankings, num_pairs=len(examples))
    log_probs = torch.cat([*parts, torch.full((size - targets,), -1e30, dtype=torch.float64)])
    nothing = torch.zeros(size, dtype=torch.long)
    return TokenStream(*[nothing] * 5, is_real, groups, size, targets, pairs=pairs), log_probs


def of_step(streams, objective):
    """Loss and metrics of a step as the loop and the evaluation compute them, and its baseline."""
    answers = {id(stream): log_probs for stream, log_probs in streams}
    model = torch.nn.Module()
    model.forward = lambda stream: answers[id(stream)]
    baseline = mean_baseline(model, objective, enumerate(stream for stream, _ in streams), PROCESS)
    total = normalizer = 0.0
    for stream, log_probs in streams:
        known = replace(stream, pairs=replace(stream.pairs, baseline=baseline))
        sums = torch.cat([objective.loss(log_probs, known)[None].double(), objective.metrics(log_probs, known)])
        total, normalizer = total + sums, normalizer + objective.normalizer(stream)
    return dict(zip(("loss", *objective.metric_names), (total / normalizer).tolist(), strict=True)), float(baseline)


@pytest.mark.parametrize("drift", [0.5, -2.0], ids=["moved away", "estimate below 0"])
def test_the_loss_is_that_of_trl(drift):
    trl = pytest.importorskip("trl.trainer.kto_trainer", reason="needs trl")
    examples = random_examples(10, drift=drift)
    width = 1 + max(len(own) for _, own, *_ in examples)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    log_probs = torch.zeros(len(examples), width - 1, dtype=torch.float64)
    for row, (_, own, *_) in enumerate(examples):
        mask[row, 1 : 1 + len(own)] = 1
        log_probs[row, : len(own)] = own
    zeros = torch.zeros_like(log_probs)
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor([desirable for desirable, *_ in examples]),
        "ref_logps": torch.tensor([known[0] for *_, known in examples], dtype=torch.float64),
        "ref_KL_logps": torch.tensor([known[1] for *_, known in examples], dtype=torch.float64),
    }
    unrelated = torch.stack([other.sum() for _, _, other, _ in examples])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=SETTINGS.beta,
        desirable_weight=SETTINGS.desirable_weight,
        undesirable_weight=SETTINGS.undesirable_weight,
        _compute_kl_logps=lambda model, batch: unrelated,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)
    expected = float(trl.KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False))
    found, baseline = of_step([make_stream(examples)], KTO(SETTINGS))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["divergence"] == baseline == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-9)
    assert (baseline > 0) == (drift > 0)


def test_the_mean_over_a_step_does_not_depend_on_how_replies_are_cut_into_streams():
    examples = random_examples(10)
    whole, baseline = of_step([make_stream(examples)], KTO(SETTINGS))
    cuts = [examples[:1], [], examples[1:7], examples[7:]]
    found, same = of_step([make_stream(cut) for cut in cuts], KTO(SETTINGS))
    assert found == pytest.approx(whole, rel=1e-6)
    assert same == pytest.approx(baseline, rel=1e-12)
    assert found["desirable"] == pytest.approx(0.6)
    assert 0 < found["accuracy"] < 1


def test_only_labelled_replies_are_learnt_and_an_empty_stream_stays_connected():
    objective = KTO(SETTINGS)
    examples = random_examples(2)
    for chosen in (examples, []):
        stream, log_probs = make_stream(chosen)
        log_probs = log_probs.float().requires_grad_()
        objective.loss(log_probs, stream).backward()
        learnt = [group % 2 == 0 for group in stream.groups[: stream.num_supervised].tolist()]
        assert (log_probs.grad != 0).tolist() == learnt + [False] * (len(log_probs) - len(learnt))
        assert objective.normalizer(stream) == len(chosen)
    stream, log_probs = make_stream(examples[1:])  # a desirable reply becomes likelier, an undesirable one less so
    log_probs.requires_grad_()
    objective.loss(log_probs, stream).backward()
    assert float(log_probs.grad[0]) < 0
    stream, log_probs = make_stream(examples[:1])
    log_probs.requires_grad_()
    objective.loss(log_probs, stream).backward()
    assert float(log_probs.grad[0]) > 0


def test_the_loss_of_the_start():
    assert start_loss(PreferenceSettings(loss="kto")) == 0.5
    assert start_loss(PreferenceSettings(loss="kto", desirable_weight=2.0, undesirable_weight=2.0)) == 1.0
    assert start_loss(SETTINGS) is None  # it depends on how many replies are desirable
