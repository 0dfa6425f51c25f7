"""Files of every kind are read in blocks, to their end, in little memory, and refused by place where they break."""

import gzip
import json
import tracemalloc
from collections import Counter

import pytest
from facts import tells
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gpt2ft.data import blocks, records, tables
from gpt2ft.data.reading import DataError, ReadContext
from gpt2ft.data.records import read_file
from gpt2ft.settings.sections import FilterSettings

GOOD = [{"text": f"Text {number} — thé."} for number in range(3)]
LINES = [json.dumps(record, ensure_ascii=False).encode() for record in GOOD]
DEEP = b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"


def parsed(file, on_error="fail"):
    """(records, what was dropped, blocks)"""
    context = ReadContext("test", FilterSettings(on_error=on_error))
    parts = list(read_file(file, columns=lambda names: names))
    found = [(where.removeprefix(str(file)), record) for block in parts for where, record in block.parse(context)]
    return found, +context.dropped, parts


def problem(file, on_error="fail"):
    with pytest.raises(DataError) as raised:
        parsed(file, on_error)
    return str(raised.value)


def write_bytes(file, content):
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


# --- lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json"])
def test_blank_lines_line_ends_of_windows_and_a_byte_order_mark_are_no_errors(tmp_path, name):
    file = write_bytes(tmp_path / name, b"\xef\xbb\xbf" + b"\r\n \t\r\n".join(LINES) + b"\r\n\n")
    assert parsed(file)[:2] == ([(":1", GOOD[0]), (":3", GOOD[1]), (":5", GOOD[2])], {})


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json"])
@pytest.mark.parametrize(
    ("line", "facts"),
    [
        (b'{"text": "x", ', "Expecting property name"),
        (b'{"text": "x"} {}', "Extra data at column 15"),
        (b'{"text": "x"},', "Extra data at column 14"),
        (b'{"text": "x}', "Invalid control character"),
        (b'{"rank": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"text": "\xff"}', "UTF-8 ... byte 11"),
        (b'{"text": "\xc3"}', "UTF-8 ... byte 11"),
        ('{"text": "x"}'.encode("utf-16"), "UTF-8 ... byte 1"),
        (b'"a"', 'JSON object ... "a"'),
        (b"null", "JSON object ... null"),
        (b"NaN", "JSON object ... NaN"),
        (b'["a"]', "JSON object ... a list"),
        (DEEP, "nest this deep ... flat"),
        (b'{"text": "' + b"x" * 1000 + b'"}', "600 bytes"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_an_error_or_skipped_and_counted(tmp_path, monkeypatch, name, line, facts):
    if b"x" * 1000 in line:
        monkeypatch.setattr(blocks, "LONGEST_RECORD", 600)
    file = write_bytes(tmp_path / name, b"\n".join([*LINES[:2], line, LINES[2]]))
    assert tells(problem(file), f"{file}:3: ... {facts}")
    assert parsed(file, "skip")[:2] == ([(":1", GOOD[0]), (":2", GOOD[1]), (":4", GOOD[2])], {"malformed line": 1})


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_longest_line_there_may_be(tmp_path, monkeypatch, end):
    monkeypatch.setattr(blocks, "LONGEST_RECORD", len(LINES[0]))
    longer = LINES[0].replace(b"Text", b"Texts")
    whole = b"\n".join([LINES[0], longer, LINES[0] + b"\r", LINES[0]]) + end
    found, dropped, _ = parsed(write_bytes(tmp_path / "t.jsonl", whole), "skip")
    assert ([where for where, _ in found], dropped) == ([":1", ":4"], {"malformed line": 2})
    assert parsed(write_bytes(tmp_path / "t.jsonl", LINES[0] + b"\n" + longer + end), "skip")[1] == dropped - Counter(
        ["malformed line"]
    )


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json"])
def test_a_line_of_a_hundred_megabytes_takes_no_memory(tmp_path, name):
    file = tmp_path / name
    with gzip.open(file, "wb", compresslevel=1) if name.endswith(".gz") else open(file, "wb") as handle:
        handle.write(LINES[0] + b'\n{"text": "')
        for _ in range(100):
            handle.write(b"x" * (1 << 20))
        handle.write(b'"}\n' + LINES[1])
    tracemalloc.start()
    found, dropped, parts = parsed(file, "skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found, dropped) == ([(":1", GOOD[0]), (":3", GOOD[1])], {"malformed line": 1})
    assert peak < 3 * blocks.LONGEST_RECORD
    assert sum(block.size for block in parts) > 100 << 20
    assert tells(problem(file), f"{file}:2: ... 16,777,216 bytes")


# --- an array -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", [b"", b"\xef\xbb\xbf", b"\n \r\n\t", b"\xef\xbb\xbf\n "])
def test_an_array_with_space_and_a_byte_order_mark(tmp_path, opening):
    file = write_bytes(tmp_path / "t.json", opening + b"[\n" + b" ,\r\n".join(LINES) + b"\n]\n\n")
    assert parsed(file)[:2] == ([(f": record {number}", GOOD[number - 1]) for number in (1, 2, 3)], {})


def test_elements_that_are_no_objects_are_refused_one_by_one(tmp_path):
    file = write_bytes(tmp_path / "t.json", b'[1, {"text": "x"}, null, NaN, "a", [{"text": "x"}], 1.5]')
    assert tells(problem(file), f"{file}: record 1: ... JSON object ... 1")
    found, dropped, _ = parsed(file, "skip")
    assert (found, dropped) == ([(": record 2", {"text": "x"})], {"malformed line": 6})


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"[", "Expecting value in record 1"),
        (b"[,]", "Expecting value in record 1"),
        (b"[{},]", "Expecting value in record 2"),
        (b"[{}, {", "Expecting property name enclosed in double quotes"),
        (b'[{}, {"a": "b', "Unterminated string starting at in record 2"),
        (b"[{}, {}", "the array does not end after record 2"),
        (b"[{}, {} \n", "the array does not end after record 2"),
        (b"[{},", "Expecting value in record 2"),
        (b"[{} {}]", "has no comma after record 1"),
        (b"[{}, {}}", "has no comma after record 2"),
        (b"[{}] {}", "goes on after its end"),
        (b"[]]", "goes on after its end"),
        (b"[{}]\n[{}]", "goes on after its end"),
        (b"[{}, " + DEEP + b"]", "record 2: ... nest this deep"),
        (b'[{}, {"a": ' + b"9" * 5000 + b"}]", "record 2: ... Exceeds"),
        (b'[{}, {"a": "' + b"x" * 1000 + b'"}]', "record 2: ... 600 characters"),
        (b'[{}, {"a": "' + b"x" * 1000 + b"}, {}]", "record 2: ... 600 characters"),
        (b'[{"a": "\xff"}]', "whole and readable ... 'utf-8' codec"),
        (b'[{"a": "\xc3', "whole and readable ... 'utf-8' codec"),
    ],
)  # fmt: skip
def test_a_broken_array_is_always_an_error(tmp_path, monkeypatch, content, facts, on_error):
    if b"x" * 1000 in content:
        monkeypatch.setattr(blocks, "LONGEST_RECORD", 600)
        monkeypatch.setattr(records, "_GULP", 16)
    file = write_bytes(tmp_path / "t.json", content)
    assert tells(problem(file, on_error), f"{file}: ... {facts}")


def test_an_array_element_of_a_hundred_megabytes_takes_little_memory(tmp_path):
    file = tmp_path / "t.json"
    with open(file, "wb") as handle:
        handle.write(b"[" + LINES[0] + b', {"text": "')
        for _ in range(100):
            handle.write(b"x" * (1 << 20))
        handle.write(b'"}]')
    tracemalloc.start()
    assert tells(problem(file, "skip"), f"{file}: record 2: ... 16,777,216 characters")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * blocks.LONGEST_RECORD


short_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | short_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short_text, inner, max_size=3),
    max_leaves=6,
)
arrays = st.lists(json_values.filter(lambda value: not isinstance(value, float)), max_size=5)


