"""The idea that carries everything: a tree in one stream is exact.

Every target's log-probability equals that on each enumerated root-to-leaf path alone, and with a message counted
by its leaves so do the gradients. The paths are enumerated and rendered here from the messages themselves, with
nothing of the code that builds trees and streams.
"""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from gpt2ft.conversation import MessageTree
from gpt2ft.data.packing import build_stream
from gpt2ft.data.sources import read_trees
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import TokenTree, weigh
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.stream import TokenStream
from gpt2ft.text.template import render_turn

TOLERANCE = 1e-5  # relative, in float32
TREES = 12


@dataclass(frozen=True)
class Case:
    """Trees of one source whose paths fit the context, as messages and as token trees that count by leaves."""

    trees: list[tuple[MessageTree, TokenTree]]
    tokenizer: object
    model: TargetLogProbs
    capacity: int


@pytest.fixture(scope="module")
def quickstart_case(tokenizer, tiny_gpt2, cache):
    trees = pick_trees("quickstart", tokenizer, cache, capacity=512)
    gpt2 = tiny_gpt2(tokenizer.padded_size, 512, seed=1)
    return Case(trees, tokenizer, TargetLogProbs(gpt2, len(tokenizer), "segments"), 512)


@pytest.fixture(scope="module")
def oasst_case(test_data, gpt2_tokenizer, tiny_gpt2, cache):
    trees = pick_trees(str(test_data("oasst/en_100_tree.jsonl")), gpt2_tokenizer, cache, capacity=1024)
    gpt2 = tiny_gpt2(gpt2_tokenizer.padded_size, 1024, seed=2)
    return Case(trees, gpt2_tokenizer, TargetLogProbs(gpt2, len(gpt2_tokenizer), "segments"), 1024)


@pytest.fixture(params=["quickstart", "oasst"])
def case(request):
    return request.getfixturevalue(f"{request.param}_case")


