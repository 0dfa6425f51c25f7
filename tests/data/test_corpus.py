"""What is trained on and what is held out: whole conversations, each once, none in both."""

import json
from collections import Counter

import numpy as np
import pytest

from gpt2ft import quickstart
from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import DataError
from gpt2ft.errors import SettingsError
from gpt2ft.runs.describe import dropped, shares
from gpt2ft.settings.training import DataSettings


@pytest.fixture
def load(tokenizer, cache):
    return lambda seed=0, **settings: load_corpora(DataSettings(cache=str(cache), **settings), tokenizer, seed)


def ids(corpus):
    return [corpus.stores[store].id(row) for store, row in corpus.rows.tolist()]


def write(file, ids, question="Tea?", reply="Yes."):
    """A file of small conversations; an id alone does not make a conversation the same one."""
    with open(file, "w", encoding="utf-8") as lines:
        for id in ids:
            replies = [{"message_id": f"{id}-reply", "text": reply, "role": "assistant"}]
            prompt = {"message_id": id, "text": f"{question} {id}", "role": "prompter", "replies": replies}
            lines.write(json.dumps({"message_tree_id": id, "prompt": prompt}) + "\n")
    return str(file)


def test_everything_is_trained_on_by_default(load):
    corpus, held_out = load(train=("quickstart",))
    assert held_out is None
    assert corpus.rows.tolist() == [[0, row] for row in range(len(corpus.stores[0]))]
    assert corpus.conversations().tolist() == corpus.stores[0].conversations().tolist()
    assert not corpus.dropped
    assert corpus.identity() == {"quickstart": corpus.stores[0].digest, "conversations": 150}


def test_the_quickstarts_held_out_set_is_held_out(load):
    corpus, held_out = load(train=("quickstart",), eval=("quickstart:held_out",))
    assert len(held_out.rows) > 10
    assert not held_out.dropped
    assert not set(ids(corpus)) & set(ids(held_out))
    assert not corpus.dropped


class TestFraction:
    def test_whole_trees_none_in_both(self, load):
        whole, _ = load(train=("quickstart",))
        corpus, held_out = load(train=("quickstart",), eval_fraction=0.2)
        assert sorted(corpus.rows.tolist() + held_out.rows.tolist()) == whole.rows.tolist()
        assert len(set(ids(whole))) == len(whole.rows)
        assert 0.1 < len(held_out.rows) / len(whole.rows) < 0.3

    def test_the_same_in_every_run_and_file(self, load, tmp_path):
        _, held_out = load(train=("quickstart",), eval_fraction=0.2)
        _, again = load(train=("quickstart",), eval_fraction=0.2)
        assert np.array_equal(held_out.rows, again.rows)
        lines = quickstart.TREES.read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "other.jsonl").write_text("".join(lines[::-1][:100]), encoding="utf-8")
        train, some = load(train=(str(tmp_path / "other.jsonl"),), eval_fraction=0.2)
        assert set(ids(some)) == set(ids(held_out)) & {*ids(train), *ids(some)} != set()

    def test_a_larger_fraction_holds_out_more_and_the_same(self, load):
        fifth, half = (set(ids(load(train=("quickstart",), eval_fraction=share)[1])) for share in (0.2, 0.5))
        assert fifth < half

    def test_a_file_given_twice_is_still_split_by_conversation(self, load, tmp_path):
        corpus, held_out = load(train=("quickstart", str(quickstart.TREES)), eval_fraction=0.2)
        assert len(set(ids(corpus)) | set(ids(held_out))) == len(corpus.rows) + len(held_out.rows) == 150
        assert sum(corpus.dropped.values()) == 150

    def test_nothing_held_out_is_refused(self, load):
        with pytest.raises(SettingsError, match=r"`data\.eval_fraction` = 1e-06"):
            load(train=("quickstart",), eval_fraction=1e-6)

    def test_nothing_left_to_train_on_is_refused(self, load, tmp_path):
        with pytest.raises(DataError, match="held out"):
            load(train=(write(tmp_path / "a.jsonl", ["x"]),), eval_fraction=0.999)


