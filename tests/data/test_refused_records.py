"""Records that are left out are counted by the reason for which each is, and files and texts of doubt are told."""

import json

import pytest
from facts import tells

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import RECORD_REASONS
from gpt2ft.data.store import open_store
from gpt2ft.runs.describe import shares
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.settings.training import DataSettings

GOOD = {"prompt": "Tea?", "completion": "Yes."}
BAD = {  # reason -> lines
    "malformed line": ["{", "3", '{"prompt": "caf\udce9"}'],
    "repeated key": ['{"prompt": "Tea?", "prompt": "Coffee?", "completion": "Yes."}',
                     '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "completion": "Yes."}'],
    "another layout": ['{"text": "Tea."}', '{"prompt": "Tea?"}'],
    "key that is not read": [json.dumps(GOOD | {"history": [["a", "b"]]})],
    "marked as bad": [json.dumps(GOOD | {"label": False})],
    "missing or wrong value": [json.dumps(GOOD | {"completion": None})],
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    lines = [
        json.dumps(GOOD),
        *(line for lines in BAD.values() for line in lines),
        json.dumps(GOOD | {"prompt": "Milk?"}),
    ]
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return tmp_path / "t.jsonl"


def test_every_reason_has_its_number(file, read, drops, tokenizer, tmp_path):
    expected = {reason: len(lines) for reason, lines in BAD.items()}
    assert expected.keys() == set(RECORD_REASONS)
    assert drops(file, on_error="skip") == expected
    assert len(read(file, on_error="skip")[0]) == 2
    statistics = open_store(str(file), FilterSettings(on_error="skip"), tokenizer, tmp_path / "cache").statistics
    assert statistics.dropped == expected
    assert statistics.read == statistics.kept + sum(expected.values())


def test_each_ends_the_run_where_none_is_skipped(error, tmp_path):
    for reason, lines in BAD.items():
        for line in lines:
            (tmp_path / "t.jsonl").write_bytes(f"{json.dumps(GOOD)}\n{line}\n".encode("utf-8", "surrogateescape"))
            assert tells(error(tmp_path / "t.jsonl"), f"{tmp_path}/t.jsonl:2: "), reason


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "array.json", "wrapped.json"])
def test_a_repeated_key_is_refused_in_every_kind_of_json(name, read, error, drops, tmp_path):
    import gzip

    good = json.dumps(GOOD)
    twice = '{"prompt": "Tea?", "completion": [{"a": 1, "a": 2}], "completion": "Yes."}'
    text = f"{good}\n{twice}\n{good}"
    if name in ("array.json", "wrapped.json"):
        text = f"[{good}, {twice}, {good}]"
    if name == "wrapped.json":
        text = f'{{"version": "1.0", "data": {text}, "note": 3}}'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    place = f"{name}: record 2" if name in ("array.json", "wrapped.json") else f"{name}:2"
    assert tells(error(tmp_path / name), f"{tmp_path / place}: ... each key once ... ")
    assert drops(tmp_path / name, on_error="skip") == {"repeated key": 1}
    assert len(read(tmp_path / name, on_error="skip")[0]) == 2


def test_what_people_must_know_is_in_the_plan_of_every_start(tokenizer, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": f"[INST] {n} [/INST] Yes."}) for n in range(9)))
    (folder / "README.md").write_text("Mine.")
    for _ in range(2):  # the second from the cache
        corpus, _ = load_corpora(DataSettings(train=(str(folder),), cache=str(tmp_path / "cache")), tokenizer)
        plan = Plan(chunk(corpus.stores, corpus.rows, ConversationTrees("once", 256, 512)), 512, 1, seed=0)
        (share,) = shares(corpus, plan)
        assert share.notes[0] == "not read: README.md"
        assert tells(share.notes[1], "9 of the first 9 texts ... `[INST]` ... `messages`")


@pytest.mark.parametrize("key", ["data", "rows", "records", "train", "validation"])
@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_around_a_list_of_records(key, name, indent, read, error, tmp_path):
    import gzip

    def write(value):
        text = json.dumps(value, indent=indent).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return tmp_path / name

    for value in ({key: [GOOD] * 3}, {"version": {"a": [1]}, "n": 3, key: [GOOD] * 3, "about": [{"x": 1}]}):
        assert len(read(write(value))[0]) == 3
    assert len(read(write([GOOD] * 3))[0]) == 3
    for other in ({key: [GOOD], "test": [GOOD]}, {"test": [GOOD], key: [GOOD]}):
        assert tells(error(write(other)), f"{tmp_path / name}: ... holds two")
    assert tells(error(write({key: []})), "holds none")
    (tmp_path / name).unlink()
    text = f'{{"{key}": [{json.dumps(GOOD)}]'
    for cut in (text, f"{text}, ", f'{text}, "a"', f"{text}}} {{}}"):
        (tmp_path / name).write_bytes(gzip.compress(cut.encode()) if name.endswith(".gz") else cut.encode())
        assert tells(error(tmp_path / name, on_error="skip"), f"{tmp_path / name}: must be one JSON array")


@pytest.mark.parametrize(
    "beside", [{"system": "Be kind."}, {"instruction": "Translate"}, {"more": [GOOD]}, {"about": 1, "Prompt": " "}]
)
def test_what_may_belong_to_all_records_of_a_list_is_not_passed_over(beside, read, error, tmp_path):
    for value in ({"data": [GOOD]} | beside, beside | {"data": [GOOD]}):
        for indent in (None, 2):
            (tmp_path / "t.json").write_text(json.dumps(value, indent=indent))
            if "about" in beside:
                assert len(read(tmp_path / "t.json")[0]) == 1
            else:
                assert tells(error(tmp_path / "t.json", on_error="skip"), f'{tmp_path}/t.json: ... "{min(beside)}"')


def test_records_with_a_list_of_such_a_name_are_records(read, tmp_path):
    lines = [json.dumps({"data": ["Tea?", "Yes."], "id": n}) for n in range(2)]
    (tmp_path / "t.json").write_text("\n".join(lines))
    assert len(read(tmp_path / "t.json")[0]) == 2
