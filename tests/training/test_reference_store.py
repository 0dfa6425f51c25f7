"""The reference store: what it names a row by, and that it is complete or refused."""

from dataclasses import replace

import numpy as np
import pytest

from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.loaded_model import LoadedModel
from gpt2ft.runs.train_dpo import store_for
from gpt2ft.training.reference_store import ReferenceLogProbError, Row, reply_key


def test_rows_are_named_by_prompt_reply_and_mask(make_plan):
    tree = make_plan().chunks.tree(0)
    first, second = np.flatnonzero(tree.weights > 0)[:2].tolist()
    key = reply_key(tree, first)
    assert len(key) == 16
    assert key != reply_key(tree, second)
    other_prompt, other_reply = tree.tokens.copy(), tree.tokens.copy()
    other_prompt[1] += 1
    other_reply[tree.starts[second] + 1] += 1
    assert reply_key(replace(tree, tokens=other_prompt), first) != key
    assert reply_key(replace(tree, tokens=other_reply), first) == key
    assert reply_key(replace(tree, tokens=other_reply), second) != reply_key(tree, second)
    assert reply_key(replace(tree, groups=tree.groups + 3), first) == key


@pytest.mark.parametrize("name", ["weights", "tokenizer", "template", "precision", "attention"])
def test_another_reference_lies_in_another_folder(name, make_store):
    store = make_store()
    store.create()
    store.write([Row(b"k" * 16, -1.0, [-1.0])])
    other = make_store(**{name: "other"})
    assert other.folder != store.folder
    assert np.isnan(other.read([b"k" * 16], [1])).all()
    assert make_store().read([b"k" * 16], [1]) == [-1.0]


def test_tokens_that_another_machine_has_are_missed_in_a_sentence(make_store):
    store = make_store()
    store.create()
    store.write([Row(b"k" * 16, -1.5, [-1.0, -0.5])])
    assert store.read_tokens([b"k" * 16] * 2) == [[-1.0, -0.5]] * 2
    with pytest.raises(ReferenceLogProbError, match="lacks those of 1"):
        store.read_tokens([b"k" * 16, b"l" * 16])


def test_the_folder_goes_by_what_is_really_used(tokenizer, tiny_gpt2, accelerator, model):
    def folder(policy, model=model):
        return store_for(policy, model, accelerator, cache=None).folder

    policy = LoadedModel(model.gpt2, tokenizer, "here", "digest")
    assert folder(replace(policy, source="there")) == folder(policy)
    assert folder(replace(policy, digest="other")) != folder(policy)
    dense = TargetLogProbs(model.gpt2, len(tokenizer), "dense")
    assert folder(policy, dense) != folder(policy)


def test_a_folder_under_the_wrong_name_is_refused(make_store):
    store = make_store()
    store.create()
    other = make_store(weights="other")
    other.folder.parent.mkdir(exist_ok=True)
    store.folder.rename(other.folder)
    with pytest.raises(ReferenceLogProbError, match=r"another reference: `weights` was 'w' and is now 'other'; remove"):
        make_store(weights="other")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (Row(b"k" * 16, float("nan"), [-1.0]), "nan of 1"),
        (Row(b"k" * 16, float("-inf"), [-1.0]), "-inf of 1"),
        (Row(b"k" * 16, 0.5, [0.5]), "0.5 of 1"),
        (Row(b"k" * 16, -2.0, [-1.0, -1.0]), "-2.0 of 2"),
    ],
)
def test_what_no_model_gives_is_refused(row, found, make_store):
    store = make_store()
    store.create()
    store.write([row])
    with pytest.raises(ReferenceLogProbError, match=rf"must hold the log-prob of 1 token, but holds {found}: remove"):
        store.read([b"k" * 16], [1])


def test_every_damaged_shard_is_noticed(make_store):
    """Whatever byte is changed: a page's checksum or the format tells, or what is read is as it was."""
    store = make_store()
    store.create()
    random = np.random.default_rng(0)
    rows = [Row(random.bytes(16), -float(random.random() * 9), [-0.5, -1.5]) for _ in range(50)]
    store.write(rows)
    keys, lengths = [row.key for row in rows], [2] * len(rows)
    good = store.read(keys, lengths)
    (file,) = store.folder.glob("*.parquet")
    whole, refused = file.read_bytes(), []
    damages = [whole[: len(whole) // 2], b"", whole + b"x"]
    for place in random.integers(0, len(whole), 120).tolist():
        damages.append(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
    for damage in damages:
        file.write_bytes(damage)
        try:
            found = store.read(keys, lengths)
        except ReferenceLogProbError as error:
            refused.append(str(error))
        else:
            assert np.isnan(found[found != good]).all()
    assert len(refused) > 60
    assert all(str(file) in message for message in refused)


def test_a_damaged_manifest_is_named(make_store):
    store = make_store()
    store.create()
    store.manifest.write_text("{")
    with pytest.raises(ReferenceLogProbError, match=r"manifest.json is damaged .*: remove"):
        make_store()
