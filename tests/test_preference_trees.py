"""One prompt, computed once: what a packed group says of each reply and of each pair is exact.

The reply alone is rendered here, prompt and reply as one plain sequence, with nothing of the code that builds trees and
streams; so is the loss of each pair, from two such sequences.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.packing import build_stream, number_replies
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.dpo import DPO, reply_log_probs
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.stream import TokenStream
from gpt2ft.training.reference_store import reply_keys

TOLERANCE = 1e-5  # relative, in float32
BETA = 0.1


@dataclass(frozen=True)
class Case:
    """A plan of groups, its streams, and a model."""

    plan: Plan
    model: TargetLogProbs
    micro_batches: list[list[int]]


def rows_of(store):
    return np.array([(0, row) for row in range(len(store))])


def case_of(store, vocabulary, gpt2, max_length, capacity, chosen):
    """A plan of the smallest prompts with four replies or more, of several turns, and of those that are cut."""
    rows, chunking = rows_of(store), PreferencePairs("all", "prompt", max_length, capacity)
    chunks = chunk([store], rows, chunking)
    by_size = np.argsort(chunks.sizes, kind="stable").tolist()
    large = [index for index in by_size if chunks.replies[index] >= 4]
    deep = [index for index in by_size if len(chunks.tree(index).parents) - chunks.replies[index] >= 3]
    cut = [index for index in by_size if chunks.is_cut[index]]
    small = np.unique([chunks.rows[index, 1] for kind in (large, deep, cut) for index in kind[:chosen]])
    return planned(chunk([store], rows[small], chunking), vocabulary, gpt2, capacity)


def planned(chunks, vocabulary, gpt2, capacity):
    plan = Plan(chunks, capacity, 4, seed=0)
    plan.reference = np.random.default_rng(0).uniform(-300, -30, len(plan.reference))
    return Case(plan, TargetLogProbs(gpt2, vocabulary, "segments"), plan.streams)


@pytest.fixture(scope="module")
def random_case(tokenizer, tiny_gpt2, write_groups, cache, tmp_path_factory):
    """Random prompts of several turns with up to six replies, some cut and some split."""
    file = write_groups(tmp_path_factory.mktemp("groups") / "groups.jsonl", number=120)
    store = open_store(file, FilterSettings(), tokenizer, cache, kind=PREFERENCES)
    return case_of(store, len(tokenizer), tiny_gpt2(tokenizer.padded_size, 96, seed=1), 96, 256, chosen=4)


@pytest.fixture(scope="module")
def oasst_case(oasst_groups, gpt2_tokenizer, tiny_gpt2):
    gpt2 = tiny_gpt2(gpt2_tokenizer.padded_size, 1024, n_embd=32, seed=2)
    return case_of(oasst_groups, len(gpt2_tokenizer), gpt2, 1024, 2048, chosen=2)


@pytest.fixture(scope="module")
def oasst_groups(test_data, gpt2_tokenizer, cache):
    file = str(test_data("oasst/en_100_tree.jsonl"))
    return open_store(file, FilterSettings(), gpt2_tokenizer, cache, kind=PREFERENCES)


@pytest.fixture(scope="module")
def merged_case(oasst_groups, gpt2_tokenizer, tiny_gpt2):
    """The smallest of OASST's trees that hold three prompts or more, and one prompt that is cut."""
    conversations, rows = oasst_groups.conversations(), rows_of(oasst_groups)
    chunking = PreferencePairs("all", "prompt", max_length=512, capacity=2048, merges=True)
    chunks = chunk([oasst_groups], rows, chunking)
    by_size = np.argsort(chunks.sizes, kind="stable").tolist()
    chosen = [index for index in by_size if len(chunks.merged.get(index, ())) >= 2][:2]
    chosen += [index for index in by_size if chunks.is_cut[index]][:1]
    small = np.isin(conversations, conversations[chunks.rows[chosen, 1]])
    gpt2 = tiny_gpt2(gpt2_tokenizer.padded_size, 512, n_embd=32, seed=2)
    return planned(chunk([oasst_groups], rows[small], chunking), len(gpt2_tokenizer), gpt2, 2048)


@pytest.fixture(params=["random", "oasst", "merged"])
def case(request):
    return request.getfixturevalue(f"{request.param}_case")


