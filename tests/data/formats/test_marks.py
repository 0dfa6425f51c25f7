"""A mark says whether a reply, or a whole record, is to be learnt and how much; one that is unclear is refused."""

import pytest
from facts import tells
from layouts import ASKED, LAYOUTS, MESSAGES, TOLD, every_layout, every_message, supervised

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.formats.turns import content_id
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.reading import ReadContext
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings

MARKS = [
    "learn", "loss", "loss_scale", "loss_weight", "sample_weight", "train", "train_on_turn", "trainable", "training",
    "weight",
]  # fmt: skip


UNCLEAR = [
    1.01, 2, -1, -0.1, 1e-7, 10**400, float("nan"), float("inf"), "false", "0", "0.5", "1", "yes", [0], [0.5], {"x": 1},
]  # fmt: skip


@every_message
@pytest.mark.parametrize("mark", MARKS)
def test_a_reply_that_is_not_to_be_learnt_is_context(layout, mark, read, error):
    make = MESSAGES[layout]
    for learnt in (True, 1, 1.0, None):
        assert supervised(read([make({mark: learnt})])[0]) == [["Yes."]]
    for left in (False, 0, 0.0):
        (tree,), _ = read([make({mark: left})])
        assert [message.text for message in tree.messages] == ["Tea?", "Yes."]
        assert supervised([tree]) == [[]]
    for weight in (0.5, 0.1, 1e-6, 0.999):
        (tree,), _ = read([make({mark: weight})])
        assert [message.weight for message in tree.messages] == [1, weight]
        assert supervised([tree]) == [["Yes."]]
    for unclear in UNCLEAR:
        assert tells(error([make({mark: unclear})]), f"test.jsonl:1: ... `{mark}`")


def test_marks_that_disagree_are_refused(read, error):
    assert tells(error([MESSAGES["messages"]({"loss": True, "weight": 0})]), "test.jsonl:1: ... `loss` and `weight`")
    assert supervised(read([MESSAGES["messages"]({"loss": False, "weight": 0.0})])[0]) == [[]]
    assert tells(error([MESSAGES["messages"]({"loss": True, "weight": 0.5})]), "test.jsonl:1: ... `loss` and `weight`")
    assert tells(error([LAYOUTS["text"] | {"train": 0.5, "weight": 0.4}]), "test.jsonl:1: ... `train` and `weight`")


@pytest.mark.parametrize("key", ["deleted", "review_result", *MARKS, "label", "kto_tag"])
def test_fields_of_a_table_in_text_are_no_marks_and_can_be_passed_over(key, read, error, tmp_path):
    file = tmp_path / "t.csv"
    for content in ("false", "0", "1"):
        file.write_text(f"prompt,completion,{key}\nTea?,Yes.,{content}\n")
        text = ", which is text" if key in MARKS else ""
        assert tells(error(file), f'{file}:2: `{key}` ... "{content}"{text} ... `data.ignore_keys`')
        assert supervised(read(file, ignore_keys=(key,))[0]) == [["Yes."]]
    file.write_text(f"prompt,completion,{key}\nTea?,Yes.,\n")
    assert supervised(read(file)[0]) == [["Yes."]]


def test_what_can_be_passed_over_is_said_of_messages_as_well(error):
    for key, content in {"deleted": "no", "review_result": 1, "rank": "0", "lang": 3, "weight": "1"}.items():
        assert tells(error([MESSAGES["tree"]({key: content})]), f"test.jsonl:1: `{key}` ... `data.ignore_keys`")


@pytest.mark.parametrize("mark", MARKS)
def test_a_user_turn_may_be_left_out_but_not_be_learnt(mark, read, error):
    for left in (0, False, None):
        assert supervised(read([{"messages": [ASKED | {mark: left}, TOLD]}])[0]) == [["Yes."]]
    for learnt in (1, 0.5):
        wrong = error([{"messages": [ASKED | {mark: learnt}, TOLD]}])
        assert tells(wrong, f"message 1 of `messages`: `{mark}` ... user")


def test_the_name_of_a_conversation_does_not_depend_on_its_marks(read):
    (tree,), _ = read([{"messages": [ASKED, TOLD | {"loss": False}, ASKED, TOLD]}])
    turns = [("user", "Tea?"), ("assistant", "Yes.")] * 2
    assert tree.id == content_id(turns)
    assert [message.weight for message in tree.messages] == [1, 0, 1, 1]


def test_weights_of_a_stored_conversation(write, tokenizer, tmp_path):
    """What follows the last reply to be learnt is dropped; rows that differ in their marks are two rows."""
    again = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    no = {"weight": 0}
    rows = [
        {"messages": [ASKED, TOLD | no, *again]},
        {"messages": [ASKED, TOLD, again[0], again[1] | no]},
        {"messages": [ASKED, TOLD | no]},
    ]
    store = open_store(str(write(tmp_path / "t.jsonl", rows)), FilterSettings(), tokenizer, tmp_path)
    assert [store.tree(row, 0).weights.tolist() for row in range(len(store))] == [[0, 0, 0, 1], [0, 1]]
    assert store.sizes()[1].tolist() == [store.tree(row, 0).num_supervised for row in range(len(store))]
    assert len(set(store.keys().tolist())) == 2
    assert store.statistics.dropped == {"marked as not to be learnt": 2, "no reply": 2}


@every_layout
@pytest.mark.parametrize("mark", [*MARKS, "label", "kto_tag"])
@pytest.mark.parametrize("file", ["t.jsonl", "t.parquet"])
def test_a_record_that_is_not_to_be_learnt_is_refused(kind, record, mark, file, read, error, drops, write, tmp_path):
    for learnt in (True, 1, None):
        assert len(read([record | {mark: learnt}], kind=kind)[0]) == 1
    is_class = mark == "label" and record == LAYOUTS["text"]
    is_weight = mark in MARKS and kind == CONVERSATIONS
    for bad in [False, 0, *([] if is_weight else [0.5]), *UNCLEAR]:
        if is_class and type(bad) is int:
            continue
        assert tells(error([record, record | {mark: bad}], kind=kind), f"test.jsonl:2: `{mark}`")
    rows = write(tmp_path / file, [record | {mark: good} for good in (True, False)])
    assert tells(error(rows, kind=kind), f"{rows}: ... `{mark}`" if file == "t.parquet" else f"{rows}:2: `{mark}`")
    assert drops(rows, kind=kind, on_error="skip") == {"marked as bad": 1}


def test_marks_in_a_prompt_that_is_not_learnt_say_nothing(read):
    prompt, no = [ASKED, TOLD, ASKED], TOLD | {"content": "No."}
    pair = {"chosen": [ASKED, TOLD | {"loss": False}, ASKED, TOLD], "rejected": [*prompt, no]}
    for record in (pair, pair | {"prompt": prompt}):
        (tree,), _ = read([record], kind=PREFERENCES)
        assert [message.text for message in tree.messages] == ["Tea?", "Yes.", "Tea?", "Yes.", "No."]


def test_a_reply_that_is_not_to_be_learnt_is_not_compared():
    replies = [Message("assistant", text, 0, rank, weight=float(rank > 0)) for rank, text in enumerate("abc")]
    tree = MessageTree("t", "test", (Message("user", "Tea?"), *replies))
    context = ReadContext("test", FilterSettings())
    assert PREFERENCES.rows(tree, None, context) == (tree, [[0, 2, 3]])
    assert +context.dropped == {"marked as not to be learnt": 1}
