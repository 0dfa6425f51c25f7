"""The Python interface gives what the scripts give."""

import json
import math

import numpy as np
import pytest
import torch
from processes import run

import gpt2ft
from gpt2ft.data.corpus import load_corpora
from gpt2ft.errors import SettingsError
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import prompt_format_for
from gpt2ft.model.attention import dense_attention
from gpt2ft.settings.training import DataSettings

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is tea?"}]


@pytest.fixture(scope="module")
def model(tiny_gpt2, tokenizer):
    gpt2 = tiny_gpt2(tokenizer.padded_size, 64).eval()
    return InferenceModel(gpt2, tokenizer, prompt_format_for(tokenizer), "tiny", "")


def test_importing_the_package_loads_nothing():
    told = run(["python", "-c", "import sys, gpt2ft; print('torch' in sys.modules, *gpt2ft.__all__)"]).stdout
    assert told.split() == ["False", *gpt2ft.__all__]
    assert set(gpt2ft.__all__) <= set(dir(gpt2ft))
    assert not hasattr(gpt2ft, "no_such_name")


def test_a_model_folder_loads_and_chats(tiny_weights_folder):
    model = gpt2ft.load(str(tiny_weights_folder), precision="fp32")
    session = gpt2ft.open_session(model, max_new_tokens=5, temperature=0)
    session.say("What is tea?")
    assert "".join(session.reply()) == session.turns[-1][1]
    assert session.last.tokens <= 5


def test_a_conversation_is_tokenised_as_training_does(model, tokenizer, tmp_path, cache):
    messages = [*QUESTION, {"role": "assistant", "content": "A hot drink."}]
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    corpus, _ = load_corpora(DataSettings(train=(str(file),), cache=str(cache)), tokenizer)
    stored = corpus.stores[0].tree(0, group=0)
    stream = gpt2ft.tokenise(model, messages)
    assert stream.tokens[: stream.num_tokens].tolist() == stored.tokens.tolist()
    assert len(stream.tokens) % 128 == 0
    first = int(stored.starts[2])
    assert stream.supervised.tolist() == list(range(first, stream.num_tokens - 1))
    assert stream.targets.tolist() == stored.tokens[first + 1 :].tolist()


def test_a_conversation_is_weighed_as_training_does(model, tokenizer, tmp_path, cache):
    messages = [
        {"role": "user", "content": "Tea?"},
        {"role": "assistant", "content": "Yes.", "weight": 0.25},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "No.", "train": False},
        {"role": "user", "content": "Cups?"},
        {"role": "assistant", "content": "Two."},
    ]
    file = tmp_path / "weighed.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    corpus, _ = load_corpora(DataSettings(train=(str(file),), cache=str(cache)), tokenizer)
    stored = corpus.stores[0].tree(0, group=0)
    stream = gpt2ft.tokenise(model, messages)
    assert stored.weights.tolist() == [0, 0.25, 0, 0, 0, 1]
    targets = (stored.lengths - 1) * (stored.weights > 0)
    assert stream.weights.tolist() == np.repeat(stored.weights, targets).tolist()
    for turn, problem in (({"role": "user", "weight": 1}, "user turn"), ({"role": "assistant", "weight": 2}, "weight")):
        with pytest.raises(SettingsError, match=problem):
            gpt2ft.tokenise(model, [{"content": "Tea?"} | turn])


def test_replies_have_the_log_probs_of_the_model_itself(model, tokenizer):
    replies = ["A hot drink.", "A fish, I think."]
    found = gpt2ft.reply_log_probs(model, QUESTION, replies)
    for reply, log_prob in zip(replies, found, strict=True):
        stream = gpt2ft.tokenise(model, [*QUESTION, {"role": "assistant", "content": reply}])
        ids = stream.tokens[: stream.num_tokens]
        with torch.no_grad():
            hidden = model.gpt2(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids))))
            logits = model.gpt2.logits(hidden)[:, : len(tokenizer)].double()
        expected = logits.log_softmax(-1)[stream.supervised, stream.targets].sum()
        assert log_prob == pytest.approx(float(expected), abs=1e-4)
        assert -math.inf < log_prob < 0
    assert found[0] != found[1]


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(SettingsError, match="64"):
        gpt2ft.reply_log_probs(model, QUESTION, ["tea " * 80])
    with pytest.raises(SettingsError, match="teacher"):
        gpt2ft.tokenise(model, [{"role": "teacher", "content": "Tea."}])
