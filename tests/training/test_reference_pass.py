"""The reference pass: each row is that of the reply alone, only what is missing is computed, and no kill harms it."""

import json
import signal

import numpy as np
import pyarrow.parquet
import pytest
import torch
from processes import ON_CPU, run, torchrun

from gpt2ft.data.plan import Plan
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.objectives.dpo import DPO, tail_log_probs
from gpt2ft.objectives.losses import start_loss
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.training.reference_pass import attach_reference, attach_tails, check_start, compute_start
from gpt2ft.training.reference_store import ReferenceLogProbError, reply_key, reply_keys


def contents(folder):
    """key -> (log-prob, log-probs); no key may stand twice."""
    rows = {}
    for file in sorted(folder.glob("*.parquet")):
        table = pyarrow.parquet.read_table(file).to_pylist()
        for row in table:
            assert row["key"] not in rows
            assert row["tokens"] == len(row["log_probs"])
            rows[row["key"]] = (row["log_prob"], row["log_probs"])
    return rows


@torch.no_grad()
def test_a_row_is_the_reply_alone(make_plan, make_store, gpt2, model, accelerator):
    """The log-prob of each token and of all, in a tree among others, is that of prompt and reply by themselves."""
    plan, store = make_plan(), make_store()
    assert attach_reference([plan], store, model, accelerator, SignalHandler()) == len(plan.reference)
    rows, checked = contents(store.folder), 0
    for index in range(0, len(plan.chunks), 9):
        tree = plan.chunks.tree(index)
        for node in np.flatnonzero(tree.weights > 0).tolist():
            turns = [tree.tokens[tree.starts[i] : tree.starts[i] + tree.lengths[i]] for i in tree.path_to(node)]
            ids = torch.from_numpy(np.concatenate(turns)).long()
            hidden = gpt2(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids))))
            logits = gpt2.logits(hidden)[:, : model.num_ids]
            length = int(tree.lengths[node]) - 1
            expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[-length:, 0].double()
            log_prob, log_probs = rows[reply_key(tree, node)]
            assert log_prob == pytest.approx(float(expected.sum()), rel=1e-5)
            np.testing.assert_allclose(log_probs, expected.numpy(), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 30


def test_the_plan_gets_every_reply_in_its_place(make_plan, make_store, model, accelerator):
    """Whatever the packing, the order and the rule, a reply finds its row."""
    plans = [make_plan(), make_plan(capacity=1024, seed=5), make_plan("best_worst", seed=9)]
    store = make_store()
    computed = [attach_reference([plan], store, model, accelerator, SignalHandler()) for plan in plans]
    assert computed[0] > 200
    assert computed[1:] == [0, 0]
    known = {}
    for plan in plans:
        asked = reply_keys(plan)
        assert len(asked.keys) == len(plan.reference)
        for key, value in zip(asked.keys, plan.reference, strict=True):
            assert known.setdefault(key, value) == value
        for micro_batch in plan.streams:
            stream = plan.stream(micro_batch)
            replies = plan.replies_of(micro_batch)
            assert stream.pairs.reference[: len(replies)].tolist() == plan.reference[replies].tolist()


@torch.no_grad()
def test_the_plan_gets_what_is_longer_of_every_pair(make_plan, make_store, model, accelerator):
    """So LD-DPO starts where the reference is, whatever alpha."""
    plan, store = make_plan(seed=3), make_store()
    attach_reference([plan], store, model, accelerator, SignalHandler())
    attach_tails([plan], store, accelerator)
    for micro_batch in plan.streams[:3]:
        stream = plan.stream(micro_batch)
        log_probs, lengths = model(stream), stream.pairs.lengths[stream.pairs.index[: stream.pairs.num_pairs]]
        known = stream.pairs.reference_tails[: stream.pairs.num_pairs]
        torch.testing.assert_close(tail_log_probs(log_probs, stream), known, rtol=0, atol=1e-9)
        assert ((known < 0) == (lengths > lengths.amin(1, keepdim=True))).all()
        objective = DPO(PreferenceSettings(ld_alpha=0.0))
        mean = objective.loss(log_probs, stream) / objective.normalizer(stream)
        assert float(mean) == pytest.approx(start_loss(PreferenceSettings()), abs=1e-6)
    assert (plan.reference_tails < 0).any(0).all()


def test_only_what_is_missing_is_computed(make_plan, make_store, model, accelerator):
    plan, store = make_plan("best_worst"), make_store()
    few = attach_reference([plan], store, model, accelerator, SignalHandler())
    before = {file.name: file.read_bytes() for file in store.folder.glob("*.parquet")}
    more = attach_reference([make_plan("all")], store, model, accelerator, SignalHandler())
    assert 0 < more < few + more
    assert {name: (store.folder / name).read_bytes() for name in before} == before
    assert len(contents(store.folder)) == few + more
    assert json.loads(store.manifest.read_text())["rows"] == few + more


# --- the check before training --------------------------------------------------------------------------------------


def checked(model, plan, store, accelerator, expected_loss=None):
    start = compute_start(model, plan, 0, DPO(PreferenceSettings()), accelerator)
    check_start(start, expected_loss or start_loss(PreferenceSettings()), store)
    return start.worst


def test_the_start_is_checked_against_what_is_stored(make_plan, make_store, model, accelerator, tiny_gpt2, tokenizer):
    plan, store = make_plan(), make_store()
    attach_reference([plan], store, model, accelerator, SignalHandler())
    assert checked(model, plan, store, accelerator) < 1e-5
    other = TargetLogProbs(tiny_gpt2(tokenizer.padded_size, 256, seed=1), len(tokenizer), "segments")
    with pytest.raises(ReferenceLogProbError, match=r"by .* nats per token of a reply, more than 0.0001: all digests"):
        checked(other, plan, store, accelerator)
    newer = make_store(versions={"torch": "3"})
    with pytest.raises(ReferenceLogProbError, match=r"more than 0.0001: `torch` was '2' and is now '3'; remove"):
        checked(other, plan, newer, accelerator)
    plan.reference[plan.replies_of(plan.micro_batches(0)[0])[0]] = np.nan
    with pytest.raises(ReferenceLogProbError, match=r"differ from what the start of this run gives by inf"):
        checked(model, plan, store, accelerator)


def test_the_first_loss_must_be_the_known_one(make_plan, make_store, model, accelerator):
    """A loss that is not ln 2 although nothing has moved: the objective reads something else than it should."""
    plan, store = make_plan(), make_store()
    attach_reference([plan], store, model, accelerator, SignalHandler())
    with pytest.raises(ReferenceLogProbError, match=r"must have the loss 0.7000, as .*, but has 0.6931"):
        checked(model, plan, store, accelerator, expected_loss=0.7)


def test_a_reference_that_is_not_finite_is_named(make_plan, make_store, tiny_gpt2, tokenizer, accelerator):
    gpt2 = tiny_gpt2(tokenizer.padded_size, 256, seed=2)
    with torch.no_grad():
        gpt2.wpe.weight[30] = float("nan")
    plan, store = make_plan(), make_store()
    with pytest.raises(ReferenceLogProbError, match=r"no finite log-prob to a reply in the stream that opens with"):
        attach_reference([plan], store, TargetLogProbs(gpt2, len(tokenizer), "segments"), accelerator, SignalHandler())
    assert not list(store.folder.glob("*.parquet"))


# --- interrupted ----------------------------------------------------------------------------------------------------


def test_told_to_stop_it_keeps_what_it_has(make_plan, make_store, model, accelerator, monkeypatch):
    plan, store, signals = make_plan(), make_store(), SignalHandler()
    whole, done = Plan.stream, []

    def stream(self, micro_batch):
        done.append(None)
        if len(done) == 5:
            signals.received = signal.SIGTERM
        return whole(self, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "stream", stream)
        with pytest.raises(Preempted, match="has kept the reference log-probs"):
            attach_reference([plan], store, model, accelerator, signals)
    kept = contents(store.folder)
    num_keys = len(set(reply_keys(plan).keys))
    assert 0 < len(kept) < num_keys
    assert attach_reference([plan], store, model, accelerator, SignalHandler()) == num_keys - len(kept)
    assert kept.items() <= contents(store.folder).items()


@pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=pytest.mark.long), pytest.param(20, marks=pytest.mark.campaign)]
)
def test_killed_again_and_again_and_finished_by_two_processes(kills, tokenizer, gpt2, tmp_path):
    """The rows are those of a pass in one go."""
    from gpt2ft.runs.export import write_folder

    write_folder(tmp_path / "model", dict(gpt2.named_parameters()), gpt2.config, tokenizer)
    recipe = ["quickstart-dpo", "--model.path", tmp_path / "model", "--training.tokens_per_micro_batch", 256]
    recipe += ["--data.max_length", 256, "--data.eval", "quickstart:held_out"]
    script = "launch/reference.py"
    run(["python", script, *recipe, "--data.cache", tmp_path / "one"], **ON_CPU)
    cache = ["--data.cache", tmp_path / "two"]
    killing = ["python", "tests/training/kill_reference.py", kills, 0, *recipe, *cache]
    said = run(killing, seconds=600, **ON_CPU).stdout
    assert said.count("killed at call") == kills
    if kills >= 20:
        assert {line.split()[-1] for line in said.splitlines() if line.startswith("killed")} == {
            "stream", "write_table", "replace", "sync_folder",
        }  # fmt: skip
    (folder,) = (tmp_path / "two" / "reference").iterdir()
    begun = contents(folder)
    run([*torchrun(2), script, *recipe, *cache], **ON_CPU)
    (whole,) = (tmp_path / "one" / "reference").iterdir()
    expected, found = contents(whole), contents(folder)
    assert 0 < len(begun) < len(found)
    assert begun.items() <= found.items()
    assert found.keys() == expected.keys()
    for key, (log_prob, log_probs) in found.items():
        assert log_prob == pytest.approx(expected[key][0], rel=1e-6)
        np.testing.assert_allclose(log_probs, expected[key][1], rtol=1e-4, atol=1e-5)
