"""The checks before step 1 accept what the package builds and refuse each way of training on the wrong thing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gpt2ft.conversation import ROLES
from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.packing import build_stream
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import TEXT, TokenTree, weigh
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.training.preflight import (
    PreflightError,
    check_isolation,
    check_same_parameters,
    check_supervision,
    check_tied,
    path_alone,
)

MAX_LENGTH, CAPACITY = 256, 1024


@pytest.fixture(scope="module")
def plan(tokenizer, cache):
    """Of the quickstart, with some trees re-rooted and split."""
    store = open_store("quickstart", FilterSettings(), tokenizer, cache)
    chunks = chunk([store], np.array([(0, row) for row in range(len(store))]), ConversationTrees("once", 96, CAPACITY))
    assert chunks.is_cut.sum() > 10
    return Plan(chunks, CAPACITY, micro_batches_per_step=4, seed=0)


@pytest.fixture(scope="module")
def stream(plan):
    """A full one, with more than one conversation and a tail."""
    trees = [plan.chunks.tree(index) for index in plan.streams[0]]
    stream = build_stream(trees, CAPACITY + 128, plan.target_capacity + 64)
    assert len(trees) > 3
    assert stream.num_tokens < len(stream.tokens)
    assert stream.num_supervised < len(stream.targets)
    return stream


@pytest.fixture(scope="module")
def mixed(tokenizer, cache, tmp_path_factory):
    """A plan of plain texts, most of them longer than the context, and a few conversations."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = ["tea " * (1 + 40 * number) for number in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = [open_store(str(source), FilterSettings(), tokenizer, cache) for source in (file, "quickstart")]
    rows = [(number, row) for number in range(2) for row in range(12)]
    return Plan(
        chunk(stores, np.array(rows), ConversationTrees("once", 96, CAPACITY)),
        CAPACITY,
        micro_batches_per_step=4,
        seed=0,
    )


@pytest.fixture
def model(tokenizer, tiny_gpt2):
    return make_model(tokenizer, tiny_gpt2)


def make_model(tokenizer, tiny_gpt2, backend="segments"):
    return TargetLogProbs(tiny_gpt2(tokenizer.padded_size, MAX_LENGTH), len(tokenizer), backend)


def changed(stream, name, at, value):
    """The stream with one entry of one tensor replaced."""
    tensor = getattr(stream, name).clone()
    tensor[at] = value
    return replace(stream, **{name: tensor})


def without(stream, entry):
    """The stream with one target taken out."""
    kept = [e for e in range(len(stream.targets)) if e != entry]
    shorter = {name: getattr(stream, name)[kept] for name in ["supervised", "targets", "weights", "groups"]}
    return replace(stream, num_supervised=stream.num_supervised - 1, **shorter)