def pick_trees(source, tokenizer, cache, capacity):
    """A dozen of the branching trees that fit, from the bushiest to the plainest."""
    store = open_store(source, FilterSettings(), tokenizer, cache)
    messages = {tree.id: tree for tree in read_trees(source, FilterSettings())}
    found = []
    for row in range(len(store)):
        tree = weigh(store.tree(row, group=0), "leaves")
        if len(tree.tokens) <= capacity and tree.weights.max() > 1:
            found.append((messages[store.id(row)], tree))
    found.sort(key=lambda pair: (-pair[1].weights.max(), -len(pair[1].tokens), pair[0].id))
    return found[:: max(1, len(found) // TREES)][:TREES]


def enumerated(tree):
    """Paths of message indices, one for each assistant turn below which no assistant speaks."""
    replies = [index for index, message in enumerate(tree.messages) if message.role == "assistant"]
    paths = []
    for reply in replies:
        path, at = [], reply
        while at is not None:
            path.insert(0, at)
            at = tree.messages[at].parent
        paths.append(path)
    return [path for path in paths if not any(path[-1] in other[:-1] for other in paths)]


def path_stream(tree, path, tokenizer):
    """One path as a plain causal stream whose every assistant turn is supervised; and which target is which."""
    tokens, supervised, targets, names = [], [], [], []
    for index in path:
        message = tree.messages[index]
        turn = render_turn(tokenizer, message.role, message.text)
        for offset in range(1, len(turn) if message.role == "assistant" else 0):
            supervised.append(len(tokens) + offset - 1)
            targets.append(turn[offset])
            names.append((index, offset))
        tokens += turn
    size = len(tokens)
    stream = TokenStream(
        tokens=torch.tensor(tokens),
        positions=torch.arange(size),
        horizons=torch.full((size,), size),
        supervised=torch.tensor(supervised),
        targets=torch.tensor(targets),
        weights=torch.ones(len(targets)),
        groups=torch.zeros(len(targets), dtype=torch.long),
        num_tokens=size,
        num_supervised=len(targets),
    )
    return stream, names


def target_names(nodes):
    """(message, offset of the target in its turn) for each target of a token tree, in the order of its stream."""
    return [
        (int(nodes.messages[node]), offset)
        for node in range(len(nodes.lengths))
        if nodes.weights[node]
        for offset in range(1, int(nodes.lengths[node]))
    ]


def stream_of(case, nodes):
    """A stream with a tail, so that the tail is known to do no harm."""
    scored = sum(tree.num_supervised for tree in nodes)
    total = sum(len(tree.tokens) for tree in nodes)
    return build_stream(nodes, total + 5, scored + 3)


def gradients(model, streams):
    """Of minus the sum of weight times log-probability over all streams."""
    model.zero_grad()
    for stream in streams:
        (-(stream.weights * model(stream)).sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found, expected):
    assert ((found - expected).abs() <= TOLERANCE * expected.abs()).all(), (found - expected).abs().max()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def test_the_trees_are_worth_testing(case):
    assert len(case.trees) == TREES
    assert max(len(enumerated(tree)) for tree, _ in case.trees) >= 4
    assert max(int(nodes.weights.max()) for _, nodes in case.trees) >= 3
    assert min(len(enumerated(tree)) for tree, _ in case.trees) >= 2
    assert any(len(tree.messages) > len(nodes.messages) for tree, nodes in case.trees) or case.capacity == 512
    assert len({len(nodes.parents) for _, nodes in case.trees}) >= 3


@torch.no_grad()
def test_log_probs_of_a_tree_are_those_of_every_path_alone(case):
    for tree, nodes in case.trees:
        names = target_names(nodes)
        scored = case.model(stream_of(case, [nodes]))
        in_tree = dict(zip(names, scored[: len(names)], strict=True))
        met = Counter()
        for path in enumerated(tree):
            stream, path_names = path_stream(tree, path, case.tokenizer)
            assert_close(torch.stack([in_tree[name] for name in path_names]), case.model(stream))
            met.update(path_names)
        assert met.keys() == in_tree.keys()
        weights = stream_of(case, [nodes]).weights.tolist()
        assert [met[name] for name in names] == weights[: len(names)]  # as often as there are paths through it


def test_gradients_of_a_tree_are_those_of_all_its_paths(case):
    for tree, nodes in case.trees[::4]:
        expected = gradients(case.model, [path_stream(tree, path, case.tokenizer)[0] for path in enumerated(tree)])
        assert_same_gradients(gradients(case.model, [stream_of(case, [nodes])]), expected)


@torch.no_grad()
def test_log_probs_of_packed_trees_are_those_of_each_alone(case):
    chosen = [nodes for _, nodes in case.trees[::3]]
    packed = case.model(stream_of(case, chosen))
    alone = [case.model(stream_of(case, [nodes]))[: nodes.num_supervised] for nodes in chosen]
    assert len(packed) == sum(map(len, alone)) + 3
    assert_close(packed[:-3], torch.cat(alone))
    assert packed[-3:].isfinite().all()  # entries of weight 0: weight times log-probability must be 0


def test_gradients_of_packed_trees_are_the_sum_of_each_alone(case):
    chosen = [nodes for _, nodes in case.trees[1::5]]
    expected = gradients(case.model, [stream_of(case, [nodes]) for nodes in chosen])
    assert_same_gradients(gradients(case.model, [stream_of(case, chosen)]), expected)


@torch.no_grad()
def test_counting_once_changes_the_weights_alone(case):
    for _, nodes in case.trees[::6]:
        stored = replace(nodes, weights=(nodes.weights > 0).astype("float32"))
        leaves, once = (stream_of(case, [weigh(stored, rule)]) for rule in ("leaves", "once"))
        assert torch.equal(case.model(leaves), case.model(once))
        assert set(once.weights[: once.num_supervised].tolist()) == {1}
        assert leaves.weights.sum() > once.weights.sum()


@torch.no_grad()
def test_a_sibling_in_sight_would_be_noticed(case):
    """The tolerance is far below what wrong horizons do."""
    for _, nodes in case.trees[::6]:
        stream = stream_of(case, [nodes])
        broken = replace(stream, horizons=stream.horizons.clamp(min=stream.num_tokens))
        right, wrong = case.model(stream), case.model(broken)
        assert ((right - wrong).abs() / right.abs()).max() > 100 * TOLERANCE