@pytest.fixture(scope="module")
def write_groups():
    import json

    def write(file, number):
        random = np.random.default_rng(3)
        words = ["tea", "rain", "cup", "warm", "leaf", "and", "of", "a"]

        def text(most):
            return " ".join(random.choice(words, int(random.integers(1, most))).tolist())

        records = []
        for _ in range(number):
            turns = 1 + 2 * int(random.integers(0, 3))
            prompt = [{"role": "assistant" if turn % 2 else "user", "content": text(15)} for turn in range(turns)]
            scored = [{"response": text(60), "overall_score": int(random.integers(0, 4))} for _ in range(6)]
            records.append((prompt, scored[: int(random.integers(2, 7))]))
        trees = []
        for index, (prompt, scored) in enumerate(records):
            below = [
                {"message_id": f"{index}-r{i}", "role": "assistant", "text": reply["response"],
                 "rank": reply["overall_score"], "replies": []}
                for i, reply in enumerate(scored)
            ]  # fmt: skip
            for turn in reversed(range(len(prompt))):
                role = "prompter" if prompt[turn]["role"] == "user" else "assistant"
                below = [
                    {"message_id": f"{index}-{turn}", "role": role, "text": prompt[turn]["content"], "replies": below}
                ]
            trees.append({"message_tree_id": str(index), "prompt": below[0]})
        file.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
        return str(file)

    return write


def alone(tree, node):
    """Prompt and one reply as a plain causal sequence, of which the reply is scored."""
    nodes, at = [], node
    while at >= 0:
        nodes.insert(0, at)
        at = int(tree.parents[at])
    firsts = np.cumsum([0, *tree.lengths.tolist()])
    tokens = torch.tensor([id for i in nodes for id in tree.tokens[firsts[i] : firsts[i + 1]].tolist()])
    size, length = len(tokens), int(tree.lengths[node]) - 1
    return TokenStream(
        tokens=tokens,
        positions=torch.arange(size),
        horizons=torch.full((size,), size),
        supervised=torch.arange(size - length - 1, size - 1),
        targets=tokens[size - length :],
        weights=torch.ones(length),
        groups=torch.zeros(length, dtype=torch.long),
        num_tokens=size,
        num_supervised=length,
    )


def replies_of(case, micro_batch):
    """(tree, node) of each reply of a micro-batch, in the order of its stream."""
    trees = [case.plan.chunks.tree(index) for index in micro_batch]
    return [(tree, node) for tree in trees for node in np.flatnonzero(tree.weights).tolist()]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_groups_are_worth_testing(case):
    chunks = case.plan.chunks
    shown = [index for micro_batch in case.micro_batches for index in micro_batch]
    assert chunks.replies[shown].max() >= 4
    assert chunks.pairs[shown].max() >= 6
    assert max(map(len, case.micro_batches)) >= 2
    assert chunks.is_cut[shown].any()
    assert (
        max(len(chunks.tree(index).parents) - int(chunks.replies[index]) for index in shown) >= 3
    )  # turns of a prompt


@torch.no_grad()
def test_the_log_prob_of_a_reply_is_that_of_the_reply_alone(case):
    compared = 0
    for micro_batch in case.micro_batches:
        stream = case.plan.stream(micro_batch)
        by_target = case.model(stream)
        together = reply_log_probs(by_target, stream)
        for number, (tree, node) in enumerate(replies_of(case, micro_batch)):
            expected = case.model(alone(tree, node))
            found = by_target[(stream.groups == number) & (stream.weights > 0)]
            assert ((found - expected).abs() <= TOLERANCE * expected.abs()).all(), (found - expected).abs().max()
            assert abs(together[number] - expected.double().sum()) <= TOLERANCE * abs(expected.double().sum())
            compared += 1
    assert compared >= 12


@torch.no_grad()
def test_another_reply_in_sight_would_be_noticed(case):
    """The tolerance is far below what wrong horizons or positions do."""
    limit = case.model.gpt2.config.n_positions
    for micro_batch in case.micro_batches:
        stream = case.plan.stream(micro_batch)
        right = case.model(stream)[: stream.num_supervised]
        in_sight = replace(stream, horizons=stream.horizons.clamp(min=stream.num_tokens))
        moved = replace(stream, positions=torch.arange(len(stream.tokens)) % limit)
        for broken in (in_sight, moved):
            wrong = case.model(broken)[: stream.num_supervised]
            changed = (wrong - right).abs() / right.abs()
            assert changed.max() > 100 * TOLERANCE
            assert (changed > TOLERANCE).double().mean() > 0.5


def test_gradients_of_a_group_are_those_of_its_pairs_as_sequences(case):
    """Every reply computed as a sequence of its own, the loss of each pair written out."""
    objective = DPO(PreferenceSettings(loss="sigmoid", beta=BETA))
    for micro_batch in case.micro_batches:
        stream = case.plan.stream(micro_batch)
        loss = objective.loss(case.model(stream), stream)
        found = gradients(case.model, loss)
        replies, reference = replies_of(case, micro_batch), stream.pairs.reference.tolist()
        expected = torch.zeros((), dtype=torch.float64)
        for tree in number_replies([case.plan.chunks.tree(index) for index in micro_batch]):
            changes = {
                number: case.model(alone(*replies[number])).double().sum() - reference[number]
                for number in tree.groups[tree.weights > 0].tolist()
            }
            for pair, weight in zip(tree.groups[tree.pairs].tolist(), tree.pair_weights.tolist(), strict=True):
                expected = expected - weight * logsigmoid(BETA * (changes[pair[0]] - changes[pair[1]]))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
        for name, gradient in gradients(case.model, expected).items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


