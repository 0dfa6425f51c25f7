"""The work of a benchmark: made-up streams of both kinds, full and of one shape, and the same as paths."""

import pytest
import torch

from gpt2ft.benchmark.made_up import made_up_group, made_up_tree
from gpt2ft.benchmark.work import Amounts, MadeUp, amounts_of, compared, conversations, make_work, path_to
from gpt2ft.objectives.dpo import DPO
from gpt2ft.random import generator
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.text.tokenizer import ChatTokenizer

LINES = '{"messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "A leaf."}]}\n'


def made_up(**settings):
    return MadeUp(BenchmarkSettings(tokens_per_micro_batch=2048, micro_batches=2, **settings), 2)


@pytest.mark.parametrize("what", ["sft", "dpo"])
def test_streams_are_full_and_of_one_shape(what):
    work = made_up(what=what)
    streams = [work.training_stream(step, number) for step in range(2) for number in range(2)]
    assert {len(stream.tokens) for stream in streams} == {2048}
    assert len({len(stream.targets) for stream in streams}) == 1
    assert min(stream.num_tokens for stream in streams) > 0.8 * 2048
    assert not torch.equal(streams[0].tokens, streams[1].tokens)


def test_pairs_are_of_replies_in_their_stream():
    work = made_up(what="dpo")
    objective = DPO(PreferenceSettings())
    for stream in (work.training_stream(0, number) for number in range(2)):
        real = stream.pairs.weights > 0
        assert real.sum() >= 3
        targets = torch.bincount(stream.groups[: stream.num_supervised])
        assert stream.pairs.lengths[stream.pairs.index[real]].tolist() == targets[stream.pairs.index[real]].tolist()
        loss = objective.loss(-torch.rand(len(stream.targets)), stream)
        assert torch.isfinite(loss)
        assert objective.normalizer(stream) == real.sum()


def test_a_path_is_what_the_tokens_of_its_last_node_see():
    tree = made_up_tree(generator(0, "tree"))
    for node in range(len(tree.parents)):
        path = path_to(tree, node)
        assert len(path.ids) == len(path.is_target) == tree.depths[node] + tree.lengths[node]
        assert path.ids[-tree.lengths[node] :] == tree.tokens[tree.starts[node] :][: tree.lengths[node]].tolist()
        assert sum(path.is_target) == sum(int(tree.lengths[i]) - 1 for i in tree.path_to(node) if tree.weights[i])


def test_every_leaf_has_a_path_and_every_pair_two_with_one_prompt():
    tree = made_up_tree(generator(0, "tree"))
    leaves = set(range(len(tree.parents))) - set(tree.parents.tolist())
    assert len(list(conversations([tree]))) == len(leaves)
    group = made_up_group(generator(0, "tree"))
    pairs = list(compared([group, group]))
    assert len(pairs) == 2 * len(group.pairs)
    for chosen, rejected in pairs:
        prompt = chosen.is_target.index(True)
        assert chosen.ids[:prompt] == rejected.ids[:prompt]
        assert all(chosen.is_target[prompt:])


def test_amounts_are_those_of_the_streams_and_of_the_paths():
    work = made_up()
    amounts, streams = amounts_of(work, 1), [work.training_stream(1, number) for number in range(2)]
    assert amounts.tokens == sum(stream.num_tokens for stream in streams)
    assert amounts.supervised_tokens == sum(stream.num_supervised for stream in streams)
    assert amounts.visible == sum(int((stream.positions[: stream.num_tokens] + 1).sum()) for stream in streams)
    paths = [path for number in range(2) for path in conversations(work.trees(1, number))]
    assert amounts.path_tokens == sum(len(path.ids) for path in paths) > amounts.tokens
    assert amounts + Amounts(pairs=1) == Amounts(**vars(amounts) | {"pairs": 1})


def test_data_of_ones_own(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(ChatTokenizer, "gpt2", lambda: tokenizer)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(LINES.replace("leaf", f"leaf {number}") for number in range(20)))
    work = make_work(BenchmarkSettings(data=(str(file),), tokens_per_micro_batch=256), 1)
    streams = [work.training_stream(0, number) for number in range(4)]
    assert sum(stream.num_tokens for stream in streams) == amounts_of(work, 0).tokens > 0
    texts = [tokenizer.decode(path.ids) for number in range(4) for path in conversations(work.trees(0, number))]
    assert all("A leaf" in text for text in texts)
