"""Weights in the data, and the last turns alone: what is learnt equals a plain sum over enumerated paths.

    loss = sum w * nll / sum w

The paths are enumerated here from the records themselves, each is rendered and computed alone, and torch's
cross_entropy scores it.
"""

import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data import store as store_module
from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.kinds import LEARNT, PREFERENCES
from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.sft import SFT
from gpt2ft.settings.scripts import DPOSettings
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.settings.training import DataSettings
from gpt2ft.text.template import render_turn
from gpt2ft.training.evaluate import evaluate_by_source

CONTEXT = 128
MARKS = [None, 1, 1.0, True, 0, False, 0.5, 0.1, 0.75]
ASKED, TOLD = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}


@dataclass
class Case:
    """A record of the layout of OASST's trees, and its messages by number: role, text, weight and parent."""

    record: dict
    messages: list

    def learnt(self, train_on):
        """Replies of a weight above 0; of the last turns, of those alone that end a path."""
        replies = self.last if train_on == "last" else self.replies
        return [index for index in replies if self.messages[index][2]]

    @property
    def replies(self):
        return [index for index, (role, *_) in enumerate(self.messages) if role == "assistant"]

    @property
    def last(self):
        return [path[-1] for path in self.paths(self.replies)]

    def paths(self, replies):
        """Each from the root to one of these replies below which there is no other."""
        paths = [self.path_to(reply) for reply in replies]
        return [path for path in paths if not any(path[-1] in other[:-1] for other in paths)]

    def path_to(self, index):
        path = []
        while index is not None:
            path.insert(0, index)
            index = self.messages[index][3]
        return path


def make_case(name, seed):
    """Of up to 14 turns, with users whom nobody answers, and marks of all kinds on replies."""
    draw = random.Random(seed)
    messages, nodes = [], []

    def grow(parent, depth):
        role = "user" if depth % 2 == 0 else "assistant"
        mark = draw.choice(MARKS) if role == "assistant" else None
        number = len(messages)
        messages.append((role, f"{role} {number} of {name}", 1.0 if mark is None else float(mark), parent))
        spelling = draw.choice(["weight", "loss", "train"])
        replies = []
        node = {"message_id": f"{name}-{number:02}", "role": role, "text": messages[-1][1], spelling: mark}
        nodes.append(node | {"replies": replies})
        for _ in range(draw.choice([0, 1, 1, 2, 3]) if depth and depth < 6 else int(depth == 0) * 2):
            if len(messages) < 14:
                replies.append(grow(number, depth + 1))
        return nodes[number]

    tree = grow(None, 0)
    return Case({"message_tree_id": name, "prompt": tree}, messages)


CASES = [make_case(f"tree{seed}", seed) for seed in range(8)]


@pytest.fixture(scope="module")
def model(lively, tokenizer):
    return TargetLogProbs(lively(tokenizer.padded_size, CONTEXT, scale=4.0), len(tokenizer), "segments")