class TestSupervision:
    def test_every_stream_of_the_quickstart_is_accepted(self, plan, tokenizer):
        turns = 0
        for bin in plan.streams:
            found = check_supervision(plan.stream(bin), tokenizer)
            assert found == sum(int((plan.chunks.tree(index).weights > 0).sum()) for index in bin)
            turns += found
        assert turns > 300

    def test_an_empty_stream_is_accepted(self, plan, tokenizer):
        assert check_supervision(plan.stream([]), tokenizer) == 0

    @pytest.mark.parametrize("role", ["user", "system"])
    def test_a_turn_of_another_role(self, stream, tokenizer, role):
        """The supervision stays where it is; the turn becomes another's."""
        start = int(stream.supervised[0])
        assert stream.tokens[start] == tokenizer.role_ids["assistant"]
        broken = changed(stream, "tokens", start, tokenizer.role_ids[role])
        with pytest.raises(PreflightError, match=f"the {role} token at {start} .* only assistant turns may be"):
            check_supervision(broken, tokenizer)

    def test_a_supervised_user_token(self, stream, tokenizer):
        at = stream.tokens.tolist().index(tokenizer.role_ids["user"]) + 1
        broken = changed(changed(stream, "supervised", 5, at), "targets", 5, stream.tokens[at + 1])
        with pytest.raises(PreflightError, match=f"the user token at {at} of a stream is supervised"):
            check_supervision(broken, tokenizer)

    def test_a_stop_token_that_is_not_taught(self, stream, tokenizer):
        stops = (stream.targets[: stream.num_supervised] == tokenizer.end_id).nonzero()[:, 0].tolist()
        assert len(stops) > 5
        for entry in [stops[0], stops[3], stops[-1]]:
            with pytest.raises(PreflightError, match=r"teaches no <\|end\|>"):
                check_supervision(without(stream, entry), tokenizer)

    def test_a_stop_token_of_weight_zero(self, stream, tokenizer):
        entry = stream.targets.tolist().index(tokenizer.end_id)
        with pytest.raises(PreflightError, match=r"teaches no <\|end\|>"):
            check_supervision(changed(stream, "weights", entry, 0), tokenizer)

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_shifted_targets(self, stream, tokenizer, shift):
        broken = replace(stream, targets=stream.targets.roll(shift))
        with pytest.raises(PreflightError, match="is not the next token of the same turn"):
            check_supervision(broken, tokenizer)

    def test_a_single_target_shifted_by_one(self, stream, tokenizer):
        at = int(stream.supervised[7])
        assert stream.tokens[at + 2] != stream.tokens[at + 1]
        with pytest.raises(PreflightError, match=f"the target of token {at} of a stream is not the next token"):
            check_supervision(changed(stream, "targets", 7, stream.tokens[at + 2]), tokenizer)

    def test_supervision_that_crosses_into_the_next_turn(self, stream, tokenizer):
        """The last token of a reply would teach the role token of whatever comes next."""
        entry = stream.targets.tolist().index(tokenizer.end_id)
        end = int(stream.supervised[entry]) + 1
        broken = changed(changed(stream, "supervised", entry - 1, end), "targets", entry - 1, stream.tokens[end + 1])
        with pytest.raises(PreflightError, match=f"the target of token {end} .* next token of the same turn"):
            check_supervision(broken, tokenizer)

    def test_supervision_in_the_tail(self, stream, tokenizer):
        last = stream.num_tokens - 1
        for at in (last, last + 1, len(stream.tokens) - 1):
            with pytest.raises(PreflightError, match=f"token {at} "):
                check_supervision(changed(stream, "supervised", stream.num_supervised - 2, at), tokenizer)

    def test_supervision_outside_of_any_turn(self, tokenizer, stream):
        tokens = stream.tokens.clone()
        tokens[:3] = 5
        broken = changed(changed(replace(stream, tokens=tokens), "supervised", 0, 1), "targets", 0, 5)
        with pytest.raises(PreflightError, match="the stray token at 1 of a stream"):
            check_supervision(broken, tokenizer)

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_a_weight_that_is_none(self, stream, tokenizer, weight):
        at = int(stream.supervised[7])
        with pytest.raises(PreflightError, match=f"weight of token {at} of a stream is {weight:g}"):
            check_supervision(changed(stream, "weights", 7, weight), tokenizer)

    def test_a_turn_of_two_weights(self, stream, tokenizer):
        with pytest.raises(PreflightError, match=r"turn \d+ of a stream has targets of weight 0\.5"):
            check_supervision(changed(stream, "weights", 1, 0.5), tokenizer)

    def test_a_turn_that_is_not_the_last(self, tokenizer):
        """Siblings are none that follow, nor is the next conversation."""
        with pytest.raises(PreflightError, match="turn 2 .* not the last assistant turn"):
            check_supervision(talk([2, 1], tokenizer), tokenizer, last_only=True)
        alone = talk([0.5, 0], tokenizer)
        with pytest.raises(PreflightError, match="turn 2 .* not the last assistant turn"):
            check_supervision(alone, tokenizer, last_only=True)
        assert check_supervision(alone, tokenizer) == 1
        assert check_supervision(talk([0, 0.5], tokenizer), tokenizer, last_only=True) == 2


