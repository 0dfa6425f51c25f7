"""Records, written to any kind of file and read back with their accounting checked, and a store of preferences."""

import gzip
import json
from dataclasses import dataclass

import numpy as np
import pytest

from gpt2ft.data.blocks import RecordBlock
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.reading import REASONS, DataError, ReadContext
from gpt2ft.data.sources import Source, open_source
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings


@dataclass(frozen=True)
class InMemory:
    """A list in the place of a file."""

    records: list
    place: str = "test.jsonl"
    size: None = None

    def blocks(self, columns):
        places = [f"{self.place}:{number}" for number in range(1, len(self.records) + 1)]
        yield RecordBlock(0, lambda context: zip(places, self.records, strict=True))


@pytest.fixture(scope="session")
def read():
    """read(source, kind, **filters): the trees and the context of a name, a file or a list of records."""

    def read(source, kind=CONVERSATIONS, **filters):
        in_memory = isinstance(source, list)
        settings = FilterSettings(**filters)
        opened = (
            Source("test", InMemory(source), kind, settings) if in_memory else open_source(str(source), kind, settings)
        )
        context = ReadContext(opened.name, settings)
        trees = [tree for shard in opened.shards() for tree in shard.trees(context)]
        kept = sum(len(tree.messages) for tree in trees)
        assert kept + context.dropped.total() - context.refused_records() == context.totals.messages
        assert set(context.dropped) <= set(REASONS)
        assert {tree.source for tree in trees} <= {opened.name}
        return trees, context

    return read


@pytest.fixture(scope="session")
def compare(read):
    """compare(source, **filters): trees and context of preferences."""
    return lambda source, **filters: read(source, kind=PREFERENCES, **filters)


@pytest.fixture(scope="session")
def drops(read):
    """drops(source, **filters): messages by the reason for which they are dropped."""
    return lambda source, **filters: dict(+read(source, **filters)[1].dropped)


@pytest.fixture(scope="session")
def error(read):
    """error(source, **filters): what the refusal says."""

    def error(source, **filters):
        with pytest.raises(DataError) as raised:
            read(source, **filters)
        return str(raised.value)

    return error


@pytest.fixture(scope="session")
def write():
    """write(file, records): in the layout that the name of the file asks for; "array.json" is one array."""

    def write(file, records):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".parquet", ".arrow"):
            import pyarrow.parquet

            keys = dict.fromkeys(key for record in records for key in record)  # the first need not have them all
            rows = [{key: record.get(key) for key in keys} for record in records]
            table = pyarrow.Table.from_pylist(rows)
            if file.suffix == ".parquet":
                pyarrow.parquet.write_table(table, file)
            else:
                with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
                    stream.write_table(table)
        elif file.name == "array.json":
            file.write_text(json.dumps(records, indent=1))
        else:
            lines = "".join(json.dumps(record, ensure_ascii=file.suffix == ".json") + "\n" for record in records)
            file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
        return file

    return write


@pytest.fixture(scope="session")
def random_groups(write, tmp_path_factory, tokenizer, cache):
    """150 groups of preferences: prompts of up to five turns, two to six replies of up to 60 words, many ranks tied."""
    random = np.random.default_rng(0)
    words = ["tea", "rain", "cup", "warm", "leaf", "and", "of", "a"]

    def message(id, role, most=60, **fields):
        text = " ".join(random.choice(words, int(random.integers(1, most))).tolist())
        return {"message_id": id, "role": role, "text": text, "replies": [], **fields}

    trees = []
    for number in range(150):
        root = message(f"{number}", "system" if random.random() < 0.3 else "prompter", most=20)
        last = root
        for turn in range(2 * int(random.integers(0, 3)) + (root["role"] == "system")):
            role = "prompter" if last["role"] in ("assistant", "system") else "assistant"
            last["replies"] = [message(f"{number}-{turn}", role, most=20)]
            (last,) = last["replies"]
        ranks = [0, 1, *random.integers(0, 4, int(random.integers(0, 5))).tolist()]
        last["replies"] = [message(f"{number}-r{i}", "assistant", rank=rank) for i, rank in enumerate(ranks)]
        trees.append({"message_tree_id": f"{number}", "prompt": root})
    file = write(tmp_path_factory.mktemp("groups") / "groups.jsonl", trees)
    return open_store(str(file), FilterSettings(reviewed_only=False), tokenizer, cache, kind=PREFERENCES)
