"""The file of votes: lines that are stored stay, and all lines are whole."""

import errno
import json
import os
import threading
from io import FileIO
from pathlib import Path

import pytest

from gpt2ft.server.comparison.vote_file import VoteFile

VOTE = {"prompt": "What is tea?", "chosen": "A drink, \u2028é.", "rejected": "A fish."}
LINE = json.dumps(VOTE, ensure_ascii=False).encode() + b"\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "votes.jsonl"


def test_a_vote_is_a_line_behind_those_that_are_there(path):
    votes = VoteFile(path)
    assert votes.count == 0
    votes.append(VOTE)
    assert VoteFile(path).count == votes.count == 1
    VoteFile(path).append(VOTE)
    assert path.read_bytes() == LINE * 2


@pytest.mark.parametrize("end", [1, 5, 20, len(LINE) - 2])
def test_a_kill_costs_no_earlier_line(path, end):
    """Half a line is what a kill leaves, before the start and, of another server, at any time."""
    votes = VoteFile(path)
    votes.append(VOTE)
    with open(path, "ab") as file:
        file.write(LINE[:end])
    votes.append(VOTE)
    assert path.read_bytes() == LINE * 2
    with open(path, "ab") as file:
        file.write(LINE[:end])
    assert VoteFile(path).count == 2
    assert path.read_bytes() == LINE * 2


def test_a_last_line_that_an_editor_left_open_is_kept(path):
    votes = VoteFile(path)
    path.write_bytes(LINE.rstrip(b"\n"))
    assert VoteFile(path).count == 1
    path.write_bytes(LINE.rstrip(b"\n"))
    votes.append(VOTE)
    assert path.read_bytes() == LINE * 2


def test_a_file_that_is_moved_away_takes_its_votes_along(path):
    votes = VoteFile(path)
    votes.append(VOTE)
    path.rename(path.with_name("first.jsonl"))
    votes.append(VOTE)
    assert path.read_bytes() == path.with_name("first.jsonl").read_bytes() == LINE
    assert votes.count == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_costs_nothing_that_was_stored(path, monkeypatch, code, fails):
    votes = VoteFile(path)
    votes.append(VOTE)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    class Full(FileIO):
        def write(self, line):
            return super().write(line[:10]) if len(line) == len(LINE) else fail()

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(
                "gpt2ft.server.comparison.vote_file.open", lambda path, *_, **__: Full(path, "a+"), raising=False
            )
        else:
            patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="could not be written") as raised:
            votes.append(VOTE)
        assert raised.value.errno == code
    assert path.read_bytes() == LINE
    assert votes.count == 1
    votes.append(VOTE)
    assert path.read_bytes() == LINE * 2


def test_several_servers_may_share_it(path):
    files = [VoteFile(path) for _ in range(4)]
    threads = [threading.Thread(target=lambda votes=votes: [votes.append(VOTE) for _ in range(25)]) for votes in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == LINE * 100


@pytest.mark.parametrize(
    "content",
    [b"# Tea\n", b"# Tea", b"{}\n", b'{"messages": []}\n', LINE + b"tea\n", LINE + b"tea", b"\xff\n", b"[" * 9999],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        VoteFile(path)
    assert path.read_bytes() == content


def test_what_is_no_file_on_a_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match="/dev/full"):
        VoteFile(Path("/dev/full"))
    with pytest.raises(OSError, match=tmp_path.name):
        VoteFile(tmp_path)