class TestLimit:
    def test_the_same_conversations_in_every_order_of_files(self, load, tmp_path):
        files = [write(tmp_path / f"{name}.jsonl", [f"{name}{number}" for number in range(20)]) for name in "ab"]
        (_, one), (_, other) = (load(train=("quickstart",), eval=each, eval_limit=9) for each in (files, files[::-1]))
        assert set(ids(one)) == set(ids(other))
        assert len(one.rows) == 9
        assert {id[0] for id in ids(one)} == {"a", "b"}
        assert one.dropped == {"conversations over the limit": 31}
        assert one.identity()["conversations"] == 9

    def test_what_is_over_it_is_not_trained_on(self, load):
        whole, held_out = load(train=("quickstart",), eval_fraction=0.2)
        corpus, few = load(train=("quickstart",), eval_fraction=0.2, eval_limit=5)
        assert np.array_equal(corpus.rows, whole.rows)
        assert len(few.rows) == 5
        assert set(ids(few)) < set(ids(held_out))
        assert few.dropped == {"conversations over the limit": len(held_out.rows) - 5}

    def test_a_limit_that_is_not_reached_changes_nothing(self, load):
        _, held_out = load(train=("quickstart",), eval=("quickstart:held_out",))
        _, same = load(train=("quickstart",), eval=("quickstart:held_out",), eval_limit=1000)
        assert np.array_equal(same.rows, held_out.rows)
        assert same.identity() == held_out.identity()
        assert not same.dropped

    def test_prompts_of_one_conversation_stay_together(self, tokenizer, cache):
        settings = DataSettings(cache=str(cache), train=("quickstart",), eval_fraction=0.3, eval_limit=4)
        _, few = load_corpora(settings, tokenizer, kind=PREFERENCES)
        assert len(set(few.conversations().tolist())) == 4 < len(few.rows)
        assert list(few.dropped) == ["prompts over the limit"]


