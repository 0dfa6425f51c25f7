"""A store is built once for the same data, filters, template and tokenizer, and is whole or absent."""

import json
import shutil

import numpy as np
import pytest

import gpt2ft.data.store as store_module
from gpt2ft import quickstart
from gpt2ft.conversation import ROLES
from gpt2ft.data import blocks, tokenise
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import read_trees
from gpt2ft.data.store import TokenStore, open_store
from gpt2ft.data.token_tree import is_supervised
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.template import render_turn
from gpt2ft.text.tokenizer import ChatTokenizer

KEEP_ALL = FilterSettings()


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


def refuse_to_tokenise(monkeypatch):
    monkeypatch.setattr(tokenise, "_write_shard", lambda *_: pytest.fail("must come from the cache"))


def finished(cache):
    return sorted(path.name for path in (cache / "trees").iterdir() if tokenise.is_complete(path))


def same_rows(one, other):
    """Whether two stores hold the same trees in the same order, whatever shards they are made of."""
    columns = ("tokens", "lengths", "parents", "roles", "ranks", "messages", "digests")
    return (
        [one.id(row) for row in range(len(one))] == [other.id(row) for row in range(len(other))]
        and np.array_equal(one.keys(), other.keys())
        and np.array_equal(one.sizes(), other.sizes())
        and all(
            np.array_equal(found, expected)
            for column in columns
            for found, expected in zip(one.nodes(column), other.nodes(column), strict=True)
        )
    )


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    """The quickstart's, in one shard."""
    return open_store("quickstart", KEEP_ALL, tokenizer, tmp_path_factory.mktemp("one shard"))


def test_holds_what_was_read(tokenizer, store):
    trees = list(read_trees("quickstart", KEEP_ALL))
    assert len(store) == len(trees) > 100
    sizes = store.sizes()
    digests, firsts = store.nodes("digests")
    ranked, digest_by_text = 0, {}
    for row, tree in enumerate(trees):
        stored = store.tree(row, group=3)
        assert store.id(row) == tree.id
        assert set(stored.groups.tolist()) == {3}
        assert stored.weights.tolist() == is_supervised(stored.roles).tolist()
        assert len(stored.tokens) == sizes[0][row]
        assert ((stored.lengths - 1) * is_supervised(stored.roles)).sum() == sizes[1][row]
        assert firsts[row + 1] - firsts[row] == len(stored.lengths)
        for node, original in enumerate(stored.messages.tolist()):
            wanted = tree.messages[original]
            start = stored.starts[node]
            ids = stored.tokens[start : start + stored.lengths[node]].tolist()
            assert ids == render_turn(tokenizer, wanted.role, wanted.text)
            assert ROLES[stored.roles[node]] == wanted.role
            path = stored.messages[stored.path_to(node)].tolist()
            assert path == tree.path_to(original)
            digest = int(digests[firsts[row] + node])
            assert digest_by_text.setdefault((wanted.role, wanted.text), digest) == digest
        ranked += any(message.rank for message in tree.messages)
    assert ranked
    assert len(set(digest_by_text.values())) == len(digest_by_text)
    assert len(set(store.keys().tolist())) == len(store)


def test_ranks_are_stored_by_node(tokenizer, write, tmp_path):
    store = open_store(str(write(tmp_path / "a.jsonl", FAMILY)), KEEP_ALL, tokenizer, tmp_path)
    assert store.nodes("ranks")[0].tolist() == [-1, 0, 1]  # the question, c, b; d leads to no reply
    assert store.tree(0, 0).messages.tolist() == [0, 1, 3]