def talk(weights, tokenizer):
    """A stream of a prompt, a reply, a question and two answers to it, then another conversation of one exchange."""
    turn = {role: [id, 5, tokenizer.end_id] for role, id in tokenizer.role_ids.items()}
    first, last = weights
    nodes = [("user", -1, 0), ("assistant", 0, first), ("user", 1, 0), ("assistant", 2, last), ("assistant", 2, last)]
    trees = [
        TokenTree(
            tokens=np.array([id for role, *_ in chosen for id in turn[role]]),
            lengths=np.full(len(chosen), 3, np.int32),
            parents=np.array([parent for _, parent, _ in chosen], np.int32),
            roles=np.array([ROLES.index(role) for role, *_ in chosen], np.int8),
            weights=np.array([weight for *_, weight in chosen], np.float32),
            groups=np.zeros(len(chosen), np.int32),
            messages=np.arange(len(chosen), dtype=np.int32),
        )
        for chosen in (nodes, [("user", -1, 0), ("assistant", 0, 0)])
    ]
    return build_stream(trees, 128, 64)


class TestPlainText:
    def streams(self, plan):
        return [(bin, plan.stream(bin)) for bin in plan.streams]

    def test_texts_and_pieces_of_texts_are_accepted(self, mixed, tokenizer):
        turns = endless = 0
        for bin, stream in self.streams(mixed):
            trees = [mixed.chunks.tree(index) for index in bin]
            assert check_supervision(stream, tokenizer) == sum(int((tree.weights > 0).sum()) for tree in trees)
            turns += sum(tree.roles[0] == TEXT for tree in trees)
            endless += sum(tree.roles[0] == TEXT and tree.tokens[-1] != tokenizer.end_of_text_id for tree in trees)
        assert turns - endless == 12  # each text ends once
        assert endless > 20

    def test_a_text_is_isolated_like_a_conversation(self, mixed, model):
        for _, stream in self.streams(mixed)[:2]:
            assert check_isolation(model, stream, paths=8) < 1e-5

    def test_supervision_from_one_text_into_the_next(self, mixed, tokenizer):
        """Both have the same token at their ends, so only where a tree ends tells them apart."""
        tree = next(tree for tree in map(mixed.chunks.tree, range(len(mixed.chunks))) if len(tree.tokens) < 20)
        assert tree.tokens[0] == tree.tokens[-1] == tokenizer.end_of_text_id
        stream = build_stream([tree, tree], 128, 64)
        assert check_supervision(stream, tokenizer) == 2
        end = len(tree.tokens) - 1
        entry = stream.supervised.tolist().index(end - 1)
        broken = changed(stream, "supervised", entry, end)
        with pytest.raises(PreflightError, match=f"the target of token {end} of a stream is not the next token"):
            check_supervision(broken, tokenizer)

    def test_supervision_from_a_conversation_into_a_text(self, mixed, tokenizer):
        trees = [mixed.chunks.tree(index) for index in range(len(mixed.chunks))]
        chat, text = (next(tree for tree in trees if (tree.roles[0] == TEXT) == wanted) for wanted in (False, True))
        both = build_stream([chat, text], CAPACITY, CAPACITY)
        check_supervision(both, tokenizer)
        end = len(chat.tokens) - 1
        entry = both.supervised.tolist().index(end - 1)
        broken = changed(changed(both, "supervised", entry, end), "targets", entry, tokenizer.end_of_text_id)
        with pytest.raises(PreflightError, match=f"the target of token {end} of a stream is not the next token"):
            check_supervision(broken, tokenizer)

    def test_an_assistant_turn_beside_texts_must_still_teach_its_end(self, mixed, tokenizer):
        stops = 0
        for _, stream in self.streams(mixed):
            targets = stream.targets[: stream.num_supervised].tolist()
            if tokenizer.end_id in targets:
                with pytest.raises(PreflightError, match=r"teaches no <\|end\|>"):
                    check_supervision(without(stream, targets.index(tokenizer.end_id)), tokenizer)
                stops += 1
        assert stops


