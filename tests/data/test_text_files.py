"""Tables in text, documents and packed files are read as they stand, and refused by place with what to do."""

import csv
import gzip
import shlex
import subprocess

import pytest
from facts import tells

from gpt2ft.data import blocks
from gpt2ft.data.blocks import FILE_KINDS
from gpt2ft.data.sources import open_source

ROWS = [("Tea?", "Yes."), ("Which, please;\nand\twhy?", 'The "green" one.\r\nIt is fresh.'), ("Thé?", " Oui. ")]


def turns(trees):
    return [[message.text for message in tree.messages] for tree in trees]


EXPECTED = [[text.replace("\r\n", "\n").strip() for text in row] for row in ROWS]


def written(file, rows, **options):
    with open(file, "w", encoding=options.pop("encoding", "utf-8"), newline="") as handle:
        csv.writer(handle, **options).writerows(rows)
    return file


class TestTables:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    @pytest.mark.parametrize("ends", ["\r\n", "\n"])
    def test_delimiters_quotes_and_line_ends_within_fields(self, delimiter, encoding, quoting, ends, read, tmp_path):
        options = {"delimiter": delimiter, "encoding": encoding, "quoting": quoting, "lineterminator": ends}
        file = written(tmp_path / "t.csv", [("prompt", "completion"), *ROWS], **options)
        trees, context = read(file)
        assert turns(trees) == EXPECTED
        assert not context.dropped

    def test_tabs(self, read, tmp_path):
        file = written(tmp_path / "t.tsv", [("question", "answer", "source"), ("a, b", "c; d", "x")], delimiter="\t")
        assert turns(read(file)[0]) == [["a, b", "c; d"]]

    @pytest.mark.parametrize("packed", [True, False])
    def test_packed_and_in_capitals(self, packed, read, tmp_path):
        file = written(tmp_path / "T.CSV", [("Prompt", " Completion "), *ROWS])
        if packed:
            (tmp_path / "t.csv.gz").write_bytes(gzip.compress(file.read_bytes()))
            file = tmp_path / "t.csv.gz"
        assert turns(read(file)[0]) == EXPECTED

    def test_rows_as_pandas_numbers_them_and_lines_that_are_blank(self, read, tmp_path):
        (tmp_path / "t.csv").write_text("\n,prompt,completion\n0,Tea?,Yes.\n  \n1,Milk?,No.\n\n")
        assert turns(read(tmp_path / "t.csv")[0]) == [["Tea?", "Yes."], ["Milk?", "No."]]

    def test_the_first_line_of_excel(self, read, tmp_path):
        (tmp_path / "t.csv").write_text("sep=|\nprompt|completion\nTea, with; milk?|Yes.\n")
        assert turns(read(tmp_path / "t.csv")[0]) == [["Tea, with; milk?", "Yes."]]
        (tmp_path / "t.csv").write_text("sep=;;\nprompt;completion\nTea?;Yes.\n")  # saved again by another program
        assert turns(read(tmp_path / "t.csv")[0]) == [["Tea?", "Yes."]]

    def test_long_fields(self, read, tmp_path):
        written(tmp_path / "t.csv", [("text",), ("x" * 200_000,)])
        (tree,), _ = read(tmp_path / "t.csv")
        assert len(tree.messages[0].text) == 200_000

    @pytest.mark.parametrize("on_error", ["fail", "skip"])
    @pytest.mark.parametrize(
        ("text", "facts"),
        [
            ("How do I brew tea?,Warm the pot.\nTea?,Yes.\n", '"How do I brew tea?" ... first line ... its columns'),
            ("prompt,completion,prompt\na,b,c\n", "first line ... once ... \"prompt\""),
            ("prompt,completion\n", "holds none"),
            ("", "holds none"),
            ('prompt,completion\na,"b\nc\n', ":2: ... quotes closed"),
            ('prompt,completion\na,b\nc,"d" e\n', ":3: ... quotes"),
        ],
    )  # fmt: skip
    def test_a_table_without_a_header_or_with_open_quotes_is_refused(self, text, facts, on_error, error, tmp_path):
        (tmp_path / "t.csv").write_text(text)
        assert tells(error(tmp_path / "t.csv", on_error=on_error), f"{tmp_path}/t.csv ... {facts}")

    @pytest.mark.parametrize("row", ["a", "a,b,c", "a, b, and c"])
    def test_a_row_that_does_not_fit_the_header(self, row, error, drops, tmp_path):
        (tmp_path / "t.csv").write_text(f'prompt,completion\n"Tea\n?",Yes.\n{row}\n')
        assert tells(error(tmp_path / "t.csv"), f"{tmp_path}/t.csv:4: must have 2 fields")
        assert drops(tmp_path / "t.csv", on_error="skip") == {"malformed line": 1}

    def test_columns_without_a_name_must_be_empty(self, read, error, tmp_path):
        (tmp_path / "t.csv").write_text("prompt,completion,\nTea?,Yes.,\n")
        assert turns(read(tmp_path / "t.csv")[0]) == [["Tea?", "Yes."]]
        (tmp_path / "t.csv").write_text("prompt,completion,\nTea?,Yes.,or no\n")
        assert tells(error(tmp_path / "t.csv"), ":2: `column 3` ... would be lost")


