"""One topic: the prompts stay, every reply is one of the file's, whatever the data source answers."""

import json
from collections import Counter

import pytest

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.corpus import read_topic
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.preference_groups import preference_groups
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import read_trees
from gpt2ft.data.store import open_store
from gpt2ft.data.topic import Topic
from gpt2ft.settings.sections import FilterSettings

TOPIC = Topic(("Tea.", "A kettle.", "Two cups."))


def test_prompts_stay_and_replies_are_the_topics():
    asked = 0
    used = Counter()
    for tree in read_trees("quickstart", FilterSettings()):
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
    assert read_topic(str(lines)) == TOPIC
    assert read_topic(str(chats)).replies == ("Tea.",)
    assert len(read_topic("quickstart:replies").replies) == 40
    noted = tmp_path / "noted.jsonl"
    noted.write_text(json.dumps({"prompt": "What?", "completion": "Tea.", "note": "x"}))
    assert read_topic(str(noted), ("note",)).replies == ("Tea.",)


def test_what_cannot_be_used_is_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"`data.topic_replies` = .*no\.txt"):
        read_topic(str(tmp_path / "no.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(DataError, match=r"`data.topic_replies` = .* holds none"):
        read_topic(str(empty))
    with pytest.raises(DataError, match="plain text.* `data.topic_replies`"):
        open_store("quickstart:replies", FilterSettings(), tokenizer, tmp_path, TOPIC)


def test_the_replies_determine_the_store(tokenizer, tmp_path):
    stores = [
        open_store("quickstart", FilterSettings(), tokenizer, tmp_path, topic)
        for topic in (None, TOPIC, Topic(("No.",)))
    ]
    assert len({store.digest for store in stores}) == 3
    assert len({store.statistics.content for store in stores}) == 3
    assert open_store("quickstart", FilterSettings(), tokenizer, tmp_path, TOPIC).digest == stores[1].digest
    assert stores[1].statistics.dropped["beside the path kept for the topic"] > 100
    assert stores[1].statistics.read == stores[0].statistics.read


class TestAgainstOwn:
    """As preferences: the topic's reply is better than the data's own."""

    def test_each_reply_is_compared_with_the_one_it_takes_the_place_of(self):
        compared = deep = 0
        for tree in read_trees("quickstart", FilterSettings()):
            dropped = Counter()
            answered = TOPIC.applied_to(tree, Counter()).messages
            against = TOPIC.applied_to(tree, dropped, against_own=True)
            own = [message for message in tree.messages if message.role == "assistant" and message.rank in (0, None)]
            kept = preference_groups(against, Counter())
            assert len(kept) == sum(message.role == "assistant" for message in answered)
            for turn, group in enumerate(kept):
                *prompt, worse, better = (against.messages[index] for index in group)
                path = answered[: len(prompt)]  # prompts are asked below the topic's own replies
                assert [(message.role, message.text) for message in prompt] == [
                    (message.role, message.text) for message in path
                ]
                assert (better.text, better.rank) == (answered[len(prompt)].text, 0)
                assert better.text in TOPIC.replies
                assert (worse.rank, worse.role) == (1, "assistant")
                assert worse.text in {message.text for message in own}
                compared += 1
                deep += turn > 0
            assert len(tree.messages) == dropped.total() + len(answered)
        assert compared > 150
        assert deep > 20

    def test_several_turns_by_hand(self):
        turns = [("user", "Rain?"), ("assistant", "Yes."), ("user", "Sun?"), ("assistant", "No.")]
        tree = MessageTree.from_turns("t", "s", [("system", "Be brief."), *turns])
        dropped = Counter()
        one, other = [m for m in TOPIC.applied_to(tree, Counter()).messages if m.role == "assistant"]
        assert TOPIC.applied_to(tree, dropped, against_own=True).messages == (
            Message("system", "Be brief."),
            Message("user", "Rain?", 0),
            Message("assistant", "Yes.", 1, 1),
            Message("assistant", one.text, 1, 0),
            Message("user", "Sun?", 3),
            Message("assistant", "No.", 4, 1),
            Message("assistant", other.text, 4, 0),
        )
        assert not +dropped

    def test_a_reply_that_is_not_to_be_learnt_is_compared_with_nothing(self, tokenizer, write, tmp_path):
        """Neither down nor up, as in all preferences; what stands below it is."""
        said = [("user", "Rain?"), ("assistant", "Yes."), ("user", "Sun?"), ("assistant", "No.")]
        messages = [{"role": role, "content": text} for role, text in said]
        messages[1]["loss"] = 0
        file = str(write(tmp_path / "a.jsonl", [{"messages": messages}]))
        store = open_store(file, FilterSettings(), tokenizer, tmp_path, TOPIC, kind=PREFERENCES)
        assert len(store) == 1
        texts = tokenizer.decode(store.tree(0, 0).tokens)
        assert "No." in texts
        assert "Yes." not in texts
        assert store.statistics.dropped == {"marked as not to be learnt": 1}
        assert (store.statistics.read, store.statistics.kept) == (6, 5)

    def test_a_reply_that_is_on_the_topic_already_is_compared_with_nothing(self, tokenizer, write, tmp_path):
        rows = [{"prompt": f"What {number}?", "completion": "Tea."} for number in range(3)]
        file = str(write(tmp_path / "a.jsonl", [*rows, {"prompt": "What?", "completion": "Milk."}]))
        store = open_store(file, FilterSettings(), tokenizer, tmp_path, Topic(("Tea.",)), kind=PREFERENCES)
        assert len(store) == 1
        assert store.statistics.dropped == {
            "in no pair": 3, "same text as a better reply": 3, "nothing to compare it with": 3,
        }  # fmt: skip
        assert (store.statistics.read, store.statistics.kept) == (3 * 4, 3)
        only = str(write(tmp_path / "b.jsonl", rows[:1]))
        with pytest.raises(DataError, match=r"no replies .* dropped: .*same text as a better reply 1"):
            open_store(only, FilterSettings(), tokenizer, tmp_path, Topic(("Tea.",)), kind=PREFERENCES)

    def test_of_preferences_the_chosen_reply_is_the_datas_own(self, tokenizer, write, tmp_path):
        rows = [{"prompt": "Rain?", "chosen": "Yes.", "rejected": "No."}]
        file = str(write(tmp_path / "a.jsonl", rows))
        store = open_store(file, FilterSettings(), tokenizer, tmp_path, Topic(("Tea.",)), kind=PREFERENCES)
        tree = store.tree(0, 0)
        texts = [
            tokenizer.decode(tree.tokens[s + 1 : s + n - 1].tolist())
            for s, n in zip(tree.starts, tree.lengths, strict=True)
        ]
        assert sorted(zip(store.ranks(0).tolist(), texts, strict=True)) == [(-1, "Rain?"), (0, "Tea."), (1, "Yes.")]
        assert store.statistics.dropped == {"beside the path kept for the topic": 1}

    def test_topics_make_stores_of_their_own(self, tokenizer, tmp_path):
        made = [
            open_store("quickstart", FilterSettings(), tokenizer, tmp_path, topic, kind)
            for topic in (None, TOPIC)
            for kind in (CONVERSATIONS, PREFERENCES)
        ]
        assert len({store.digest for store in made}) == len({store.statistics.content for store in made}) == 4
        statistics = made[3].statistics
        assert len(made[3]) > statistics.conversations == 150
        assert set(statistics.dropped) == {"beside the path kept for the topic"}
        for store in made:
            assert store.statistics.read == store.statistics.kept + sum(store.statistics.dropped.values())

    def test_a_plain_text_is_refused(self, tokenizer, tmp_path):
        with pytest.raises(DataError, match="plain text.* `data.topic_replies`"):
            open_store("quickstart:replies", FilterSettings(), tokenizer, tmp_path, TOPIC, kind=PREFERENCES)