def test_an_array_is_what_the_json_module_makes_of_it_wherever_the_file_is_cut(tmp_path_factory):
    """Of an array, whole or with a character changed, read a few characters at a time."""
    file = tmp_path_factory.mktemp("arrays") / "t.json"
    met = Counter()

    @given(
        arrays,
        st.sampled_from([None, 0, 1, "\t"]),
        st.integers(4, 40),
        st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", ",", "]", "[", "}", "{", '"', " ", "1", "\\"])),
    )
    @settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(values, indent, gulp, change):
        text = json.dumps(values, indent=indent, ensure_ascii=False)
        if change:
            at, instead = change
            at = 1 + at % (len(text) - 1)  # the bracket that opens it stays
            text = text[:at] + instead + text[at + 1 :]
        file.write_text(text, encoding="utf-8", newline="")
        try:
            expected = json.loads(text)
        except json.JSONDecodeError:
            expected = None
        assume(expected is None or not any(isinstance(value, float) for value in expected))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "_GULP", gulp)
            if expected is None:
                assert "JSON array" in problem(file)
            else:
                found = [element for (_, element), _ in records._elements(file)]
                assert repr(found) == repr(expected)  # NaN is not equal to itself
        met["refused"] += expected is None
        met["spans gulps"] += bool(expected) and len(text) > 3 * gulp
        met["changed, and still an array"] += bool(change) and expected is not None

    check()
    assert min(met[case] for case in ("refused", "spans gulps", "changed, and still an array")) > 5, met