@torch.no_grad()
def test_a_group_says_the_same_whatever_it_is_packed_with(case):
    micro_batch = max(case.micro_batches, key=len)
    stream = case.plan.stream(micro_batch)
    together = reply_log_probs(case.model(stream), stream)
    at = 0
    for index in micro_batch:
        tree = number_replies([case.plan.chunks.tree(index)])
        single = build_stream(tree, len(tree[0].tokens), tree[0].num_supervised)
        expected = torch.zeros(int(case.plan.chunks.replies[index]), dtype=torch.float64)
        expected.index_add_(0, single.groups, case.model(single).double())
        found = together[at : at + len(expected)]
        assert ((found - expected).abs() <= TOLERANCE * expected.abs()).all()
        at += len(expected)
    assert at > 3


def test_whole_trees_have_the_losses_and_gradients_of_their_groups(merged_case, oasst_groups):
    """Also the same pairs, weights, and keys of reference log-probs."""
    merged = merged_case.plan
    rows, whole = merged.chunks.all_rows, merged.chunks.chunking
    groups = Plan(chunk([oasst_groups], rows[np.argsort(rows[:, 1])], replace(whole, merges=False)), 2048, 4, seed=0)
    assert len(groups.chunks) > len(merged.chunks)
    assert groups.tokens > merged.tokens
    found = {}
    for plan in (groups, merged):
        keys = reply_keys(plan)
        known = {key: -3.0 * tokens for key, tokens in zip(keys.keys, keys.tokens, strict=True)}
        plan.reference = np.array([known[key] for key in keys.keys])
        by_pairs, by_rankings = (DPO(PreferenceSettings(loss=loss, beta=BETA)) for loss in ("sigmoid", "plackett_luce"))
        merged_case.model.zero_grad()
        sums = np.zeros(3 + len(by_pairs.metric_names))
        for micro_batch in plan.streams:
            stream = plan.stream(micro_batch)
            log_probs = merged_case.model(stream)
            losses = torch.stack([objective.loss(log_probs, stream) for objective in (by_pairs, by_rankings)])
            losses.sum().backward()
            metrics = by_pairs.metrics(log_probs, stream).tolist()
            sums += [*losses.tolist(), by_pairs.normalizer(stream), *metrics]
        gradient = {name: parameter.grad.clone() for name, parameter in merged_case.model.named_parameters()}
        found[plan is merged] = sorted(keys.keys), plan.chunks.pairs.sum(), plan.chunks.replies.sum(), sums, gradient
    *same, sums, gradient = found[True]
    *expected, expected_sums, expected_gradient = found[False]
    assert same == expected
    assert sums == pytest.approx(expected_sums, rel=TOLERANCE)
    for name, values in gradient.items():
        assert (values - expected_gradient[name]).norm() <= TOLERANCE * values.norm() > 0, name


def test_ranked_replies_of_real_trees_stand_at_several_depths(oasst_groups):
    """The saving that the README gives."""
    chunks = {
        merges: chunk([oasst_groups], rows_of(oasst_groups), PreferencePairs("all", "pair", 1024, 8192, merges))
        for merges in (False, True)
    }
    depths = {}
    for row, conversation in enumerate(oasst_groups.conversations().tolist()):
        tree = oasst_groups.tree(row, 0)
        depths.setdefault(conversation, set()).add(len(tree.path_to(len(tree.parents) - 1)))
    assert (len(depths), sum(len(found) > 1 for found in depths.values())) == (100, 74)
    assert (len(chunks[False]), len(chunks[True]), len(chunks[True].all_rows)) == (212, 113, 212)
    assert {merges: int(found.sizes.sum()) for merges, found in chunks.items()} == {False: 144915, True: 125887}
    assert np.array_equal(chunks[True].counts[:, 2:].sum(axis=0), chunks[False].counts[:, 2:].sum(axis=0))


def test_real_groups_need_a_third_of_the_tokens_of_their_pairs(oasst_groups):
    """All pairs of OASST's ranked siblings, against two sequences for each."""
    chunks = chunk(
        [oasst_groups], rows_of(oasst_groups), PreferencePairs("all", "pair", max_length=1024, capacity=8192)
    )
    plan = Plan(chunks, 8192, micro_batches_per_step=8, seed=0)
    assert (chunks.pairs.sum(), chunks.replies.sum(), chunks.repeated.sum()) == (754, 641, 0)
    sequences = 0
    for index in range(len(chunks)):
        tree = chunks.tree(index)
        sequences += sum(len(alone(tree, node).tokens) for pair in tree.pairs.tolist() for node in pair)
    assert sequences == chunks.tokens_if_unpacked.sum()
    assert plan.tokens == sum(stream.num_tokens for stream in map(plan.stream, plan.streams))
    assert round(sequences / plan.tokens, 2) == 3.07