class TestOverlap:
    def test_a_held_out_conversation_is_dropped_from_training_and_counted(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b", "c", "d"])
        held = write(tmp_path / "held.jsonl", ["c", "e", "a"])
        corpus, held_out = load(train=(train,), eval=(held,))
        assert ids(corpus) == ["b", "d"]
        assert sorted(ids(held_out)) == ["a", "c", "e"]
        assert corpus.dropped == {"conversations met before or held out": 2}
        assert not held_out.dropped

    def test_the_same_file_for_both_leaves_nothing(self, load):
        with pytest.raises(DataError, match="held out"):
            load(train=("quickstart",), eval=(str(quickstart.TREES),))

    def test_the_same_file_twice_counts_once(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b"])
        held = write(tmp_path / "held.jsonl", ["e"])
        corpus, held_out = load(train=(train, train), eval=(held, held))
        assert corpus.rows.tolist() == [[0, 0], [0, 1]]
        assert corpus.dropped == {"conversations met before or held out": 2}
        assert held_out.rows.tolist() == [[0, 0]]
        assert held_out.dropped == {"conversations met before": 1}

    def test_another_conversation_under_the_same_id_stays(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b"])
        other = write(tmp_path / "other.jsonl", ["a"], question="Coffee?")
        corpus, _ = load(train=(train, other))
        assert ids(corpus) == ["a", "b", "a"]
        assert not corpus.dropped

    def test_the_same_tree_with_other_replies_is_the_same_conversation(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b"])
        held = write(tmp_path / "held.jsonl", ["b"], reply="No.")
        corpus, held_out = load(train=(train,), eval=(held,))
        assert ids(corpus) == ["a"]
        assert ids(held_out) == ["b"]

    def test_a_conversation_twice_in_one_file_counts_once(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b", "a", "c", "b", "a"])
        corpus, _ = load(train=(train,))
        assert ids(corpus) == ["a", "b", "c"]
        assert corpus.dropped == {"conversations met before": 3}

    def test_the_same_conversation_in_another_format_is_the_same(self, load, tmp_path):
        pairs = [{"prompt": "Tea?", "completion": "Yes."}, {"prompt": "Milk?", "completion": "No."}]
        chats = [{"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}]}]
        for name, records in (("pairs", pairs), ("chats", chats)):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        corpus, held_out = load(train=(str(tmp_path / "pairs.jsonl"),), eval=(str(tmp_path / "chats.jsonl"),))
        assert (len(corpus.rows), len(held_out.rows)) == (1, 1)
        assert corpus.dropped == {"conversations met before or held out": 1}


class TestFactors:
    @pytest.fixture
    def two(self, tmp_path):
        """Two sources of 20 and 31 conversations, 10 of them in both."""
        return (
            write(tmp_path / "one.jsonl", [f"t{number}" for number in range(20)]),
            write(tmp_path / "two.jsonl", [f"t{number}" for number in range(10, 41)]),
        )

    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            (("", ""), [20, 21]),
            (("@0.5", ""), [10, 21]),
            (("@1.5", "@2"), [30, 42]),
            (("@0.3", "@0.5"), [6, 10]),  # half of 21
            (("@1.0", "@3.25"), [20, 68]),
        ],
    )
    def test_each_source_is_there_as_often_as_its_mixing_weight_says(self, load, two, weights, expected):
        """Of what is left of it once what was met before is gone."""
        corpus, _ = load(train=tuple(map(str.__add__, two, weights)))
        assert np.bincount(corpus.rows[:, 0]).tolist() == expected
        assert corpus.dropped == {"conversations met before": 10}
        numbers = [float(weight.removeprefix("@") or 1) for weight in weights]
        assert corpus.mixing_weights == numbers
        for number, weight in enumerate(numbers):
            times = Counter(corpus.rows[corpus.rows[:, 0] == number, 1].tolist())
            assert set(times.values()) <= {int(weight), int(weight) + 1}
        named = {
            name + (f"@{weight:g}" if weight != 1 else ""): store.digest
            for name, weight, store in zip(two, numbers, corpus.stores, strict=True)
        }
        assert corpus.identity() == named | {"conversations": sum(expected)}

    def test_the_seed_decides_which(self, load, two):
        one, again, other = (ids(load(seed=seed, train=(f"{two[0]}@0.5",))[0]) for seed in (0, 0, 1))
        assert one == again
        assert sorted(one) != sorted(other)
        assert set(one) < set(ids(load(train=(f"{two[0]}@0.8",))[0]))

    def test_the_order_of_the_data_changes_nothing(self, load, two, tmp_path):
        backwards = write(tmp_path / "backwards.jsonl", [f"t{number}" for number in reversed(range(20))])
        one, other = (ids(load(train=(f"{name}@1.5",))[0]) for name in (two[0], backwards))
        assert sorted(one) == sorted(other)

    def test_what_is_held_out_does_not_depend_on_them(self, load, two):
        train = (two[0], f"{two[1]}@1.5")
        expected = ids(load(train=two, eval_fraction=0.3)[1])
        corpus, held_out = load(train=train, eval_fraction=0.3)
        assert ids(held_out) == expected
        assert held_out.mixing_weights == [1.0, 1.0]
        assert 5 < len(expected) < 30
        assert not set(ids(corpus)) & set(expected)
        of_first, of_second = (len({row for store, row in held_out.rows.tolist() if store == n}) for n in (0, 1))
        left = 21 - of_second
        assert abs(len(corpus.rows) - (20 - of_first) - 1.5 * left) <= 0.5

    def test_content_tells_what_is_used(self, load, two):
        contents = [
            load(seed=seed, train=train)[0].content()
            for seed, train in [
                (0, two), (1, two), (0, two[::-1]), (0, two[:1]), (0, (f"{two[0]}@0.5",)), (1, (f"{two[0]}@0.5",)),
            ]
        ]  # fmt: skip
        assert contents[0] == contents[1]
        assert len(set(contents[1:])) == len(contents) - 1

    def test_a_mixing_weight_that_leaves_nothing_is_refused(self, load, two):
        with pytest.raises(SettingsError, match=r"mixing weight 0\.01 .*one\.jsonl"):
            load(train=(f"{two[0]}@0.01", two[1]))

    def test_of_a_source_that_was_met_before_nothing_is_left_to_refuse(self, load, two):
        corpus, _ = load(train=(two[0], str(two[0]).replace("one.jsonl", "./one.jsonl") + "@0.5"))
        assert np.bincount(corpus.rows[:, 0]).tolist() == [20]


class TestPreferences:
    """A row is a prompt with its replies; several of one conversation are held out, or not, together."""

    @pytest.fixture
    def compare(self, tokenizer, cache):
        return lambda seed=0, **settings: load_corpora(
            DataSettings(cache=str(cache), **settings), tokenizer, seed, kind=PREFERENCES
        )

    def write(self, file, prompts, chosen="Yes.", rejected="No."):
        rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt in prompts]
        file.write_text("\n".join(map(json.dumps, rows)))
        return str(file)

    def prompts(self, corpus, tokenizer):
        trees = [corpus.stores[store].tree(row, 0) for store, row in corpus.rows.tolist()]
        return [tokenizer.decode(tree.tokens[1 : tree.lengths[0] - 1].tolist()) for tree in trees]

    def test_the_quickstarts_ranked_trees(self, compare):
        corpus, held_out = compare(train=("quickstart",), eval=("quickstart:held_out",))
        assert len(corpus.rows) == 263
        assert len(set(corpus.conversations().tolist())) == 150
        assert len(held_out.rows) > len(set(held_out.conversations().tolist())) > 10
        assert not set(corpus.conversations().tolist()) & set(held_out.conversations().tolist())
        assert not corpus.dropped
        assert not held_out.dropped

    def test_a_held_out_prompt_is_dropped_from_training_whatever_its_replies(self, compare, tokenizer, tmp_path):
        train = self.write(tmp_path / "train.jsonl", ["Tea?", "Rain?", "Milk?"])
        held = self.write(tmp_path / "held.jsonl", ["Rain?", "Sun?"], chosen="Perhaps.", rejected="Never.")
        corpus, held_out = compare(train=(train,), eval=(held,))
        assert self.prompts(corpus, tokenizer) == ["Tea?", "Milk?"]
        assert self.prompts(held_out, tokenizer) == ["Rain?", "Sun?"]
        assert corpus.dropped == {"prompts met before or held out": 1}

    def test_so_is_one_that_is_written_in_another_layout(self, compare, tokenizer, tmp_path):
        train = self.write(tmp_path / "train.jsonl", ["Tea?", "Rain?"])
        held = tmp_path / "held.jsonl"
        transcripts = {key: f"\n\nHuman: Rain?\n\nAssistant: {key}." for key in ("chosen", "rejected")}
        held.write_text(json.dumps(transcripts))
        corpus, _ = compare(train=(train,), eval=(str(held),))
        assert self.prompts(corpus, tokenizer) == ["Tea?"]

    def test_all_prompts_of_a_conversation_are_held_out_together(self, compare):
        corpus, held_out = compare(train=("quickstart",), eval_fraction=0.3)
        kept, held = (set(part.conversations().tolist()) for part in (corpus, held_out))
        assert not kept & held
        assert len(kept | held) == 150
        assert len(corpus.rows) + len(held_out.rows) == 263
        assert len(held_out.rows) > len(held) > 20

    def test_the_same_conversations_are_held_out_of_sft_and_of_preferences(self, compare, load):
        (_, of_sft), (_, of_preferences) = (read(train=("quickstart",), eval_fraction=0.3) for read in (load, compare))
        assert set(of_preferences.conversations().tolist()) <= set(of_sft.conversations().tolist())
        assert len(of_preferences.rows) > 20

    def test_other_replies_to_the_same_prompt_are_another_row(self, compare, tokenizer, tmp_path):
        first = self.write(tmp_path / "first.jsonl", ["Tea?", "Rain?", "Tea?"])
        other = self.write(tmp_path / "other.jsonl", ["Tea?"], chosen="Certainly.")
        backwards = self.write(tmp_path / "backwards.jsonl", ["Tea?"], chosen="No.", rejected="Yes.")
        corpus, _ = compare(train=(first, other, backwards, first))
        assert self.prompts(corpus, tokenizer) == ["Tea?", "Rain?", "Tea?", "Tea?"]
        assert corpus.dropped == {"prompts met before": 1 + 3}
        assert len(set(corpus.conversations().tolist())) == 2

    @pytest.mark.parametrize(("weight", "expected"), [("@0.5", 10), ("@1.5", 30), ("@2", 40)])
    def test_mixing_weights_are_of_prompts(self, compare, tokenizer, tmp_path, weight, expected):
        train = self.write(tmp_path / "train.jsonl", [f"Tea {number}?" for number in range(20)])
        corpus, _ = compare(train=(f"{train}{weight}",))
        times = Counter(self.prompts(corpus, tokenizer))
        assert times.total() == expected
        assert set(times.values()) <= {int(expected / 20), int(expected / 20) + 1}

    def test_nothing_to_compare_is_refused_by_what_was_dropped(self, compare, tmp_path):
        (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "Tea?", "completion": "Yes."}))
        with pytest.raises(DataError, match=r"chats\.jsonl .* no replies .* dropped: in no pair 1"):
            compare(train=(str(tmp_path / "chats.jsonl"),))
        with pytest.raises(DataError, match="held out"):
            compare(train=("quickstart",), eval=(str(quickstart.TREES),))

    def test_a_topic_answers_them(self, compare, tmp_path):
        corpus, held_out = compare(
            train=("quickstart",), eval=("quickstart:held_out",), topic_replies="quickstart:replies"
        )
        replies = sum(line.count('"role": "assistant"') > 0 for line in quickstart.TREES.read_text().splitlines())
        assert len(corpus.rows) >= replies == 150
        assert all((corpus.stores[0].ranks(row)[-2:] == [1, 0]).all() for _, row in corpus.rows.tolist())
        assert len(held_out.rows) > 10


def test_a_source_that_is_not_there_is_refused(load):
    with pytest.raises(DataError, match="quickstrat"):
        load(train=("quickstrat",))


def test_what_a_source_dropped_is_told_once(load):
    corpus, held_out = load(train=("quickstart",), eval_fraction=0.2)
    assert (corpus.has_own_sources, held_out.has_own_sources) == (True, False)
    plans = [
        Plan(chunk(part.stores, part.rows, ConversationTrees("once", 256, 512)), 512, 1, seed=0)
        for part in (corpus, held_out)
    ]
    told = [shares(part, plan) for part, plan in zip((corpus, held_out), plans, strict=True)]
    assert [share.messages_read for (share,) in told] == [1011, None]
    assert [share.conversations for (share,) in told] == [len(corpus.rows), len(held_out.rows)]
    assert not dropped(held_out, plans[1])