class TestIsolation:
    @pytest.mark.parametrize("backend", ["segments", "dense"])
    def test_holds_on_every_backend_of_the_cpu(self, tokenizer, tiny_gpt2, stream, backend):
        worst = check_isolation(make_model(tokenizer, tiny_gpt2, backend), stream, paths=8)
        assert worst < 1e-5

    def test_an_empty_stream_has_nothing_to_isolate(self, model, plan):
        assert check_isolation(model, plan.stream([])) == 0

    @pytest.mark.parametrize("backend", ["segments", "dense"])
    def test_conversations_that_see_each_other(self, tokenizer, tiny_gpt2, stream, backend):
        broken = replace(stream, horizons=torch.full_like(stream.horizons, len(stream.horizons)))
        with pytest.raises(PreflightError, match=f"the attention backend {backend} does not isolate conversations"):
            check_isolation(make_model(tokenizer, tiny_gpt2, backend), broken)

    @pytest.mark.parametrize("sight", [1, 8, 64])
    def test_turns_that_do_not_see_their_past(self, model, stream, sight):
        """Every token is out of sight after so many."""
        near = torch.arange(len(stream.horizons)) + sight
        broken = replace(stream, horizons=stream.horizons.minimum(near))
        dense = TargetLogProbs(model.gpt2, model.num_ids, "dense")
        with pytest.raises(PreflightError, match="does not isolate"):
            check_isolation(dense, broken)

    def test_every_stream_has_the_size_of_those_in_training(self, model, stream):
        """A compiled backend is tried as it will train, and compiles nothing more."""
        sizes = []
        model.gpt2.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        check_isolation(model, stream)
        assert sizes == [len(stream.tokens)] * 5

    def test_an_attention_that_ignores_horizons(self, model, stream, monkeypatch):
        from gpt2ft.model import attention, logprobs

        def careless(horizons, num_tokens, backend):
            return attention.dense_attention(torch.full_like(horizons, len(horizons)))

        monkeypatch.setattr(logprobs, "attention_for", careless)
        with pytest.raises(PreflightError, match="does not isolate"):
            check_isolation(model, stream)

    def test_positions_that_run_on(self, tokenizer, tiny_gpt2, plan, monkeypatch):
        """A model that takes the place in the stream for the position, as one made for padded batches would."""
        gpt2 = tiny_gpt2(tokenizer.padded_size, CAPACITY)
        model = TargetLogProbs(gpt2, len(tokenizer), "segments")
        forward = gpt2.forward

        def careless(tokens, positions, *others):
            return forward(tokens, torch.arange(len(tokens)), *others)

        monkeypatch.setattr(gpt2, "forward", careless)
        with pytest.raises(PreflightError, match="does not isolate"):
            check_isolation(model, plan.stream(plan.micro_batches(0)[0]))

    def test_log_probs_that_are_not_numbers(self, model, stream):
        with torch.no_grad():
            model.gpt2.ln_f.bias.fill_(torch.nan)
        with pytest.raises(PreflightError, match="by nan"):
            check_isolation(model, stream)

    def test_the_model_is_left_as_it_was(self, tokenizer, tiny_gpt2, stream):
        model = make_model(tokenizer, tiny_gpt2)
        for drop in [module for module in model.modules() if isinstance(module, nn.Dropout)]:
            drop.p = 0.5  # would drown the comparison if it were on
        for training in (True, False):
            check_isolation(model.train(training), stream)
            assert model.training is training
        assert all(parameter.grad is None for parameter in model.parameters())


