"""A store is built once for the same data, filters, template and tokenizer, and is whole or absent."""

import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import gpt2ft.data.store as store_module
from gpt2ft import quickstart
from gpt2ft.conversation import ROLES
from gpt2ft.data.oasst import DataError, Filters
from gpt2ft.data.sources import Totals, read_trees
from gpt2ft.data.store import TokenStore, cache_root, open_store
from gpt2ft.data.token_tree import ASSISTANT
from gpt2ft.text.template import render_turn
from gpt2ft.text.tokenizer import ChatTokenizer

KEEP_ALL = Filters()


def message(id, parent=None, role="assistant", **fields):
    text = fields.pop("text", f"This is {id}.")
    return {"message_id": id, "parent_id": parent, "role": role, "text": text, "message_tree_id": "a", **fields}


# a question with two replies, one of which leads on to a question without a reply
FAMILY = [
    message("a", role="prompter", lang="en"),
    message("b", "a", rank=1, lang="en"),
    message("c", "a", rank=0, lang="en"),
    message("d", "c", "prompter", lang="en"),
]


def write_jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def refuse_to_read(monkeypatch):
    monkeypatch.setattr(store_module, "read_trees", lambda *_: pytest.fail("must come from the cache"))


def folders(cache):
    return sorted(path.name for path in (cache / "trees").iterdir() if path.is_dir())


def test_holds_what_was_read(tokenizer, tmp_path):
    store = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    trees = list(read_trees("quickstart", KEEP_ALL, Counter()))
    assert len(store) == len(trees) > 100
    sizes = store.sizes()
    ranked = 0
    for row, tree in enumerate(trees):
        stored = store.tree(row, group=3)
        assert store.key(row)[0] == tree.id
        assert set(stored.groups.tolist()) == {3}
        assert not stored.weights.any()
        assert len(stored.tokens) == sizes[0][row]
        assert ((stored.lengths - 1) * (stored.roles == ASSISTANT)).sum() == sizes[1][row]
        for node, original in enumerate(stored.messages.tolist()):
            wanted = tree.messages[original]
            start = stored.starts[node]
            ids = stored.tokens[start : start + stored.lengths[node]].tolist()
            assert ids == render_turn(tokenizer, wanted.role, wanted.text)
            assert ROLES[stored.roles[node]] == wanted.role
            path = stored.messages[stored.path_to(node)].tolist()
            assert [tree.messages[i] for i in path] == tree.path_to(original)
        ranked += any(message.rank for message in tree.messages)
    assert ranked


def test_ranks_are_stored_by_node(tokenizer, tmp_path):
    store = open_store(write_jsonl(tmp_path / "a.jsonl", FAMILY), KEEP_ALL, tokenizer, tmp_path)
    assert store._values("ranks", 0).tolist() == [-1, 0, 1]  # the question, c, b; d is pruned
    assert store._values("messages", 0).tolist() == [0, 1, 3]


def test_more_trees_than_one_batch(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH", 7)
    small = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path / "small")
    monkeypatch.undo()
    large = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path / "large")
    assert (small.digest, small.ledger, len(small)) == (large.digest, large.ledger, len(large))
    for row in range(len(small)):
        assert small.key(row) == large.key(row)
        assert np.array_equal(small.tree(row, 0).tokens, large.tree(row, 0).tokens)
        assert np.array_equal(small.tree(row, 0).parents, large.tree(row, 0).parents)
    assert np.array_equal(small.sizes(), large.sizes())


def test_the_second_time_nothing_is_read(tokenizer, tmp_path, monkeypatch):
    first = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    refuse_to_read(monkeypatch)
    again = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    assert (again.digest, again.ledger, len(again)) == (first.digest, first.ledger, len(first))
    assert np.array_equal(again.tree(5, 0).tokens, first.tree(5, 0).tokens)


def test_the_same_content_under_another_name_is_the_same_store(tokenizer, tmp_path, monkeypatch):
    open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    copy = shutil.copy(quickstart.TREES, tmp_path / "copy.jsonl")
    refuse_to_read(monkeypatch)
    assert open_store(str(copy), KEEP_ALL, tokenizer, tmp_path).source == str(copy)