class TestDocuments:
    TEXT = "\ufeff# Tea\n\nIt is hot.\r\n\n"

    @pytest.mark.parametrize("name", ["t.txt", "t.md", "T.TXT", "t.txt.gz"])
    def test_a_file_is_one_or_each_of_its_lines(self, name, read, tmp_path):
        content = self.TEXT.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert turns(read(tmp_path / name)[0]) == [["# Tea\n\nIt is hot."]]
        assert turns(read(tmp_path / name, documents="line")[0]) == [["# Tea"], ["It is hot."]]

    def test_a_folder_of_them(self, read, drops, tmp_path):
        for name, text in {"a.md": "A.", "b/c.txt": "C.", "empty.txt": " \n"}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        assert turns(read(tmp_path)[0]) == [["A."], ["C."]]
        assert drops(tmp_path) == {"empty": 1}

    def test_one_that_is_too_long(self, error, read, tmp_path, monkeypatch):
        monkeypatch.setattr(blocks, "LONGEST_RECORD", 10)
        (tmp_path / "t.txt").write_text("Tea.\n" * 3)
        assert tells(error(tmp_path / "t.txt", on_error="skip"), "10 bytes ... `data.documents` to line")
        assert len(read(tmp_path / "t.txt", documents="line")[0]) == 3


def test_files_of_equal_bytes_that_are_read_otherwise_have_other_digests(tmp_path):
    digests = set()
    for kind in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
        (tmp_path / f"t{kind}").write_text('{"text": "x"}\n')
        digests.add(open_source(str(tmp_path / f"t{kind}")).origin.digest())
    assert len(digests) == 5


class TestFolders:
    def test_files_that_are_not_read_are_named(self, write, tmp_path):
        write(tmp_path / "a" / "t.jsonl", [{"text": "Tea."}])
        for name in ("README.md", "notes.docx", "sub/scan.pdf", ".hidden", "dataset_infos.json"):
            (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "a" / name).write_text("{}")
        assert open_source(str(tmp_path / "a")).origin.notes == ("not read: README.md, notes.docx, sub/scan.pdf",)
        for number in range(10):
            (tmp_path / "a" / f"{number}.png").touch()
        assert tells(open_source(str(tmp_path / "a")).origin.notes[0], "0.png ... and 8 more")
        assert open_source(str(tmp_path / "a" / "t.jsonl")).origin.notes == ()


# --- encodings ------------------------------------------------------------------------------------------------------

RECORD = '{"prompt": "Thé à la menthe?", "completion": "Oui, très bon."}'
TEXTS = {
    "t.jsonl": f"{RECORD}\n{RECORD}\n",
    "t.json": f"[{RECORD},\n{RECORD}]",
    "t.csv": "prompt,completion\nThé à la menthe?,Oui\n",
    "t.tsv": "prompt\tcompletion\nThé à la menthe?\tOui\n",
    "t.txt": "Thé à la menthe.\n",
    "t.md": "# Thé à la menthe.\n",
    "it's.jsonl.gz": f"{RECORD}\n",
    "t.json.gz": f"[{RECORD}]",
}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", TEXTS)
def test_another_encoding_is_told_with_the_command_that_converts_it(name, encoding, error, read, tmp_path):
    """And the command does."""
    content = TEXTS[name].encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for on_error in ("fail", "skip"):
        problem = error(tmp_path / name, on_error=on_error)
        assert tells(problem, f"{tmp_path / name} ... iconv -f ")
    command = problem.partition("`")[2].rpartition("`")[0]
    subprocess.run(["bash", "-c", command], check=True)
    converted = shlex.split(command)[-1]
    assert converted != str(tmp_path / name)
    assert converted.endswith(next(kind for kind in FILE_KINDS if name.endswith(kind)))
    assert "Thé à la menthe" in read(converted)[0][0].messages[0].text


@pytest.mark.parametrize("bad", [b"\x81", "Thé — 茶. ".encode() + b"\xe9"])
def test_what_is_no_encoding_or_two_is_not_guessed(bad, error, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "' + bad + b'"}')
    assert tells(error(tmp_path / "t.jsonl"), ":1: ... UTF-8 text ... byte")
    assert "iconv" not in error(tmp_path / "t.jsonl")
