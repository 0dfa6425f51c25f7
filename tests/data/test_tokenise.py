"""However many processes build a store, and however often they are killed, the same store comes to be, bit by bit."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from facts import tells
from processes import wait_until

from gpt2ft import quickstart
from gpt2ft.conversation import MessageTree
from gpt2ft.data import blocks, tokenise
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.tokenizer import ChatTokenizer

BLOCK_BYTES = 5_000  # some forty shards of the quickstart
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def many_parts(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture(scope="module")
def alone(tokenizer, tmp_path_factory):
    """{file: digest} of the store that one process builds in one go."""
    cache = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
        open_store("quickstart", FilterSettings(), tokenizer, cache)
    digests = files(cache)
    assert len(digests) > 30
    return digests


def files(cache):
    """{file: digest} of the one store in a cache, after checking that nothing lies beside it but its lock."""
    (folder,) = [path for path in (cache / "trees").iterdir() if path.is_dir()]
    assert {path.name for path in (cache / "trees").iterdir()} <= {folder.name, f"{folder.name}.lock"}
    assert {path.suffix for path in folder.iterdir()} == {".arrow", ".json"}
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def count_shards(monkeypatch, then=lambda number: None):
    """A list that grows by each shard written here; before that, `then` is told how many there were."""
    written, write_shard = [], tokenise._write_shard

    def counted(file, *arguments):
        then(len(written))
        write_shard(file, *arguments)
        written.append(file.name)

    monkeypatch.setattr(tokenise, "_write_shard", counted)
    return written


def build(source, cache, barrier, results):
    """In a process of its own: opens the store, and tells which shards it wrote. All begin before any is done."""
    blocks.BLOCK_BYTES = BLOCK_BYTES
    with pytest.MonkeyPatch.context() as patch:
        written = count_shards(patch, then=lambda number: number or barrier.wait(600))
        try:
            found = open_store(
                source, FilterSettings(), ChatTokenizer.from_folder(quickstart.MODEL), Path(cache)
            ).statistics
        except DataError as error:
            found = str(error)
    results.put((found, written))


def build_at_once(number, source, cache):
    """What each process found, and the shards that each wrote."""
    barrier, results = SPAWN.Barrier(number), SPAWN.Queue()
    arguments = (source, str(cache), barrier, results)
    processes = [SPAWN.Process(target=build, args=arguments, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(600)
    return zip(*found, strict=True)


def test_a_token_takes_four_bytes_until_it_is_written(tokenizer):
    columns = tokenise._Columns(tokenizer, rows_share_conversations=False)
    columns.add(MessageTree.from_turns("a", "test", [("user", "tea " * 300), ("assistant", "tea")]), [0, 1])
    assert len(columns.tokens) > 300
    assert memoryview(columns.tokens).nbytes == 4 * len(columns.tokens)


def test_three_processes_build_the_store_that_one_builds(alone, tmp_path):
    statistics, written = build_at_once(3, "quickstart", tmp_path)
    assert files(tmp_path) == alone
    assert statistics[0] == statistics[1] == statistics[2]
    assert all(written)
    assert sorted(name for names in written for name in names) == sorted(alone.keys() - {"statistics.json"})


@pytest.mark.parametrize("number", [1, 3])
def test_a_malformed_line_in_a_late_part_is_reported_by_each(number, tmp_path):
    lines = quickstart.TREES.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[140] = '{"message_tree_id": "broken"\n'
    (tmp_path / "t.jsonl").write_text("".join(lines), encoding="utf-8")
    found, _ = build_at_once(number, str(tmp_path / "t.jsonl"), tmp_path)
    assert len(set(found)) == 1
    assert found[0].startswith(f"{tmp_path}/t.jsonl:141: ")
    assert not any(map(tokenise.is_complete, (tmp_path / "trees").iterdir()))


def test_nothing_to_train_on_is_reported_by_each(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x" * 1000}]}] * 50
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, _ = build_at_once(3, str(tmp_path / "t.jsonl"), tmp_path)
    assert len(set(found)) == 1
    assert tells(found[0], f"{tmp_path}/t.jsonl ... dropped: no reply 50")
    assert not any(map(tokenise.is_complete, (tmp_path / "trees").iterdir()))


def killed_in_the_middle(cache):
    """In a process of its own: ends itself as the kernel would, with a shard half done."""
    blocks.BLOCK_BYTES = BLOCK_BYTES
    writes = []
    finish = os.replace

    def replace(*names):
        writes.append(names)
        if len(writes) > 12:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(*names)

    os.replace = replace
    open_store("quickstart", FilterSettings(), ChatTokenizer.from_folder(quickstart.MODEL), Path(cache))


def test_after_a_kill_only_what_is_missing_is_tokenised(alone, tokenizer, tmp_path, monkeypatch):
    process = SPAWN.Process(target=killed_in_the_middle, args=(str(tmp_path),))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("trees/*/*.arrow"))) == 12
    assert len(list(tmp_path.glob("trees/*/.*.tmp"))) == 1
    written = count_shards(monkeypatch)
    open_store("quickstart", FilterSettings(), tokenizer, tmp_path)
    assert sorted(written) == [f"{number:06}.arrow" for number in range(12, len(alone) - 1)]
    assert files(tmp_path) == alone


def test_what_was_killed_a_day_ago_is_swept_from_all_stores_and_nothing_else(tokenizer, tmp_path):
    old, young = time.time() - 25 * 3600, time.time() - 23 * 3600
    left = {".000001.arrow.0a.tmp": old, ".000002.arrow.0b.tmp": young, "000000.arrow": old, "000003.lock": old}
    other = tmp_path / "trees" / "other"
    other.mkdir(parents=True)
    for name, written in left.items():
        (other / name).write_text("x")
        os.utime(other / name, (written, written))
    open_store("quickstart:replies", FilterSettings(), tokenizer, tmp_path)
    assert {file.name for file in other.iterdir()} == {*left} - {".000001.arrow.0a.tmp"}


def test_an_interrupted_build_leaves_no_store_and_is_finished_later(alone, tokenizer, tmp_path, monkeypatch):
    def interrupt(number):
        if number == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_shards(patch, then=interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store("quickstart", FilterSettings(), tokenizer, tmp_path)
    assert not any(map(tokenise.is_complete, (tmp_path / "trees").iterdir()))
    written = count_shards(monkeypatch)
    open_store("quickstart", FilterSettings(), tokenizer, tmp_path)
    assert len(written) == len(alone) - 1 - 7
    assert files(tmp_path) == alone


def test_a_part_in_work_is_left_to_whoever_has_it(alone, tokenizer, tmp_path, monkeypatch):
    """While one process is at its sixth shard, another writes all that remain and waits for it."""
    barrier, results = SPAWN.Barrier(1), SPAWN.Queue()
    other = SPAWN.Process(target=build, args=("quickstart", str(tmp_path), barrier, results), daemon=True)

    def let_the_other_work(number):
        if number == 5:
            other.start()
            wait_until(lambda: len(list(tmp_path.glob("trees/*/*.arrow"))) == len(alone) - 2)

    here = count_shards(monkeypatch, then=let_the_other_work)
    open_store("quickstart", FilterSettings(), tokenizer, tmp_path)
    _, there = results.get(timeout=600)
    other.join(600)
    assert here == [f"{number:06}.arrow" for number in range(6)]
    assert sorted([*here, *there]) == sorted(alone.keys() - {"statistics.json"})
    assert files(tmp_path) == alone