def test_an_element_may_nest_as_deep_as_it_can_be_parsed(tmp_path):
    """At no depth is it an error that nobody answers for."""
    outcomes = Counter()
    for depth in [*range(10, 1000, 90), *range(900, 1000)]:
        file = write_bytes(tmp_path / "t.json", LINES[0].join([b"[", b", "]) + b"[" * depth + b"]" * depth + b"]")
        try:
            outcomes[str(parsed(file, "skip")[1])] += 1
        except DataError as error:
            outcomes[str(error).removeprefix(str(file))] += 1
    assert set(outcomes) == {"Counter({'malformed line': 1})", ": record 2: must not nest this deep"}


def test_sizes_of_array_elements_add_up_to_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40)
    file = write_bytes(tmp_path / "t.json", json.dumps([{"text": "x" * n} for n in range(30)]).encode())
    _, _, parts = parsed(file)
    assert len(parts) > 5
    assert abs(sum(block.size for block in parts) - file.stat().st_size) < 2 * 30 + 2


# --- tables ---------------------------------------------------------------------------------------------------------


def test_rows_of_a_table_are_numbered_through_all_blocks(tmp_path, write, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_IN_A_BLOCK", 4)
    file = write(tmp_path / "t.parquet", [{"text": str(number)} for number in range(1, 11)])
    found, _, parts = parsed(file)
    assert found == [(f": row {number}", {"text": str(number)}) for number in range(1, 11)]
    assert len(parts) == 3


@pytest.mark.parametrize("long", [range(100), [70], range(40, 60), []])
def test_blocks_of_a_table_are_cut_by_bytes(tmp_path, write, monkeypatch, long):
    """All rows long, or one or some of many short ones; a column that is not read counts for nothing."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    rows = [{"text": f"{number} " + "x" * (3_000 if number in long else 5)} for number in range(1, 101)]
    file = write(tmp_path / "t.parquet", [row | {"n": f"{number}" * 9_000} for number, row in enumerate(rows)])
    parts = list(read_file(file, columns=lambda names: ["text"]))
    found = [parsed for block in parts for parsed in block.parse(ReadContext("test", FilterSettings()))]
    assert found == [(f"{file}: row {number}", row) for number, row in enumerate(rows, start=1)]
    assert max(block.size for block in parts) <= 10_000
    assert len(parts) <= 2 + len(long)


def test_of_a_table_little_more_than_a_block_is_in_memory(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [f"{number} " + "x" * 80_000 for number in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "t.parquet", write_batch_size=10)
    del texts  # pages are read whole, so they must be small
    before, most = pyarrow.total_allocated_bytes(), 0
    for block in read_file(tmp_path / "t.parquet", columns=lambda names: names):
        assert block.size <= blocks.BLOCK_BYTES
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert blocks.BLOCK_BYTES / 2 < most < 3 * blocks.BLOCK_BYTES


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_text_in_parquet_that_is_not_utf8(tmp_path, on_error):
    import pyarrow.parquet

    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "t.parquet")
    assert "whole and readable parquet file" in problem(tmp_path / "t.parquet", on_error)


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "array.json", "t.json"])
def test_blocks_hold_every_record_once_in_order_whatever_their_size(tmp_path, write, monkeypatch, name):
    rows = [{"text": "x" * (n % 7), "n": n} for n in range(50)]
    file = write(tmp_path / name, rows)
    numbers = set()
    for size in (1, 60, 500, 1 << 20):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        found, dropped, parts = parsed(file)
        assert [record for _, record in found] == rows
        assert not dropped
        assert all(block.size >= size for block in parts[:-1])
        numbers.add(len(parts))
        if name in ("t.jsonl", "t.json"):
            assert sum(block.size for block in parts) == file.stat().st_size
    assert numbers >= {1, 50}


def test_blocks_are_parsed_alone_and_again(tmp_path, write, monkeypatch):
    """As several processes do, each its own."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    *_, last = read_file(write(tmp_path / "t.jsonl", GOOD), columns=lambda names: names)
    for _ in range(2):
        assert [record for _, record in last.parse(ReadContext("test", FilterSettings()))] == GOOD[2:]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_broken_file_is_always_an_error(tmp_path, write, on_error):
    contents = {
        "not.jsonl.gz": b'{"text": "a"}',
        "cut.jsonl.gz": gzip.compress(b"\n".join(LINES))[:-20],
        "damaged.jsonl.gz": gzip.compress(b"\n".join(LINES))[:-8] + b"damaged.",
        "not.parquet": b"PAR1 no PAR1",
        "cut.parquet": write(tmp_path / "whole.parquet", GOOD).read_bytes()[:-50],
        "empty.parquet": b"",
        "not.arrow": b"ARROW1 no ARROW1",
        "cut.arrow": write(tmp_path / "whole.arrow", GOOD).read_bytes()[:-8],
        "middle.arrow": write(tmp_path / "whole.arrow", GOOD).read_bytes()[:-50],
        "empty.arrow": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name}: must be a whole and readable" in problem(tmp_path / name, on_error)
