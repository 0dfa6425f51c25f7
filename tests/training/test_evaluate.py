"""Held-out loss as sums: exact, by source, and the same however the streams are cut and shared out."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.model.attention import dense_attention
from gpt2ft.objectives.sft import SFT
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.training.evaluate import (
    EvaluationInterrupted,
    LossSums,
    evaluate_by_source,
    evaluate_objective,
    items_of_rank,
    sum_over_sources,
)

CPU = torch.device("cpu")
ALONE = SimpleNamespace(device=CPU, process_index=0, num_processes=1)
REPLIES = (["It is hot.", "Two cups, please."], ["Nein, danke.", "茶"])  # of two sources


@pytest.fixture(scope="module")
def stores(tokenizer, cache, tmp_path_factory):
    folder, stores = tmp_path_factory.mktemp("sources"), []
    for number, replies in enumerate(REPLIES):
        file = folder / f"{number}.jsonl"
        turns = [[("user", "Tea?"), ("assistant", reply)] for reply in replies]
        records = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        stores.append(open_store(str(file), FilterSettings(), tokenizer, cache))
    return stores


@pytest.fixture
def make_plan(stores):
    def make(capacity=128):
        rows = np.array([(number, row) for number, store in enumerate(stores) for row in range(len(store))])
        return Plan(chunk(stores, rows, ConversationTrees("once", 64, capacity)), capacity, 1, seed=0)

    return make


@torch.no_grad()
def nats_of(gpt2, tokenizer, prompt, reply):
    """Minus the log-prob of a reply and its stop token after a prompt, and their number, by the model itself."""
    roles, end = tokenizer.role_ids, tokenizer.end_id
    before = [roles["user"], *tokenizer.encode(prompt), end, roles["assistant"]]
    after = [*tokenizer.encode(reply), end]
    ids = torch.tensor([*before, *after])
    hidden = gpt2.eval()(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids))))
    log_probs = gpt2.logits(hidden)[:, : len(tokenizer)].log_softmax(-1)
    return -float(log_probs[len(before) - 1 : -1].gather(1, ids[len(before) :, None]).double().sum()), len(after)


def test_by_source_every_reply_counts_with_its_stop_token(make_plan, model, gpt2, tokenizer):
    found = evaluate_by_source(model, make_plan(), tokenizer.byte_lengths(), ALONE)
    assert len(found) == len(REPLIES)
    for losses, replies in zip(found, REPLIES, strict=True):
        nats, tokens = zip(*(nats_of(gpt2, tokenizer, "Tea?", reply) for reply in replies), strict=True)
        assert losses.nats == pytest.approx(sum(nats), rel=1e-5)
        assert losses.tokens == sum(tokens)
        assert losses.bytes == sum(len(reply.encode()) for reply in replies)


def test_it_does_not_depend_on_how_streams_are_cut_and_shared_out(make_plan, model, tokenizer):
    whole, cut = make_plan(128), make_plan(24)
    assert (len(whole.streams), len(cut.streams)) == (1, 3)
    expected = evaluate_by_source(model, whole, tokenizer.byte_lengths(), ALONE)
    assert_same(evaluate_by_source(model, cut, tokenizer.byte_lengths(), ALONE), expected)
    parts = []
    for rank in range(2):  # nothing is added from the other, so that its own part is seen
        process = SimpleNamespace(device=CPU, process_index=rank, num_processes=2, reduce=lambda part, reduction: part)
        parts.append(evaluate_by_source(model, cut, tokenizer.byte_lengths(), process))
    assert_same([sum_over_sources(by_rank) for by_rank in zip(*parts, strict=True)], expected)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.bytes) == (other.tokens, other.bytes)
        assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_an_objective_is_averaged_over_the_whole_plan(make_plan, model, tokenizer):
    total = sum_over_sources(evaluate_by_source(model, make_plan(), tokenizer.byte_lengths(), ALONE))
    for plan in (make_plan(), make_plan(24)):
        assert evaluate_objective(model, plan, SFT(), ALONE) == pytest.approx({"loss": total.nats_per_token}, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training, make_plan, model, tokenizer):
    streams = []

    def was_signalled():
        assert not model.training
        streams.append(None)
        return len(streams) == 3

    model.train(training)
    with pytest.raises(EvaluationInterrupted):
        evaluate_objective(model, make_plan(24), SFT(), ALONE, was_signalled)
    assert len(streams) == 3
    assert model.training is training
    evaluate_by_source(model, make_plan(24), tokenizer.byte_lengths(), ALONE, lambda: False)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_signal_on_another_process_interrupts_this_one(make_plan, model):
    other = SimpleNamespace(
        device=CPU, process_index=0, num_processes=2, reduce=lambda local, reduction: local + torch.ones_like(local)
    )
    with pytest.raises(EvaluationInterrupted):
        evaluate_objective(model, make_plan(), SFT(), other, lambda: False)


def test_loss_sums_by_hand():
    sums = sum_over_sources([LossSums(3.0, 2, 4), LossSums(5.0, 6, 4)])
    assert sums == LossSums(8.0, 8, 8)
    assert sums.nats_per_token == 1.0
    assert sums.perplexity == math.e
    assert sums.bits_per_byte == pytest.approx(1 / math.log(2))
    assert sums.metrics() == {"loss": 1.0, "perplexity": math.e, "bits_per_byte": sums.bits_per_byte}


def test_loss_sums_of_nothing_and_of_too_much():
    assert all(math.isnan(value) for value in LossSums(0.0, 0, 0).metrics().values())
    assert math.isfinite(LossSums(1e6, 1, 1).perplexity)


@pytest.mark.parametrize(("items", "processes"), [(7, 3), (6, 3), (2, 4), (0, 2), (5, 1)])
def test_every_item_goes_to_one_process_and_all_get_as_many(items, processes):
    ranks = [list(items_of_rank(range(items), rank, processes)) for rank in range(processes)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(item for rank in ranks for item in rank if item is not None) == list(range(items))
    assert sum(item is None for rank in ranks for item in rank) == -items % processes