@pytest.mark.parametrize("block_bytes", [1, 5_000, 100_000])
def test_the_size_of_the_parts_changes_nothing(block_bytes, tokenizer, store, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    shards = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    assert len(list((tmp_path / "trees" / shards.digest).glob("*.arrow"))) > 2
    assert same_rows(shards, store)
    assert (shards.digest, shards.statistics.kept, shards.statistics.dropped) == (
        store.digest, store.statistics.kept, store.statistics.dropped,
    )  # fmt: skip


@pytest.mark.parametrize("roots", [1, 3])
def test_the_size_of_the_shards_of_flat_messages_changes_nothing(roots, tokenizer, write, tmp_path, monkeypatch):
    rows = [
        message(f"{tree}{turn}", f"{tree}{turn - 1}" if turn else None, "assistant" if turn % 2 else "prompter")
        | {"message_tree_id": str(tree)}
        for turn in range(4)
        for tree in range(7)
    ]
    rows += [
        rows[5],
        message("orphan", "nowhere"),
        message("70", role="prompter", deleted=True) | {"message_tree_id": "70"},
    ]
    file = str(write(tmp_path / "a.jsonl", rows))
    whole = open_store(file, KEEP_ALL, tokenizer, tmp_path / "whole")
    monkeypatch.setattr("gpt2ft.data.formats.oasst._ROOTS_IN_A_SHARD", roots)
    shards = open_store(file, KEEP_ALL, tokenizer, tmp_path / "shards")
    assert same_rows(shards, whole)
    assert (
        shards.statistics.dropped == whole.statistics.dropped == {"orphan": 1, "deleted": 1, "duplicate message id": 1}
    )
    assert (shards.statistics.read, len(shards)) == (whole.statistics.read, len(whole)) == (31, 7)


def test_a_part_of_which_nothing_is_left(tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    rows = [{"text": text} for text in ("", "Tea.", " ", "\n", "Milk.", "")]
    store = open_store(str(write(tmp_path / "a.jsonl", rows)), KEEP_ALL, tokenizer, tmp_path)
    assert len(store) == len(store.keys()) == len(store.sizes()[0]) == 2
    assert (store.statistics.read, store.statistics.kept, store.statistics.dropped) == (6, 2, {"empty": 4})
    assert store.tree(1, 0).tokens.tolist() == render_turn(tokenizer, "text", "Milk.")


def test_the_second_time_nothing_is_read(tokenizer, tmp_path, store, monkeypatch):
    first = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    refuse_to_tokenise(monkeypatch)
    again = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    assert (again.digest, again.statistics) == (first.digest, first.statistics) == (store.digest, store.statistics)
    assert same_rows(again, first)


def test_the_same_content_under_another_name_is_the_same_store(tokenizer, tmp_path, monkeypatch):
    open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    copy = shutil.copy(quickstart.TREES, tmp_path / "copy.jsonl")
    refuse_to_tokenise(monkeypatch)
    assert open_store(str(copy), KEEP_ALL, tokenizer, tmp_path).source == str(copy)


def test_what_determines_the_tokens_determines_the_folder(tokenizer, write, tmp_path, monkeypatch):
    file = str(write(tmp_path / "a.jsonl", FAMILY))
    changes = [{"languages": ("en",)}, {"max_rank": 0}, {"reviewed_only": False}, {"on_error": "skip"}]
    filters = [KEEP_ALL, *(FilterSettings(**change) for change in changes)]
    stores = [open_store(file, kept, tokenizer, tmp_path) for kept in filters]
    lines = (quickstart.MODEL / "merges.txt").read_text(encoding="utf-8").splitlines()
    stores.append(open_store(file, KEEP_ALL, smaller_tokenizer(tmp_path / "smaller", lines[:-20]), tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "template_digest", lambda: "another template")
        stores.append(open_store(file, KEEP_ALL, tokenizer, tmp_path))
    write(tmp_path / "a.jsonl", [*FAMILY, message("e", "d", text="A new reply.")])
    stores.append(open_store(file, KEEP_ALL, tokenizer, tmp_path))
    digests = [store.digest for store in stores]
    assert len(set(digests)) == len(digests) == 8
    assert finished(tmp_path) == sorted(digests)
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


def test_the_statistics_add_up(tokenizer, write, tmp_path):
    rows = [
        *FAMILY,
        message("e", "a", deleted=True),
        message("f", "e", "prompter"),
        message("g", "a", review_result=False),
        message("h", "a", text=" "),
        message("x", role="prompter") | {"message_tree_id": "x"},
    ]
    store = open_store(str(write(tmp_path / "a.jsonl", rows)), KEEP_ALL, tokenizer, tmp_path)
    statistics = store.statistics
    assert statistics.read == len(rows)
    assert statistics.kept == sum(len(store.tree(row, 0).parents) for row in range(len(store))) == 3
    assert statistics.dropped == {
        "no reply": 2,
        "deleted": 1,
        "not reviewed": 1,
        "empty": 1,
        "below a dropped message": 1,
    }
    assert statistics.read == statistics.kept + sum(statistics.dropped.values())


@pytest.mark.parametrize("name", ["oasst1_en_validation.messages.jsonl", "en_100_tree.jsonl"])
def test_the_statistics_of_real_data_add_up(name, read, test_data, gpt2_tokenizer, tmp_path):
    file = str(test_data(f"oasst/{name}"))
    store = open_store(file, KEEP_ALL, gpt2_tokenizer, tmp_path)
    assert store.statistics.read == read(file)[1].totals.messages > 1000
    assert store.statistics.kept == sum(len(store.tree(row, 0).parents) for row in range(len(store)))
    assert store.statistics.read == store.statistics.kept + sum(store.statistics.dropped.values())
    assert store.statistics.dropped.get("deleted", 0) == (40 if "validation" in name else 0)


def test_nothing_to_train_on_is_refused(tokenizer, write, tmp_path):
    file = str(write(tmp_path / "a.jsonl", [message("a", role="prompter"), message("b", "a", deleted=True)]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl .* dropped: deleted 1, no reply 1"):
            open_store(file, KEEP_ALL, tokenizer, tmp_path)
        assert finished(tmp_path) == []


def test_what_no_tokenizer_can_take_is_refused_by_its_opening(tokenizer, write, tmp_path):
    rows = [{"text": "Tea."}, {"text": "Milk" + " " * 1_000_000 + "."}]
    with pytest.raises(DataError) as raised:
        open_store(str(write(tmp_path / "a.jsonl", rows)), KEEP_ALL, tokenizer, tmp_path)
    assert str(raised.value).startswith(f'{tmp_path}/a.jsonl: a conversation that opens with "Milk   ')
    assert "900,000 whitespace characters" in str(raised.value)


def test_a_cache_that_cannot_be_written_is_refused(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file.* cannot be written .* `data.cache`"):
        open_store("quickstart", KEEP_ALL, tokenizer, tmp_path / "file" / "cache")


def test_a_full_disk_is_the_caches_problem(tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "write_json", full)
        with pytest.raises(DataError, match=r"cannot be written .*No space left"):
            open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    assert finished(tmp_path) == []
    assert len(open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)) > 100


def test_a_store_is_read_from_its_folder_alone(tokenizer, tmp_path):
    store = open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
    reopened = TokenStore(tmp_path / "trees" / store.digest, "elsewhere")
    assert reopened.source == "elsewhere"
    assert same_rows(reopened, store)


@pytest.mark.parametrize("damage", ["statistics.json", "000000.arrow"])
def test_a_damaged_store_says_which_folder_to_remove(tokenizer, tmp_path, damage):
    folder = tmp_path / "trees" / open_store("quickstart", KEEP_ALL, tokenizer, tmp_path).digest
    file = folder / damage
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{folder} is damaged .* remove"):
        open_store("quickstart", KEEP_ALL, tokenizer, tmp_path)
