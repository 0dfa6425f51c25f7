"""The loss of whole rankings, against probabilities of all permutations."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from gpt2ft.data.pairs import compared
from gpt2ft.objectives.losses import pair_losses
from gpt2ft.preference_losses import PairLogProbs
from gpt2ft.settings.training import PreferenceSettings

BETA = 0.3
SETTINGS = PreferenceSettings(loss="plackett_luce", beta=BETA)
RANKS = [[0, 1], [0, 1, 2], [2, 0, 1, 3], [4, 2, 0, 1, 3], [0, 0, 1], [0, 1, 1], [0, 1, 1, 2, 2], [1, 0, 1, 0]]


def pairs_of(rankings):
    """The pairs of some rankings, each the changes of its replies and their ranks."""
    chosen, rejected, of_ranking, replies = [], [], [], []
    first = 0
    for number, (changes, ranks) in enumerate(rankings):
        for better, worse in compared(ranks, "all"):
            chosen.append(changes[better])
            rejected.append(changes[worse])
            of_ranking.append(number)
            replies.append(first + better)
        first += len(ranks)
    zeros, ones = torch.zeros(len(chosen), dtype=torch.float64), torch.ones(len(chosen), dtype=torch.float64)
    return PairLogProbs(
        *(torch.stack(chosen), torch.stack(rejected), zeros, zeros, ones, ones),
        rankings=torch.tensor(of_ranking),
        chosen_replies=torch.tensor(replies),
    )


def random_changes(number, seed=0):
    return 5 * torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probability(changes, order):
    """Of drawing the replies in this order, each from those that are left."""
    worth, left = (BETA * changes).exp(), list(order)
    product = 1.0
    while left:
        product = product * worth[left[0]] / worth[left].sum()
        left = left[1:]
    return product


def of_permutations(changes, ranks):
    """-log of the probability that a reply comes before all worse ones, summed over the replies."""
    loss = 0.0
    orders = [(order, probability(changes, order)) for order in permutations(range(len(ranks)))]
    assert float(sum(p for _, p in orders)) == pytest.approx(1)
    for reply, rank in enumerate(ranks):
        worse = [other for other, its_rank in enumerate(ranks) if its_rank > rank]
        comes_before = [p for order, p in orders if all(order.index(reply) < order.index(other) for other in worse)]
        loss = loss - torch.stack(comes_before).sum().log()
    return loss


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_loss_and_gradient_are_those_of_permutations(ranks):
    changes = random_changes(len(ranks)).requires_grad_()
    losses = pair_losses(SETTINGS, pairs_of([(changes, ranks)]))
    expected = of_permutations(changes, ranks)
    assert losses.tolist() == pytest.approx([float(expected.detach())] * len(losses), rel=1e-12)
    found, by_hand = (torch.autograd.grad(loss, changes)[0] for loss in (losses[0], expected))
    torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: pair_losses(SETTINGS, pairs_of([(x, ranks)])), changes)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_probabilities_of_all_rankings_are_one(number):
    changes = random_changes(number)
    losses = [pair_losses(SETTINGS, pairs_of([(changes, ranks)]))[0] for ranks in permutations(range(number))]
    assert float(torch.stack(losses).neg().exp().sum()) == pytest.approx(1, rel=1e-12)


def test_two_replies_have_the_sigmoid_loss_to_the_last_bit():
    by_loss = {}
    for loss in ("plackett_luce", "sigmoid"):
        changes = torch.cat([random_changes(40), torch.tensor([1e5, -1e5, 300.0, 0.0, 0.0, 0.0])]).requires_grad_()
        pairs = pairs_of([(changes[i : i + 2], [0, 1]) for i in range(0, 46, 2)])
        losses = pair_losses(PreferenceSettings(loss=loss, beta=BETA), pairs)
        by_loss[loss] = losses, torch.autograd.grad(losses.sum(), changes)[0]
    for found, expected in zip(*by_loss.values(), strict=True):
        assert torch.equal(found, expected)


def test_rankings_beside_each_other_are_what_they_are_alone():
    """Also where two rankings share a reply, as two records of one prompt may."""
    rankings = [(random_changes(len(ranks), seed), ranks) for seed, ranks in enumerate(RANKS)]
    alone = torch.cat([pair_losses(SETTINGS, pairs_of([ranking])) for ranking in rankings])
    together = pairs_of(rankings)
    torch.testing.assert_close(pair_losses(SETTINGS, together), alone, rtol=1e-12, atol=0)
    shared = replace(together, chosen_replies=torch.zeros_like(together.chosen_replies))
    only_two = [number for number, (_, ranks) in enumerate(rankings) if len(compared(ranks, "all")) == 1]
    here = torch.isin(together.rankings, torch.tensor(only_two))
    torch.testing.assert_close(pair_losses(SETTINGS, shared)[here], alone[here], rtol=1e-12, atol=0)
    assert here.any()


@pytest.mark.parametrize("pairs", ["best_worst", "adjacent"])
def test_some_pairs_of_a_ranking_are_refused(pairs):
    (problem,) = SETTINGS.model_copy(update={"pairs": pairs}).problems()
    assert "`dpo.pairs`" in problem
    assert pairs in problem
