"""Losses by conversation, depth, place and source, and of plain text: equal to what the model gives by itself."""

import json
import math

import numpy as np
import pytest
import torch

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.report import TEXTS
from gpt2ft.report.losses import BYTES, NATS, TOKENS, differences, held_out, loss_of, plain_text, tally
from gpt2ft.settings.sections import FilterSettings

LONG = "Then it is iced tea, which some people like in the summer months, and others not."
CONVERSATIONS = [
    ["Tea?", "It is hot.", "And cold?", LONG, "So?", "Yes."],
    ["Milk?", "No."],
]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2, tokenizer):
    return tiny_gpt2(tokenizer.padded_size, 128).eval()


@pytest.fixture(scope="module")
def model(gpt2, tokenizer):
    return TargetLogProbs(gpt2, len(tokenizer), "segments")


@pytest.fixture(scope="module")
def stores(tokenizer, cache, tmp_path_factory):
    stores = []
    for number, texts in enumerate(CONVERSATIONS):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        file = tmp_path_factory.mktemp("data") / f"{number}.jsonl"
        file.write_text(json.dumps({"messages": messages}) + "\n")
        stores.append(open_store(str(file), FilterSettings(), tokenizer, cache))
    return stores


@torch.no_grad()
def log_probs(gpt2, ids, size):
    """[n - 1] of each id but the first, the ids before it seen."""
    tokens = torch.tensor(ids[:-1])
    hidden = gpt2(tokens, torch.arange(len(tokens)), dense_attention(torch.full_like(tokens, len(tokens))))
    return gpt2.logits(hidden)[:, :size].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].double()


def replies_alone(gpt2, tokenizer):
    """(conversation, depth) -> minus log-probs of the targets of each reply, alone."""
    roles, found = tokenizer.role_ids, {}
    for number, texts in enumerate(CONVERSATIONS):
        ids = []
        for i, text in enumerate(texts):
            start = len(ids)
            ids += [roles[("user", "assistant")[i % 2]], *tokenizer.encode(text), tokenizer.end_id]
            if i % 2:
                found[number, i // 2] = -log_probs(gpt2, ids, len(tokenizer))[start:].numpy()
    return found


@pytest.mark.parametrize("capacity", [128, 256])
def test_each_reply_counts_in_its_cell(capacity, stores, gpt2, model, tokenizer, accelerator):
    rows = np.array([[0, 0], [1, 0]])
    plan = Plan(chunk(stores, rows, ConversationTrees("once", 128, capacity)), capacity, 1, seed=0)
    sums = tally(model, plan, rows, tokenizer, accelerator)
    expected = np.zeros((2, 3, 3, 2))
    for cell, nats in replies_alone(gpt2, tokenizer).items():
        for place, part in enumerate((nats[:1], nats[1:16], nats[16:])):
            expected[*cell, place] = part.sum(), len(part)
    assert expected[..., 1].min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert expected[0, 1, 2, 1] > 0  # a reply of more than 16 tokens
    np.testing.assert_allclose(sums[..., :2], expected, rtol=1e-5)
    texts = [[len(text.encode()) for text in turns[1::2]] for turns in CONVERSATIONS]
    assert sums[0, :, :, BYTES].sum(-1).tolist() == texts[0]
    found = held_out(sums, rows, ["a", "b"], np.array([False, True]))
    assert found["total"]["nats_per_token"] == pytest.approx(expected[..., 0].sum() / expected[..., 1].sum(), rel=1e-5)
    assert found["by_source"]["b"] == loss_of(sums[1])
    assert found["clean"] == found["by_source"]["a"]
    assert [loss["tokens"] for loss in found["by_depth"].values()] == expected[..., 1].sum((0, 2)).astype(int).tolist()
    assert list(found["by_place"]) == ["first token", "next 15", "rest"]


def test_windows_of_a_long_conversation_count_at_their_depth_in_the_whole(stores, model, tokenizer, accelerator):
    rows = np.array([[0, 0]])
    whole, cut = (
        Plan(chunk(stores[:1], rows, ConversationTrees("once", length, 128)), 128, 1, seed=0) for length in (128, 40)
    )
    assert len(cut.chunks) > 1
    tokens = [tally(model, plan, rows, tokenizer, accelerator)[..., TOKENS] for plan in (whole, cut)]
    np.testing.assert_array_equal(*tokens)


def test_differences_are_paired():
    random = np.random.default_rng(0)
    first = np.zeros((40, 3, 3, 3))
    first[:, 0, 0] = np.stack([random.normal(300, 50, 40), np.full(40, 100), np.full(40, 400)], axis=1)
    better = first.copy()
    better[..., NATS] *= 0.9
    assert differences(first, first, True, 0) == {
        name: {"value": 0.0, "low": 0.0, "high": 0.0} for name in ("nats_per_token", "bits_per_byte")
    }
    found = differences(better, first, True, 0)["nats_per_token"]
    assert found["value"] == pytest.approx(-0.1 * first[..., NATS].sum() / 4000)
    assert found["low"] < found["value"] < found["high"] < 0
    assert set(differences(better, first, False, 0)) == {"bits_per_byte"}


def test_conversations_that_a_model_leaves_out_are_not_compared():
    """No resample is without a token, and each holds the same text for both models."""
    first = np.zeros((40, 3, 3, 3))
    first[:7, 0, 0] = np.stack([np.arange(30, 37), np.full(7, 10), np.full(7, 40)], axis=1)
    other = first.copy()
    other[0] = 0
    other[20, 0, 0] = 900, 10, 40
    assert differences(other, first, True, 0) == {
        name: {"value": 0.0, "low": 0.0, "high": 0.0} for name in ("nats_per_token", "bits_per_byte")
    }
    other[1] = 0
    assert differences(other, first, True, 0) == {}  # too few for an interval


def test_what_is_not_finite_is_absent():
    assert loss_of(np.array([math.nan, 3, 9])) == {"tokens": 3, "bytes": 9}
    assert loss_of(np.zeros(3)) == {"tokens": 0, "bytes": 0}


@pytest.mark.parametrize("length", [20, 128, 300])
def test_plain_text_is_read_in_windows(length, gpt2, model, tokenizer, accelerator):
    """The last window is filled up from the one before, as lm-evaluation-harness has it."""
    ids = tokenizer.encode((TEXTS / "gettysburg.txt").read_text())[:length]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    found = plain_text(model, text, tokenizer, accelerator)
    ids, context, nats = [tokenizer.end_of_text_id, *ids], 128, 0.0
    for start in range(0, length, context):
        end = min(start + context, length)
        window = ids[max(0, end - context) : end + 1]
        nats -= float(log_probs(gpt2, window, len(tokenizer))[start - end :].sum())
    assert found["tokens"] == length
    assert found["bytes"] == len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