def test_what_determines_the_tokens_determines_the_folder(tokenizer, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", FAMILY)
    changes = [
        Filters(languages=("en",)), Filters(max_rank=0), Filters(reviewed_only=False), Filters(on_error="skip"),
    ]  # fmt: skip
    stores = [open_store(file, filters, tokenizer, tmp_path) for filters in [KEEP_ALL, *changes]]
    lines = (quickstart.MODEL / "merges.txt").read_text(encoding="utf-8").splitlines()
    stores.append(open_store(file, KEEP_ALL, smaller_tokenizer(tmp_path / "smaller", lines[:-20]), tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "template_digest", lambda: "another template")
        stores.append(open_store(file, KEEP_ALL, tokenizer, tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [*FAMILY, message("e", "d", text="A new reply.")])
    stores.append(open_store(file, KEEP_ALL, tokenizer, tmp_path))
    digests = [store.digest for store in stores]
    assert len(set(digests)) == len(digests) == 8
    assert folders(tmp_path) == sorted(digests)
    assert [len(store.tree(0, 0).parents) for store in stores] == [3, 3, 2, 3, 3, 3, 3, 5]


def smaller_tokenizer(folder, merges):
    """The quickstart's with its last merges, and the tokens that they build, taken away."""
    folder.mkdir()
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    names = json.loads((quickstart.MODEL / "vocab.json").read_text(encoding="utf-8"))
    built = {"".join(line.split(" ")) for line in merges}
    kept = [name for name in sorted(names, key=names.get) if name in built or len(name) == 1 or name.startswith("<|")]
    (folder / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(kept)}), encoding="utf-8")
    return ChatTokenizer.from_folder(folder)


def test_the_ledger_adds_up(tokenizer, tmp_path):
    records = [
        *FAMILY,
        message("e", "a", deleted=True),
        message("f", "e", "prompter"),
        message("g", "a", review_result=False),
        message("h", "a", text=" "),
        message("x", role="prompter") | {"message_tree_id": "x"},
    ]
    store = open_store(write_jsonl(tmp_path / "a.jsonl", records), KEEP_ALL, tokenizer, tmp_path)
    ledger = store.ledger
    assert ledger.read == len(records)
    assert ledger.kept == sum(len(store.tree(row, 0).parents) for row in range(len(store))) == 3
    assert ledger.dropped == {"no reply": 2, "deleted": 1, "not reviewed": 1, "empty": 1, "below a dropped message": 1}
    assert ledger.read == ledger.kept + sum(ledger.dropped.values())


def test_the_ledger_of_real_data_adds_up(test_data, gpt2_tokenizer, tmp_path):
    file = str(test_data("oasst/oasst1_en_validation.messages.jsonl"))
    store = open_store(file, KEEP_ALL, gpt2_tokenizer, tmp_path)
    totals = Totals()
    list(read_trees(file, KEEP_ALL, Counter(), totals))
    assert store.ledger.read == totals.messages == 2022
    assert store.ledger.kept == sum(len(store.tree(row, 0).parents) for row in range(len(store)))
    assert store.ledger.read == store.ledger.kept + sum(store.ledger.dropped.values())
    assert store.ledger.dropped["deleted"] == 40


def test_nothing_to_train_on_is_refused(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [message("a", role="prompter"), message("b", "a", deleted=True)])
    with pytest.raises(DataError, match=r"a\.jsonl holds nothing to train on; dropped: 1 deleted, 1 no reply"):
        open_store(file, KEEP_ALL, tokenizer, tmp_path)
    assert folders(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_refused(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"the cache folder .*file.* cannot be written .*: set `data.cache` to another"):
        open_store("quickstart", KEEP_ALL, tokenizer, tmp_path / "file" / "cache")


def test_a_full_disk_is_the_caches_problem(tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_json", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left"):
        open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    assert folders(tmp_path) == []


def test_an_end_in_the_middle_leaves_no_store(tokenizer, tmp_path, monkeypatch):
    def interrupted(*arguments):
        for number, tree in enumerate(read_trees(*arguments)):
            if number == 30:
                raise KeyboardInterrupt
            yield tree

    monkeypatch.setattr(store_module, "BATCH", 10)
    monkeypatch.setattr(store_module, "read_trees", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    assert folders(tmp_path) == []
    monkeypatch.setattr(store_module, "read_trees", read_trees)
    assert len(open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)) > 100


def open_at_once(cache, barrier, results):
    """In a process of its own: opens the store when all are ready, and tells whether it had to read."""
    tokenizer = ChatTokenizer.from_folder(quickstart.MODEL)
    reads = []
    store_module.read_trees = lambda *arguments: reads.append(1) or read_trees(*arguments)
    barrier.wait(120)
    store = open_store("quickstart", KEEP_ALL, tokenizer, Path(cache))
    results.put((len(reads), store.digest, len(store), store.tree(7, 0).tokens.tolist()))


def test_two_processes_build_once_and_agree(tokenizer, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    arguments = (str(tmp_path), barrier, results)
    processes = [spawn.Process(target=open_at_once, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert [reads for reads, *_ in found] == [0, 1]
    assert found[0][1:] == found[1][1:]
    assert folders(tmp_path) == [found[0][1]]


def test_a_store_is_read_from_its_folder_alone(tokenizer, tmp_path):
    store = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    reopened = TokenStore(tmp_path / "trees" / store.digest, "elsewhere")
    assert reopened.source == "elsewhere"
    assert reopened.key(0) == store.key(0)


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FT_CACHE", str(tmp_path / "environment"))
    assert cache_root(str(tmp_path / "setting")) == tmp_path / "setting"
    assert cache_root(None) == tmp_path / "environment"
    monkeypatch.delenv("GPT2FT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "gpt2ft"
    assert cache_root("~/teapot") == tmp_path / "teapot"