class TestPathAlone:
    def test_of_a_branching_tree(self, make_tree):
        nodes = [("user", 3, -1), ("assistant", 4, 0), ("user", 2, 1), ("assistant", 5, 2), ("assistant", 3, 0)]
        other = [("user", 2, -1), ("assistant", 3, 0)]
        trees = [weigh(make_tree(*turns), "once") for turns in (other, nodes)]
        stream = build_stream(trees, 128, 64)
        first, deep, side = [0, 1], [0, 1, 2, 3], [0, 4]
        expected = dict.fromkeys((0, 1), (trees[0], first))
        expected |= dict.fromkeys(range(2, 9), (trees[1], deep))
        expected |= dict.fromkeys((9, 10), (trees[1], side))
        assert stream.num_supervised == len(expected)
        for entry, (tree, path) in expected.items():
            alone, entries = path_alone(stream, int(stream.supervised[entry]))
            assert_is_path(alone, tree, path)
            assert entry in entries.tolist()
            assert torch.equal(stream.targets[entries], alone.targets)
            assert torch.equal(stream.tokens[stream.supervised[entries]], alone.tokens[alone.supervised])

    def test_of_random_trees(self, random_tree):
        """Of every supervised index, among several trees: some root-to-leaf path through it, whole."""
        branched = 0
        for seed in range(25):
            random = np.random.default_rng(seed)
            trees = [weigh(random_tree(random), "leaves") for _ in range(3)]
            stream = build_stream(trees, 2048, 1024)
            starts = np.cumsum([0] + [len(tree.tokens) for tree in trees])
            for index in stream.supervised[: stream.num_supervised : 3].tolist():
                tree = trees[int(np.searchsorted(starts, index, side="right")) - 1]
                alone, entries = path_alone(stream, index)
                messages = list(dict.fromkeys((alone.tokens[: alone.num_tokens] // 1000).tolist()))
                assert messages == tree.path_to(messages[-1])
                assert messages[-1] not in tree.parents  # down to a leaf
                assert_is_path(alone, tree, messages)
                assert index in stream.supervised[entries].tolist()
                scored = sum(int(tree.lengths[node]) - 1 for node in messages if tree.weights[node])
                assert alone.num_supervised == len(entries) == scored
                branched += len(messages) > 3 and len(set(tree.parents.tolist())) < len(tree.parents) - 2
        assert branched > 100


def assert_is_path(alone, tree, path):
    """The nodes of a hand-made tree one after the other, and a tail up to a multiple of 128."""
    tokens = [node * 1000 + offset for node in path for offset in range(int(tree.lengths[node]))]
    size = len(tokens)
    assert alone.num_tokens == size
    assert len(alone.tokens) % 128 == 0
    assert alone.tokens[:size].tolist() == tokens
    assert alone.positions[:size].tolist() == list(range(size))
    assert alone.horizons[:size].tolist() == [size] * size
    assert alone.horizons[size:].tolist() == list(range(size + 1, len(alone.tokens) + 1))
    assert torch.equal(alone.tokens[alone.supervised] + 1, alone.targets)


class TestTied:
    def test_one_table_is_accepted(self, model):
        check_tied(model)

    def test_a_second_table_is_refused(self, model):
        model.gpt2.lm_head = nn.Linear(model.gpt2.config.n_embd, model.gpt2.config.vocab_size, bias=False)
        with pytest.raises(PreflightError, match=r"must be one parameter, .* gpt2\.wte\.weight, gpt2\.lm_head\.weight"):
            check_tied(model)

    def test_a_head_that_is_the_table_is_accepted(self, model):
        model.gpt2.lm_head = nn.Linear(model.gpt2.config.n_embd, model.gpt2.config.vocab_size, bias=False)
        model.gpt2.lm_head.weight = model.gpt2.wte.weight
        check_tied(model)

    def test_as_many_positions_as_ids_are_no_second_table(self, tiny_gpt2):
        check_tied(TargetLogProbs(tiny_gpt2(256, 256), 250, "segments"))


class TestSameParameters:
    def test_a_wrapper_that_keeps_them(self, model):
        check_same_parameters(model, nn.Sequential(model))

    def test_a_wrapper_that_copies_them(self, model, tokenizer, tiny_gpt2):
        with pytest.raises(PreflightError, match="replaced some of its parameters"):
            check_same_parameters(model, make_model(tokenizer, tiny_gpt2))
