"""The preference objective: a mean over all pairs of a step, however they are cut into streams."""

import numpy as np
import pytest
import torch

from gpt2ft.objectives.dpo import DPO, pair_log_probs
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.stream import Pairs, TokenStream

PARAMETERS = {"label_smoothing": 0.15, "gamma": 0.5, "rpo_alpha": 0.0, "ld_alpha": 1.0}
SETTINGS = {
    loss: PreferenceSettings(loss=loss, beta=0.3, **{name: PARAMETERS[name] for name in traits.parameters})
    for loss, traits in PREFERENCE_LOSSES.items()
    if traits.of_pairs
}


def make_stream(groups, num_pairs=6, num_replies=8, num_targets=64):
    """A stream of groups: lengths of replies, reference of each, pairs of them, weight. Positions do not matter."""
    index, weights = torch.zeros(num_pairs, 2, dtype=torch.long), torch.zeros(num_pairs)
    rankings = torch.zeros(num_pairs, dtype=torch.long)
    reference, lengths = torch.zeros(num_replies, dtype=torch.float64), torch.ones(num_replies)
    targets = []
    first = pair = 0
    for ranking, (sizes, known, compared, weight) in enumerate(groups):
        for number, size in enumerate(sizes):
            targets += [first + number] * size
            lengths[first + number] = size
            reference[first + number] = known[number]
        for a, b in compared:
            index[pair], weights[pair], rankings[pair] = torch.tensor([first + a, first + b]), weight, ranking
            pair += 1
        first += len(sizes)
    scored = len(targets)
    numbers = torch.zeros(num_targets, dtype=torch.long)
    numbers[:scored] = torch.tensor(targets, dtype=torch.long)
    is_real = torch.zeros(num_targets)
    is_real[:scored] = 1
    nothing = torch.zeros(num_targets, dtype=torch.long)
    pairs = Pairs(index, weights, reference, lengths, rankings, num_pairs=pair)
    return TokenStream(nothing, nothing, nothing, nothing, nothing, is_real, numbers, num_targets, scored, pairs=pairs)


def random_group(random):
    sizes = random.integers(1, 7, int(random.integers(2, 4))).tolist()
    compared = [(a, b) for a in range(len(sizes)) for b in range(a + 1, len(sizes))]
    return sizes, (-3 * random.random(len(sizes)) * sizes).tolist(), compared, float(random.choice([1.0, 0.25]))


@pytest.mark.parametrize("loss", SETTINGS)
def test_the_mean_over_a_step_does_not_depend_on_how_pairs_are_cut_into_streams(loss):
    random = np.random.default_rng(3)
    groups = [random_group(random) for _ in range(4)]
    log_probs = [-torch.from_numpy(random.random(sum(sizes))).float() for sizes, *_ in groups]
    objective = DPO(SETTINGS[loss])

    def step(cuts, num_pairs):
        total = normalizer = 0.0
        metrics = torch.zeros(len(objective.metric_names), dtype=torch.float64)
        for cut in cuts:
            stream = make_stream([groups[i] for i in cut], num_pairs, num_replies=14, num_targets=90)
            values = torch.cat([*(log_probs[i] for i in cut), torch.full((90,), -1e30)])[:90]
            total += float(objective.loss(values, stream))
            normalizer += objective.normalizer(stream)
            metrics += objective.metrics(values, stream)
        return [total / normalizer, *(metrics / normalizer).tolist()]

    whole = step([[0, 1, 2, 3]], 12)
    assert step([[2], [], [0, 3], [1]], 12) == pytest.approx(whole, rel=1e-5)
    assert {len(compared) for _, _, compared, _ in groups} == {1, 3}
    assert len({weight for *_, weight in groups}) == 2


@pytest.mark.parametrize("loss", SETTINGS)
def test_the_tail_adds_nothing_and_an_empty_stream_stays_connected(loss):
    objective = DPO(SETTINGS[loss])
    log_probs = -torch.rand(64)
    log_probs.requires_grad_()
    empty = make_stream([])
    value = objective.loss(log_probs, empty)
    value.backward()
    assert float(value) == 0
    assert objective.normalizer(empty) == 0
    assert log_probs.grad.tolist() == [0.0] * 64
    assert objective.metrics(log_probs, empty).tolist() == [0.0] * len(objective.metric_names)

    stream = make_stream([([3, 4], [-2.0, -5.0], [(0, 1)], 1.0)])
    log_probs.grad = None
    objective.loss(log_probs, stream).backward()
    assert bool((log_probs.grad[:3] != 0).all())
    assert not log_probs.grad[7:].any()
    assert bool(torch.isfinite(log_probs.grad).all())


def test_replies_are_summed_by_their_number():
    stream = make_stream([([2, 3], [-1.0, -2.0], [(1, 0)], 1.0)])
    pairs = pair_log_probs(-torch.arange(64.0), stream)
    assert [float(values) for values in vars(pairs).values()] == [-9.0, -1.0, -2.0, -1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 1.0]
