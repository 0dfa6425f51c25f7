"""A key of a record is read, describes, is empty, or the record is refused: so it is for every layout."""

import pytest
from facts import tells
from layouts import ASKED, COMPARED, GPT, HUMAN, LAYOUTS, MESSAGES, PAIR, TOLD, every_layout, every_message, supervised

from gpt2ft.data.formats.keys import describes, is_empty

MEANS_SOMETHING = {
    "reasoning_content": "It is hot.", "reasoning": "Hot.", "thinking": "Hot.", "thought": ["x"],
    "history": [["a", "b"]],
    "tools": [{"name": "x"}], "functions": '[{"name": "x"}]', "documents": ["x"], "images": ["x.png"], "image": "x.png",
    "image_url": "https://x", "audio_path": "x.wav", "rejected_response": "Never.", "chat_template_kwargs": {"x": True},
    "is_bad": True, "rejected": True, "mask": [0, 1], "loss_mask": 1, "split": "test", "persona": "A pirate.",
    "Antwort": "Ja.", "思考": "热",
}  # fmt: skip


@every_layout
@pytest.mark.parametrize("key", MEANS_SOMETHING)
def test_a_record_with_more_than_its_layout_reads_is_refused(kind, record, key, read, error, drops):
    if key in record:
        pytest.skip("this layout reads it")
    more = record | {key: MEANS_SOMETHING[key]}
    assert tells(error([record, more], kind=kind), f"test.jsonl:2: `{key}` ... `data.ignore_keys`")
    assert drops([record, more], kind=kind, on_error="skip") == {"key that is not read": 1}
    assert len(read([more], kind=kind, ignore_keys=("other", key))[0]) == 1


@every_layout
@pytest.mark.parametrize("nothing", [None, "", " \n", [], {}, [[]], {"a": None, "b": [""]}, "[]", " {} "])
def test_an_empty_key_says_nothing(kind, record, nothing, read):
    (tree,), context = read([record | {"reasoning_content": nothing, "tools": nothing}], kind=kind)
    assert tree.messages == read([record], kind=kind)[0][0].messages
    assert not +context.dropped


@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet"])
def test_the_column_of_a_table_is_refused_where_it_holds_something(kind, error, drops, write, tmp_path):
    rows = [LAYOUTS["alpaca"] | {"rationale": text} for text in (None, "It is hot.")]
    file = write(tmp_path / kind, rows)
    assert tells(error(file), f"{file}: ... `rationale`" if kind == "t.parquet" else f"{file}:2: `rationale`")
    assert drops(file, on_error="skip") == {"key that is not read": 1}


@every_message
@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("reasoning_content", "Hot."), ("tool_calls", [{"id": "1"}]), ("function_call", {"name": "x"}), ("name", "x"),
        ("images", ["x"]), ("train_detail", [{"begin_offset": 0}]), ("masked", True), ("mask", 0),
        ("audio", {"id": "a"}), ("is_good", False), ("kto_tag", False), ("train_turn", False), ("loss_type", "none"),
    ],
)  # fmt: skip
def test_a_message_with_more_than_its_text_is_refused(layout, key, content, read, error):
    make = MESSAGES[layout]
    assert tells(error([make({key: content})]), f"test.jsonl:1: ... `{key}`")
    for nothing in (None, "", []):
        assert len(read([make({key: nothing})])[0]) == 1
    (tree,), _ = read([make({"created_at": "2023", "score": 1.0, "meta": {"a": 1}})])
    assert len(tree.messages) == 2


def test_messages_of_a_flat_tree_with_replies_inside_are_refused(error):
    rows = [{"message_id": "a", "role": "user", "text": "Tea?", "replies": [{"text": "Yes."}]}]
    assert tells(error(rows), "test.jsonl:1: `replies`")


def test_keys_are_ignored_in_messages_as_well(read):
    record = {"messages": [ASKED, TOLD | {"reasoning": "Hot."}], "note": "x"}
    assert len(read([record], ignore_keys=("reasoning", "note"))[0]) == 1


def test_keys_are_ignored_before_the_layout_is_told(read, write, tmp_path):
    rows = [COMPARED["pairs"] | {"prompt_id": "a", "messages": PAIR}]
    for file in ("t.jsonl", "t.parquet"):
        (tree,), _ = read(write(tmp_path / file, rows), ignore_keys=("chosen", "rejected"))
        assert supervised([tree]) == [["Yes."]]
    (tree,), _ = read([{"messages": [{"x": 1}], "conversations": [HUMAN, GPT]}], ignore_keys=("messages",))
    assert supervised([tree]) == [["Yes."]]


def test_all_keys_that_would_be_lost_are_named_at_once(error):
    more = {"tools": [{"name": "x"}], "score": 1, "persona": "A pirate.", "prompt": "Tea?", "mask": 1}
    assert tells(error([LAYOUTS["messages"] | more]), "test.jsonl:1: `tools` ... `persona`, `mask`")


@pytest.mark.parametrize("beside", ["Tea?", "TEA?", " tea? ", PAIR, [ASKED], [GPT]])
def test_what_repeats_a_turn_is_not_lost(beside, read, error):
    record = LAYOUTS["messages"] | {"prompt": beside}
    assert len(read([record])[0]) == 1
    assert tells(error([record | {"prompt": [HUMAN | {"value": "Why?"}]}]), "`prompt`")
    assert tells(error([record | {"prompt": "You are a pirate."}]), "`prompt`")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("id", True), ("prompt_id", True), ("promptId", True), ("PROMPT_ID", True), ("sha256", True),
        ("created_at", True), ("createdAt", True), ("fine-grained_score", True), ("rating_chosen", True),
        ("rejected-model", True),
        ("num_turns", True), ("n_tokens", True), ("score_2", True), ("__index_level_0__", True), ("Unnamed: 0", True),
        ("kto_tag", False), ("train_on_turn", False), ("loss_type", False), ("mask_source", False),
        ("chosen", False), ("rejected", False), ("num", False), ("id_card_text", False), ("loss", False),
        ("label", False), ("image_id", False),
        ("video_path", False), ("源", False), ("", False), ("3", False), ("valid", False),
    ],
)  # fmt: skip
def test_what_describes_is_told_by_the_last_word(key, expected):
    assert describes(key) is expected


def test_deep_emptiness():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert is_empty(deep)
    assert not any(map(is_empty, [0, False, [0], {"a": [None, 0.0]}, "x"]))
