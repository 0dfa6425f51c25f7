"""A key of a record is read, describes, is empty, or the record is refused: so it is for every layout."""

import pytest
from facts import tells

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.formats.keys import describes, is_empty
from gpt2ft.data.formats.turns import content_id
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.reading import ReadContext
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings

ASKED, TOLD = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}
HUMAN, GPT = {"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}
PAIR = [ASKED, TOLD]
LAYOUTS = {
    "messages": {"messages": PAIR},
    "conversations": {"conversations": [HUMAN, GPT]},
    "conversation": {"conversation": PAIR},
    "prompt and completion": {"prompt": "Tea?", "completion": "Yes."},
    "alpaca": {"instruction": "Tea?", "input": "", "output": "Yes."},
    "dolly": {"instruction": "Tea?", "context": "", "response": "Yes."},
    "text": {"text": "Tea? Yes."},
    "tree": {
        "message_tree_id": "a",
        "prompt": {
            "message_id": "a", "role": "prompter", "text": "Tea?",
            "replies": [{"message_id": "b", "role": "assistant", "text": "Yes.", "replies": []}],
        },
    },
}  # fmt: skip
COMPARED = {
    "pairs": {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
    "completions": {
        "instruction": "Tea?",
        "completions": [{"response": "Yes.", "overall_score": 8.0}, {"response": "No.", "overall_score": 2.0}],
    },
}
RECORDS = [(kind, record) for kind, of in ((CONVERSATIONS, LAYOUTS), (PREFERENCES, COMPARED)) for record in of.values()]
every_layout = pytest.mark.parametrize(("kind", "record"), RECORDS, ids=[*LAYOUTS, *COMPARED])

# --- as published ---------------------------------------------------------------------------------------------------

MODERATED = {"categories": {"hate": False}, "category_scores": {"hate": 0.1}, "flagged": False}
WEIGHED = [{"from": "system", "value": "Be brief.", "weight": None}, HUMAN | {"weight": 0.0}, GPT | {"weight": 1.0}]
OASST = {
    "user_id": "u", "created_date": "2023", "lang": "en", "review_count": 3, "review_result": True, "deleted": False,
    "rank": 0, "synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.1}, "tree_state": "ready_for_export",
    "emojis": {"name": ["+1"], "count": [2]}, "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
}  # fmt: skip
RATED = {"model": "a", "principle": "honesty", "custom_system_prompt": "Be honest.", "critique": "Good.",
         "fine-grained_score": 4.0, "annotations": {"honesty": {"Rating": "5", "Rationale": "It is."}}}  # fmt: skip
PUBLISHED = {
    "oasst": (
        CONVERSATIONS,
        OASST | {"message_id": "a", "parent_id": None, "message_tree_id": "a", "role": "prompter", "text": "x"},
    ),
    "oasst trees": (CONVERSATIONS, LAYOUTS["tree"] | {"tree_state": "ready_for_export", "origin": "web"}),
    "alpaca": (CONVERSATIONS, LAYOUTS["alpaca"] | {"text": "Below is an instruction."}),
    "dolly": (CONVERSATIONS, LAYOUTS["dolly"] | {"category": "open_qa"}),
    "open-platypus": (CONVERSATIONS, LAYOUTS["alpaca"] | {"data_source": "MATH/PRM-800K"}),
    "sharegpt": (CONVERSATIONS, LAYOUTS["conversations"] | {"id": "QWJhYvA_0"}),
    "slimorca": (CONVERSATIONS, {"conversations": WEIGHED}),
    "slimorca, twice": (
        CONVERSATIONS,
        {"conversations": WEIGHED, "messages": [{"role": "system", "content": "Be brief."}, *PAIR]},
    ),
    "openhermes": (
        CONVERSATIONS,
        LAYOUTS["conversations"] | {
            "custom_instruction": False, "topic": "tea", "model_name": None, "model": None, "category": "general",
            "skip_prompt_formatting": False, "views": 8.0, "language": None, "id": None, "title": "Tea", "idx": "1",
            "hash": [1, 2], "avatarUrl": "https://x", "system_prompt": None, "source": "airoboros2.2",
        },
    ),
    "agentinstruct": (CONVERSATIONS, {"id": "os_0", "conversations": [HUMAN | {"loss": None}, GPT | {"loss": True}]}),
    "ultrachat": (CONVERSATIONS, LAYOUTS["messages"] | {"prompt": " tea?\n", "prompt_id": "f0e3"}),
    "no_robots": (CONVERSATIONS, LAYOUTS["messages"] | {"prompt": "Tea?", "prompt_id": "f0e3", "category": "Chat"}),
    "smoltalk": (CONVERSATIONS, LAYOUTS["messages"] | {"source": "smol-magpie-ultra"}),
    "tulu 2": (CONVERSATIONS, LAYOUTS["messages"] | {"dataset": "flan_v2", "id": "flan_v2_1"}),
    "tulu 3": (CONVERSATIONS, LAYOUTS["messages"] | {"id": "a", "source": "ai2-adapt-dev/oasst1_converted"}),
    "lmsys": (
        CONVERSATIONS,
        {
            "conversation_id": "a", "model": "vicuna-13b", "conversation": PAIR, "turn": 1, "language": "English",
            "openai_moderation": [MODERATED], "redacted": False,
        },
    ),
    "wildchat": (
        CONVERSATIONS,
        {
            "conversation_hash": "a", "model": "gpt-4", "timestamp": "2023", "turn": 1, "language": "English",
            "conversation": [
                message | {
                    "country": "Canada", "hashed_ip": "a", "header": {"accept-language": "en", "user-agent": "x"},
                    "language": "English", "redacted": False, "state": "Alberta", "timestamp": None, "toxic": False,
                    "turn_identifier": 1, "openai_id": "a", "created": 1, "temperature": 1.0, "usage": {"tokens": 1},
                    "token_counter": 1, "system_fingerprint": None,
                }
                for message in PAIR
            ],
            "openai_moderation": [MODERATED], "detoxify_moderation": [{"toxicity": 0.1}], "toxic": False,
            "redacted": False, "state": "Alberta", "country": "Canada", "hashed_ip": "a", "header": {"user-agent": "x"},
        },
    ),
    "openai": (CONVERSATIONS, LAYOUTS["messages"] | {"parallel_tool_calls": False, "tools": "[]"}),
    "written by pandas": (CONVERSATIONS, LAYOUTS["alpaca"] | {"__index_level_0__": 3, "Unnamed: 0": 3}),
    "imdb": (CONVERSATIONS, LAYOUTS["text"] | {"label": 0}),
    "capybara": (CONVERSATIONS, {"source": "x", "conversation": [{"input": "Tea?", "output": "Yes."}]}),
    "wikipedia": (CONVERSATIONS, LAYOUTS["text"] | {"id": "1", "url": "https://x", "title": "Tea"}),
    "fineweb": (
        CONVERSATIONS,
        LAYOUTS["text"] | {
            "id": "a", "dump": "CC", "url": "x", "date": "2023", "file_path": "s3", "language": "en",
            "language_score": 0.9, "token_count": 4,
        },
    ),
    "hh-rlhf": (
        PREFERENCES,
        {"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."},
    ),
    "ultrafeedback": (
        PREFERENCES,
        {
            "source": "flan", "models": ["a", "b"], "correct_answers": ["None"], "incorrect_answers": ["None"],
            "instruction": "Tea?", "completions": [each | RATED for each in COMPARED["completions"]["completions"]],
        },
    ),
    "ultrafeedback, binarised": (
        PREFERENCES,
        {
            "prompt": "Tea?", "prompt_id": "a", "messages": PAIR, "chosen": PAIR, "score_chosen": 8.0,
            "rejected": [ASKED, TOLD | {"content": "No."}], "score_rejected": 2.0,
        },
    ),
    "ultrafeedback, cleaned": (
        PREFERENCES,
        COMPARED["pairs"] | {
            "source": "flan", "chosen-rating": 5.0, "chosen-model": "a", "rejected-rating": 1.0, "rejected-model": "b",
        },
    ),
    "orca_dpo_pairs": (PREFERENCES, {"system": "", "question": "Tea?", "chosen": "Yes.", "rejected": "No."}),
    "tulu 3 preferences": (
        PREFERENCES,
        {"id": "a", "source": "x", "prompt": "Tea?", "chosen": PAIR, "rejected": [ASKED, TOLD | {"content": "No."}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("file", ["t.jsonl", "t.parquet"])
def test_data_sets_are_read_as_they_are_published(name, file, read, write, tmp_path):
    kind, record = PUBLISHED[name]
    trees, context = read(write(tmp_path / file, [record]), kind=kind)
    assert trees or name == "oasst"  # a message alone
    assert set(+context.dropped) <= {"no reply"}


# --- what would be lost ---------------------------------------------------------------------------------------------

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


MESSAGES = {
    "messages": lambda extra: {"messages": [ASKED, TOLD | extra]},
    "conversations": lambda extra: {"conversations": [HUMAN, GPT | extra]},
    "conversation": lambda extra: {"conversation": [{"input": "Tea?", "output": "Yes."} | extra]},
    "prompt and completion": lambda extra: {"prompt": [ASKED], "completion": [TOLD | extra]},
    "tree": lambda extra: {
        "message_tree_id": "a",
        "prompt": {
            "message_id": "a", "role": "prompter", "text": "Tea?",
            "replies": [{"message_id": "b", "role": "assistant", "text": "Yes."} | extra],
        },
    },
}  # fmt: skip
every_message = pytest.mark.parametrize("layout", MESSAGES)


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


# --- marks ----------------------------------------------------------------------------------------------------------

MARKS = [
    "learn", "loss", "loss_scale", "loss_weight", "sample_weight", "train", "train_on_turn", "trainable", "training",
    "weight",
]  # fmt: skip


UNCLEAR = [
    1.01, 2, -1, -0.1, 1e-7, 10**400, float("nan"), float("inf"), "false", "0", "0.5", "1", "yes", [0], [0.5], {"x": 1},
]  # fmt: skip


def supervised(trees):
    return [[message.text for message in tree.messages if message.is_supervised] for tree in trees]


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


# --- spellings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "user") for name in ("user", "human", "prompter", "User", "HUMAN")),
        *(
            (name, "assistant")
            for name in ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "Assistant")
        ),
        *((name, "system") for name in ("system", "developer", "System")),
    ],
)
@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_spellings_of_roles(name, role, layout, read):
    spoken = {"system": {"from": "system", "value": "Be brief."}, "user": HUMAN, "assistant": GPT}
    turns = [turn | {"from": name} if known == role else turn for known, turn in spoken.items()]
    (tree,), _ = read([{layout: turns}])
    assert [message.role for message in tree.messages] == ["system", "user", "assistant"]
