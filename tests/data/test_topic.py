"""One topic: the prompts stay, every reply is one of the file's, whatever the data source answers."""

import json
from collections import Counter

import pytest

from gpt2ft.data.reading import DataError, Filters
from gpt2ft.data.sources import read_trees
from gpt2ft.data.store import open_store
from gpt2ft.data.topic import Topic

TOPIC = Topic(("Tea.", "A kettle.", "Two cups."))


def test_prompts_stay_and_replies_are_the_topics():
    asked = 0
    used = Counter()
    for tree in read_trees("quickstart", Filters()):
        dropped = Counter()
        answered = TOPIC.applied_to(tree, dropped)
        assert len(answered.messages) + dropped.total() == len(tree.messages)
        assert [message.parent for message in answered.messages] == [None, *range(len(answered.messages) - 1)]
        best = [0]  # the best-ranked path, found from the ranks
        while replies := [i for i, m in enumerate(tree.messages) if m.parent == best[-1]]:
            best.append(min(replies, key=lambda i: tree.messages[i].rank or 0))
        for message, index in zip(answered.messages, best, strict=True):
            original = tree.messages[index]
            assert message.role == original.role
            if message.role == "assistant":
                used[message.text] += 1
            else:
                assert message.text == original.text
                asked += 1
        replies = [message.text for message in answered.messages if message.role == "assistant"]
        assert len(set(replies)) == min(len(replies), 3)
        assert TOPIC.applied_to(tree, Counter()) == answered
    assert asked > 150
    assert set(used) == set(TOPIC.replies)
    assert min(used.values()) > 0.2 * used.total()


def test_replies_come_from_lines_or_from_any_data(tmp_path):
    lines = tmp_path / "tea.txt"
    lines.write_text(" Tea. \n\nA kettle.\nTea.\nTwo cups.\n")
    chats = tmp_path / "tea.jsonl"
    chats.write_text(json.dumps({"prompt": "What?", "completion": "Tea."}) + "\n")
    assert Topic.read(str(lines)) == TOPIC
    assert Topic.read(str(chats)).replies == ("Tea.",)
    assert len(Topic.read("quickstart:replies").replies) == 40


def test_what_cannot_be_used_is_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"`data.topic_replies` = .*no\.txt cannot be read"):
        Topic.read(str(tmp_path / "no.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(DataError, match=r"`data.topic_replies` = .* must hold replies, but holds none"):
        Topic.read(str(empty))
    with pytest.raises(DataError, match="holds plain text, which has no prompts"):
        open_store("quickstart:replies", Filters(), tokenizer, tmp_path, TOPIC)


def test_the_replies_determine_the_store(tokenizer, tmp_path):
    stores = [
        open_store("quickstart", Filters(), tokenizer, tmp_path, topic) for topic in (None, TOPIC, Topic(("No.",)))
    ]
    assert len({store.digest for store in stores}) == 3
    assert len({store.ledger.content for store in stores}) == 3
    assert open_store("quickstart", Filters(), tokenizer, tmp_path, TOPIC).digest == stores[1].digest
    assert stores[1].ledger.dropped["beside the path kept for the topic"] > 100
    assert stores[1].ledger.read == stores[0].ledger.read