def write(folder, records, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def plan_of(source, tokenizer, folder, train_on="all", rule="once", max_length=CONTEXT, capacity=128):
    kind = LEARNT[train_on]
    store = open_store(source, FilterSettings(), tokenizer, folder, kind=kind)
    rows = np.array([(0, row) for row in range(len(store))])
    return Plan(chunk([store], rows, ConversationTrees(rule, max_length, capacity, kind)), capacity, 8, seed=0)


def trained(model, plan):
    """The loss of all data in one step, and its gradient."""
    streams = [plan.stream(bin) for bin in plan.streams]
    normalizer = sum(map(SFT().normalizer, streams))
    model.zero_grad()
    losses = [SFT().loss(model(stream), stream) / normalizer for stream in streams]
    for loss in losses:
        loss.backward()
    return float(sum(losses).detach()), model.gpt2.wte.weight.grad.clone()


def scored(model, tokenizer, messages, path):
    """The negative log-likelihood of each target of a path's turns, by message, the path alone."""
    turns = [render_turn(tokenizer, messages[index][0], messages[index][1]) for index in path]
    ids = torch.tensor([id for turn in turns for id in turn])
    attend = dense_attention(torch.full((len(ids),), len(ids)))
    hidden = model.gpt2(ids, torch.arange(len(ids)), attend)
    logits = hidden @ model.gpt2.wte.weight[: len(tokenizer)].t()
    nll = cross_entropy(logits[:-1], ids[1:], reduction="none")
    starts = np.cumsum([0, *map(len, turns)]).tolist()
    return {index: nll[starts[n] : starts[n + 1] - 1] for n, index in enumerate(path)}


def expected(model, tokenizer, cases, train_on, rule):
    """The same as `trained`, as plain sums over enumerated paths."""
    total = weights = 0.0
    for case in cases:
        learnt, met = case.learnt(train_on), set()
        for path in case.paths(learnt):
            nll = scored(model, tokenizer, case.messages, path)
            for index in path:
                if index in learnt and (rule == "leaves" or index not in met):
                    weight = float(np.float32(case.messages[index][2]))
                    total = total + weight * nll[index].sum()
                    weights += weight * len(nll[index])
                met.add(index)
    model.zero_grad()
    loss = total / weights
    loss.backward()
    return float(loss.detach()), model.gpt2.wte.weight.grad.clone()


@pytest.mark.parametrize("rule", ["once", "leaves"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_weighted_trees_are_a_plain_sum_over_enumerated_paths(train_on, rule, model, tokenizer, tmp_path):
    plan = plan_of(write(tmp_path, [case.record for case in CASES]), tokenizer, tmp_path, train_on, rule)
    (loss, gradient), (reference, direction) = trained(model, plan), expected(model, tokenizer, CASES, train_on, rule)
    assert loss == pytest.approx(reference, rel=1e-9)
    assert (gradient - direction).norm() <= 1e-9 * direction.norm()
    assert len(plan.streams) > 1
    others = {("all", "once"), ("all", "leaves"), ("last", "once")} - {(train_on, rule)}
    if (train_on, rule) != ("last", "leaves"):  # which are the same as once: a last turn ends one path alone
        assert all(abs(expected(model, tokenizer, CASES, *other)[0] - loss) > 1e-6 for other in others)


def test_the_cases_are_worth_testing():
    weights = [weight for case in CASES for role, _, weight, _ in case.messages if role == "assistant"]
    assert {0.0, 0.1, 0.5, 0.75, 1.0} == set(weights)
    on_both = 0  # turns that are last on one path of the records, with a user below, and not on another
    for case in CASES:
        parents = [parent for *_, parent in case.messages]
        for index in range(len(parents)):
            below = [child for child, parent in enumerate(parents) if parent == index]
            on_both += case.messages[index][0] == "assistant" and {child in parents for child in below} == {True, False}
    assert on_both
    assert any(not case.messages[index][2] for case in CASES for index in case.last)


def test_last_is_a_fact_of_the_conversation_and_marks_take_away():
    """By enumerating all paths of trees: whoever ends one of them is learnt, if no mark says otherwise."""
    for case in (make_case("x", seed) for seed in range(100, 140)):
        messages = tuple(Message(role, text, parent, weight=weight) for role, text, weight, parent in case.messages)
        kept = MessageTree("x", "test", messages).with_last_replies_alone()
        found = [index for index, message in enumerate(kept.messages) if message.is_supervised]
        assert found == case.learnt("last")
        assert [replace(message, weight=1) for message in kept.messages] == [replace(m, weight=1) for m in messages]
    assert MessageTree("t", "", (Message("text", "Tea."),)).with_last_replies_alone().messages[0].is_supervised


# --- conventions that are not ours -----------------------------------------------------------------------------------


def test_weights_of_0_and_1_give_the_loss_of_transformers_and_trl(model, tokenizer, tmp_path):
    """OpenAI's `weight`: what is not learnt has the label -100, and the mean is over all others of the step."""
    transformers_loss = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    again = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is hot, and it is early."}]
    rows = [[ASKED, TOLD | {"weight": 0}, *again], [again[0], again[1], ASKED, TOLD | {"weight": 1}]]
    plan = plan_of(write(tmp_path, [{"messages": row} for row in rows]), tokenizer, tmp_path)
    assert plan.supervised < sum(plan.stream(bin).num_tokens for bin in plan.streams) / 2
    logits, labels = [], []
    for row in rows:
        turns = [render_turn(tokenizer, each["role"], each["content"]) for each in row]
        learnt = [each["role"] == "assistant" and each.get("weight", 1) for each in row]
        ids = torch.tensor([id for turn in turns for id in turn])
        labels.append([id if is_learnt and n else -100 for turn, is_learnt in zip(turns, learnt, strict=True)
                       for n, id in enumerate(turn)])  # fmt: skip
        attend = dense_attention(torch.full((len(ids),), len(ids)))
        hidden = model.gpt2(ids, torch.arange(len(ids)), attend)
        logits.append(hidden @ model.gpt2.wte.weight[: len(tokenizer)].t())
    count = sum(label != -100 for row in labels for label in row)
    pairs = zip(logits, map(torch.tensor, labels), strict=True)
    losses = [transformers_loss(of, to, len(tokenizer), num_items_in_batch=torch.tensor(count)) for of, to in pairs]
    assert trained(model, plan)[0] == pytest.approx(float(sum(losses).detach()), rel=1e-6)


def test_only_the_ratios_of_weights_count(model, tokenizer, tmp_path):
    """As cross_entropy has it with weights of classes: a step of low weights is no smaller step."""
    for name, weight in (("whole", 1.0), ("half", 0.5)):
        rows = [{"messages": [ASKED | {"content": f"Tea {n}?"}, TOLD | {"weight": weight}]} for n in range(5)]
        write(tmp_path, rows, f"{name}.jsonl")
    whole, half = (
        trained(model, plan_of(str(tmp_path / f"{name}.jsonl"), tokenizer, tmp_path)) for name in ("whole", "half")
    )
    assert whole[0] == half[0]
    assert torch.equal(whole[1], half[1])
    nll = torch.tensor([1.0, 2.0, 4.0])
    log_probs = torch.stack([-nll, torch.log1p(-torch.exp(-nll))], dim=1)
    weighed = cross_entropy(log_probs[:2], torch.tensor([0, 0]), weight=torch.tensor([0.25, 1.0]))
    assert float(weighed) == pytest.approx(float(0.25 * (1 + 2) / (0.25 + 0.25)))


# --- from data to streams ---------------------------------------------------------------------------------------------


def weights_of(records, tokenizer, folder, train_on="all", **filters):
    """Of each row in the store, by node."""
    store = open_store(
        write(folder, records), FilterSettings(**filters), tokenizer, folder / "cache", kind=LEARNT[train_on]
    )
    return [store.tree(row, 0).weights.tolist() for row in range(len(store))], store


def chat(*weights, text="Yes."):
    turns = [[ASKED, TOLD | {"content": f"{text} {n}", "weight": weight}] for n, weight in enumerate(weights)]
    return {"messages": [message for turn in turns for message in turn]}


def test_a_record_weighs_each_of_its_replies(tokenizer, tmp_path):
    rows = [chat(1, 0.5) | {"weight": 0.5}, chat(0.25, 0) | {"train": 0.5, "label": True}]
    rows += [{"messages": [ASKED, TOLD], "sample_weight": 0.125}, {"messages": [ASKED, TOLD], "loss": 1}]
    found, store = weights_of(rows, tokenizer, tmp_path)
    assert found == [[0, 0.5, 0, 0.25], [0, 0.125], [0, 0.125], [0, 1]]
    assert len(set(store.keys().tolist())) == 4
    assert store.statistics.weighed == 4
    assert any("4 messages of a weight below 1" in note for note in store.notes)
    assert weights_of([{"text": "Tea.", "weight": 0.5}], tokenizer, tmp_path)[0] == [[0.5]]
    pairs = [{"prompt": "Tea?", "completion": "Yes.", "worth": 0.5}]
    assert weights_of(pairs, tokenizer, tmp_path, columns=("weight=worth",))[0] == [[0, 0.5]]
    tree = {"message_tree_id": "a", "weight": 0.5, "prompt": {"message_id": "a", "role": "user", "text": "Tea?"}}
    tree["prompt"]["replies"] = [{"message_id": "b", "role": "assistant", "text": "Yes.", "weight": 0.5}]
    assert weights_of([tree], tokenizer, tmp_path)[0] == [[0, 0.25]]
    flat = [{"message_id": "a", "role": "user", "text": "Tea?"}]
    flat += [{"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Yes.", "loss_scale": 0.1}]
    assert weights_of(flat, tokenizer, tmp_path)[0] == [[0, float(np.float32(0.1))]]


def test_the_last_turns_of_rows(tokenizer, tmp_path):
    """Each row by itself, and what nothing is left of is counted."""
    rows = [chat(1), chat(1, 1), chat(0.5, 0.25), chat(1, 0)]
    found, store = weights_of(rows, tokenizer, tmp_path, "last")
    assert found == [[0, 1], [0, 0, 0, 1], [0, 0, 0, 0.25]]
    assert store.statistics.dropped == {"marked as not to be learnt": 2, "no reply": 2}
    assert store.statistics.read == store.statistics.kept + 4
    assert weights_of([{"text": "Tea."}], tokenizer, tmp_path, "last")[0] == [[1]]
    all_turns = weights_of(rows, tokenizer, tmp_path)[1]
    assert all_turns.digest != store.digest


def test_the_last_turn_of_a_long_talk_has_all_the_context_that_fits(tokenizer, tmp_path):
    talk = chat(*[None] * 40, text="There is always time for another cup.")
    plan = plan_of(write(tmp_path, [talk]), tokenizer, tmp_path, "last")
    (tree,) = (plan.chunks.tree(number) for number in range(len(plan.chunks)))
    assert tree.messages[tree.weights > 0].tolist() == [79]
    assert CONTEXT - 40 < len(tree.tokens) <= CONTEXT
    assert plan.chunks.left_out == {"messages that do not fit the context": 80 - len(tree.messages)}


@pytest.mark.parametrize("rule", ["once", "leaves"])
def test_windows_and_splits_keep_the_weights(rule, tokenizer, tmp_path):
    marks = [[0.5, 1, 0, 0.25, 0.75][n % 5] for n in range(40)] + [1]
    talk = chat(*marks, text="There is always time for another cup.")
    plan = plan_of(write(tmp_path, [talk]), tokenizer, tmp_path, rule=rule)
    trees = [plan.chunks.tree(number) for number in range(len(plan.chunks))]
    assert len(trees) > 5
    found = {m: w for tree in trees for m, w in zip(tree.messages.tolist(), tree.weights.tolist(), strict=True) if w}
    assert found == {2 * n + 1: mark for n, mark in enumerate(marks) if mark}
    total = sum(int(tree.num_supervised) for tree in trees)
    assert total == plan.supervised == plan.chunks.stores[0].sizes()[1].sum()


def test_a_topic_answers_in_full_and_last(tokenizer, tmp_path):
    (tmp_path / "replies.txt").write_text("Let us talk about tea.\nTea is patient.\n")
    settings = {"topic_replies": str(tmp_path / "replies.txt"), "cache": str(tmp_path / "cache")}
    data = DataSettings(train=(write(tmp_path, [chat(0.5, 0, 1)]),), **settings)
    for train_on, expected in (("all", [0, 1, 0, 1, 0, 1]), ("last", [0, 0, 0, 0, 0, 1])):
        corpus, _ = load_corpora(data, tokenizer, kind=LEARNT[train_on])
        assert corpus.stores[0].tree(0, 0).weights.tolist() == expected


def test_an_old_store_is_not_read(tokenizer, tmp_path, monkeypatch):
    rows = [chat(0.5)]
    new = weights_of(rows, tokenizer, tmp_path)[1]
    monkeypatch.setattr(store_module, "FORMAT_VERSION", 10)
    assert weights_of(rows, tokenizer, tmp_path)[1].digest != new.digest


def test_rows_that_differ_in_weights_are_two_and_equal_ones_are_one(tokenizer, tmp_path):
    file = write(tmp_path, [chat(0.5, 1), chat(0.5, 1), chat(0.25, 1), chat(1, 1), chat(0, 1)])
    corpus, _ = load_corpora(DataSettings(train=(file,), cache=str(tmp_path)), tokenizer)
    assert corpus.rows[:, 1].tolist() == [0, 2, 3, 4]
    last, _ = load_corpora(DataSettings(train=(file,), cache=str(tmp_path)), tokenizer, kind=LEARNT["last"])
    assert last.rows[:, 1].tolist() == [0]
    assert len(set(corpus.stores[0].conversations().tolist())) == 1


@torch.no_grad()
def test_the_held_out_loss_counts_each_message_once(model, tokenizer, tmp_path):
    """Of any weight above 0; the counts of a plan too."""
    (tmp_path / "plain").mkdir()
    marks = [0.5, 1, 0.1, 0.75]
    plans = [
        plan_of(write(folder, [chat(*weights)]), tokenizer, tmp_path)
        for folder, weights in ((tmp_path, marks), (tmp_path / "plain", [1] * 4))
    ]
    alone = type("Alone", (), {"process_index": 0, "num_processes": 1, "device": torch.device("cpu")})()
    alone.reduce = lambda values, reduction: values
    (weighed,), (plain,) = (evaluate_by_source(model, plan, tokenizer.byte_lengths(), alone) for plan in plans)
    assert weighed == plain
    assert weighed.tokens == plans[0].supervised == plans[1].supervised


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_data_of_which_nothing_is_learnt_are_refused(train_on, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl holds nothing to train on.*marked as not to be learnt"):
        weights_of([chat(0), chat(0, 0)], tokenizer, tmp_path, train_on)


FRACTION = {"message_tree_id": "a", "prompt": {"message_id": "a", "role": "user", "text": "Tea?", "replies": [
    {"message_id": "b", "role": "assistant", "text": "Yes.", "rank": 0},
    {"message_id": "c", "role": "assistant", "text": "No.", "rank": 1, "weight": 0.5}]}}  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Tea?", "chosen": [TOLD | {"weight": 0.5}], "rejected": "No."},
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "weight": 0.5},
        {"instruction": "Tea?", "completions": [{"response": "Yes.", "overall_score": 1, "weight": 0.25}]},
        FRACTION,
    ],
)
def test_preferences_are_not_weighed_by_their_replies(record, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl.*`weight`.*0\.2?5"):
        open_store(write(tmp_path, [record]), FilterSettings(), tokenizer, tmp_path, kind=PREFERENCES)


def test_the_last_turns_are_not_for_pairs():
    (problem,) = DPOSettings(data={"train": ["quickstart"], "train_on": "last"}).problems()
    assert "`data.train_on`" in problem
    assert not list(DPOSettings(data={"train": ["quickstart"]}).problems())
