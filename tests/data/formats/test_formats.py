"""Every layout, as it is published, gives its turns from every kind of file; what is malformed is named or counted."""

import pytest
from facts import tells

from gpt2ft.conversation import MessageTree
from gpt2ft.data.formats import columns_to_read, detect
from gpt2ft.data.formats.turns import content_id
from gpt2ft.data.reading import Malformed, Totals
from gpt2ft.data.sources import open_source
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings

BREW = "Warm the pot. Add a spoon for each cup."
STEPS = ("user", "How do I brew tea?"), ("assistant", BREW)
MORE = ("user", "And then?"), ("assistant", "Wait — three minutes.")
SYSTEM = ("system", "You are a tea master.")
ASKED = {"role": "user", "content": "How do I brew tea?"}
TOLD = {"role": "assistant", "content": BREW}


def messages(turns):
    return [{"content": text, "role": role} for role, text in turns]


def sharegpt(turns):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[role], "value": text} for role, text in turns]


def parts(text):
    """The text in two parts."""
    return [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:], "image_url": None}]


# (format, [(record as published, its turns), ...])
PUBLISHED = {
    "smoltalk": (
        "`messages` conversations",
        [
            ({"messages": messages([SYSTEM, *STEPS, *MORE]), "source": "smol-magpie-ultra"}, [SYSTEM, *STEPS, *MORE]),
            ({"messages": messages(STEPS), "source": "everyday-conversations"}, STEPS),
        ],
    ),
    "ultrachat": (
        "`messages` conversations",
        [
            ({"prompt": STEPS[0][1], "prompt_id": "f0e37e9f", "messages": messages([*STEPS, *MORE])}, [*STEPS, *MORE]),
            ({"prompt": STEPS[0][1], "prompt_id": "0d1cb4e1", "messages": messages(STEPS)}, STEPS),
        ],
    ),
    "openai": ("`messages` conversations", [({"messages": messages([SYSTEM, *STEPS])}, [SYSTEM, *STEPS])]),
    "sharegpt": (
        "ShareGPT `conversations`",
        [
            ({"id": "identity_0", "conversations": sharegpt([SYSTEM, *STEPS])}, [SYSTEM, *STEPS]),
            ({"id": "identity_1", "conversations": sharegpt([*STEPS, *MORE])}, [*STEPS, *MORE]),
        ],
    ),
    "sharegpt in OpenAI's words": (
        "ShareGPT `conversations`",
        [({"conversations": messages([SYSTEM, *STEPS])}, [SYSTEM, *STEPS])],
    ),
    "openai in ShareGPT's words": (
        "`messages` conversations",
        [({"messages": sharegpt([SYSTEM, *STEPS])}, [SYSTEM, *STEPS])],
    ),
    "text parts": (
        "`messages` conversations",
        [
            (
                {"messages": [{"role": role, "content": parts(text)} for role, text in [*STEPS, *MORE]]},
                [*STEPS, *MORE],
            ),
        ],
    ),
    "wildchat": (
        "`conversation` lists",
        [({"conversation_hash": "c9ec", "conversation": messages(STEPS), "turn": 1, "toxic": False}, STEPS)],
    ),
    "capybara": (
        "`conversation` lists",
        [
            (
                {
                    "source": "Less-General",
                    "conversation": [{"input": asked, "output": told} for (_, asked), (_, told) in (STEPS, MORE)],
                },
                [*STEPS, *MORE],
            ),
        ],
    ),
    "alpaca": (
        "Alpaca `instruction`/`input`/`output`",
        [
            (
                {"instruction": "How do I brew tea?", "input": "", "output": BREW, "text": "Below is an instruction"},
                STEPS,
            ),
            (
                {"instruction": "Name the tea.", "input": "It is green.", "output": "Sencha.", "text": "Below is an"},
                [("user", "Name the tea.\n\nIt is green."), ("assistant", "Sencha.")],
            ),
        ],
    ),
    "alpaca without input": (
        "Alpaca `instruction`/`input`/`output`",
        [({"instruction": "How do I brew tea?", "output": BREW}, STEPS)],
    ),
    "dolly": (
        "Dolly `instruction`/`context`/`response`",
        [
            (
                {
                    "instruction": "When is the harvest?",
                    "context": "First flush is picked in March.",
                    "response": "In March.",
                    "category": "closed_qa",
                },
                [("user", "When is the harvest?\n\nFirst flush is picked in March."), ("assistant", "In March.")],
            ),
            (
                {"instruction": STEPS[0][1], "context": "", "response": BREW, "category": "open_qa"},
                STEPS,
            ),
        ],
    ),
    "prompt and completion": (
        "`prompt`/`completion` pairs",
        [({"prompt": "How do I brew tea?", "completion": f" {BREW}"}, STEPS)],
    ),
    "prompt and completion as messages": (
        "`prompt`/`completion` pairs",
        [
            ({"prompt": [ASKED], "completion": [TOLD]}, STEPS),
            (
                {"prompt": messages([SYSTEM, *STEPS, MORE[0]]), "completion": messages(MORE[1:])},
                [SYSTEM, *STEPS, *MORE],
            ),
        ],
    ),
    "text": (
        "plain `text`",
        [({"text": "Tea is a drink.\n\nIt is hot.\n", "meta": 1}, [("text", "Tea is a drink.\n\nIt is hot.")])],
    ),
}
KINDS = ["t.jsonl", "T.JSONL", "t.jsonl.gz", "array.json", "lines.json", "t.parquet", "t.arrow", "folder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_rows_from_every_kind_of_file(layout, kind, read, write, tmp_path):
    name, rows = PUBLISHED[layout]
    records = [record for record, _ in rows]
    if kind == "folder":
        write(tmp_path / "folder" / "a.parquet", records)
        write(tmp_path / "folder" / "b.jsonl", records)
        (tmp_path / "folder" / "README.md").write_text("no data")
        (tmp_path / "folder" / ".hidden.jsonl").write_text("no data")
        rows = rows * 2
    else:
        write(tmp_path / kind, records)
    trees, context = read(tmp_path / kind)
    source = kind.partition(".")[0]
    assert trees == [MessageTree.from_turns(content_id(turns), source, turns) for _, turns in rows]
    assert not context.dropped
    assert context.totals == Totals(trees=len(rows), messages=sum(len(turns) for _, turns in rows))
    assert open_source(str(tmp_path / kind)).format.name == name


@pytest.mark.parametrize("layout", PUBLISHED)
def test_filters_that_a_layout_knows_nothing_of_drop_nothing(layout, read):
    records = [record for record, _ in PUBLISHED[layout][1]]
    trees, context = read(records, languages=("de",), max_rank=0)
    assert len(trees) == len(records)
    assert not context.dropped


@pytest.mark.parametrize("layout", PUBLISHED)
def test_the_statistics_say_what_a_file_was_taken_for(layout, write, tokenizer, tmp_path):
    name, rows = PUBLISHED[layout]
    file = write(tmp_path / "t.jsonl", [record for record, _ in rows])
    statistics = open_store(str(file), FilterSettings(), tokenizer, tmp_path).statistics
    assert (statistics.format, statistics.dropped) == (name, {})
    assert statistics.read == statistics.kept == sum(len(turns) for _, turns in rows)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("message_tree_id prompt", "OASST trees"),
        ("message_id text", "OASST messages"),
        ("role text", "OASST messages"),
        ("messages prompt completion", "`messages` conversations"),
        ("conversations text", "ShareGPT `conversations`"),
        ("prompt completion text", "`prompt`/`completion` pairs"),
        ("instruction input output text", "Alpaca `instruction`/`input`/`output`"),
        ("conversation prompt completion", "`conversation` lists"),
        ("instruction output response", "Alpaca `instruction`/`input`/`output`"),
        ("instruction response", "Dolly `instruction`/`context`/`response`"),
        ("text label", "plain `text`"),
    ],
)
def test_the_more_particular_format_is_detected(keys, name):
    assert detect(dict.fromkeys(keys.split())).name == name


@pytest.mark.parametrize(
    ("keys", "near"),
    [
        ("", "usual ones are `messages`, `prompt`"),
        ("number colour", "usual ones are `messages`, `prompt`"),
        ("prompt", "`prompt` with `completion`"),
        ("completion", "`prompt` with `completion`"),
        ("qustion anwser", "nearest are `question` with `answer`;"),
        ("mesages", "nearest are `messages`;"),
        ("Prompts Completions", "nearest are `prompt` with `completion`;"),
    ],
)
def test_a_record_of_no_format_is_told_its_keys_and_the_nearest(keys, near):
    with pytest.raises(Malformed) as raised:
        detect(dict.fromkeys(keys.split()))
    found = ", ".join(f'"{key}"' for key in keys.split()) or "no keys"
    assert tells(str(raised.value), f"holds {found}; ... {near} ... `data.columns`")
    assert raised.value.reason == "another layout"


def test_of_a_table_only_what_its_format_reads():
    assert columns_to_read(["text", "output", "meta", "instruction", "input"]) == ["output", "instruction", "input"]
    assert columns_to_read(["a", "b"]) == ["a", "b"]
    assert columns_to_read(["message_id", "text", "role", "labels", "detoxify", "note"]) == [
        "message_id", "text", "role", "note",
    ]  # fmt: skip
    assert columns_to_read(["messages", "prompt_id", "prompt", "system", "weight"]) == [
        "messages", "prompt", "system", "weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
        {"chosen": messages(STEPS), "rejected": messages(STEPS)},
        {"prompt": messages(STEPS[:1]), "chosen": messages(STEPS[1:]), "rejected": [], "score_chosen": 8.0},
    ],
)
@pytest.mark.parametrize("kind", ["t.jsonl", "t.parquet"])
def test_preferences_are_refused_by_name(record, kind, error, write, tmp_path):
    found = error(write(tmp_path / kind, [record] * 2), on_error="skip")
    assert tells(found, f"{tmp_path / kind}: ... {tmp_path / kind}:")
    assert "is a preference (`chosen` and `rejected`" in found


def test_real_preferences_are_refused_by_name(test_data, error):
    assert "is a preference" in error(test_data("prefs/ultrafeedback_eval200.jsonl"))


# --- malformed ------------------------------------------------------------------------------------------------------

HALF = "\ud83d"
FIRST, SECOND = "message 1 of `messages`:", "message 2 of `messages`:"
TURN = "message 1 of `conversations`:"
MALFORMED = {
    "openai": [
        ({"messages": None}, "`messages` ... null"),
        ({"messages": "Tea?"}, '`messages` ... "Tea?"'),
        ({"messages": {"role": "user"}}, "`messages` ... an object"),
        ({"messages": [ASKED, None]}, "`messages` ... null"),
        ({"messages": [[ASKED]]}, "`messages` ... a list"),
        ({"messages": [ASKED, {"role": "assistant"}]}, f"{SECOND} `content` ... missing"),
        ({"messages": [ASKED, TOLD | {"content": None}]}, f"{SECOND} `content` ... null"),
        ({"messages": [ASKED | {"content": [{"type": "text"}]}]}, f"{FIRST} `text` ... missing"),
        ({"messages": [ASKED | {"content": {"type": "text"}}]}, f"{FIRST} `content` ... an object"),
        ({"messages": [ASKED | {"content": ["Tea?"]}]}, f'{FIRST} `content` ... "Tea?"'),
        ({"messages": [ASKED | {"content": [{"type": "image_url"}]}]}, f'{FIRST} `content` ... "image_url"'),
        ({"messages": [{}]}, f"{FIRST} ... `role` and `content` ... `from` and `value` ... none"),
        ({"messages": [ASKED | {"from": "human", "value": "Tea?"}]}, f"{FIRST} `from` ... would be lost ... `value`"),
        ({"messages": [{"role": "user", "value": "Tea?", "text": "Tea."}]}, f"{FIRST} `text` ... would be lost"),
        ({"messages": [ASKED | {"content": float("nan")}]}, f"{FIRST} `content` ... NaN"),
        ({"messages": [ASKED | {"content": HALF}]}, f"{FIRST} `content` ... half of a surrogate"),
        ({"messages": [{"content": "Tea?"}]}, f"{FIRST} `role` ... missing"),
        ({"messages": [ASKED | {"role": 1}]}, f"{FIRST} `role` ... 1"),
        ({"messages": [ASKED, {"role": "tool", "content": "4"}]}, f"{SECOND} `role` ... prompter"),
        ({"text": "Tea?"}, '`messages` conversations ... "text"'),
        ({}, "`messages` conversations ... no keys"),
        ([ASKED], "JSON object"),
    ],
    "sharegpt": [
        ({"conversations": None}, "`conversations` ... null"),
        ({"conversations": [3]}, "`conversations` ... 3"),
        ({"conversations": [{"from": "human"}]}, f"{TURN} `value` ... missing"),
        ({"conversations": [{"from": "human", "value": None}]}, f"{TURN} `value` ... null"),
        ({"conversations": [{"value": "Tea?"}]}, f"{TURN} `from` ... missing"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, f"{TURN} `from` ... prompter"),
        ({"messages": [ASKED]}, 'ShareGPT `conversations` ... "messages"'),
    ],
    "alpaca": [
        ({"instruction": None, "output": "x"}, "`instruction` ... null"),
        ({"instruction": "x", "output": None}, "`output` ... null"),
        ({"instruction": "x", "input": 3, "output": "x"}, "`input` ... 3"),
        ({"instruction": "x", "input": ["x"], "output": "x"}, "`input` ... a list"),
        ({"instruction": HALF, "output": "x"}, "`instruction` ... half of a surrogate"),
        ({"instruction": "x"}, 'Alpaca `instruction`/`input`/`output` ... "instruction"'),
    ],
    "dolly": [
        ({"instruction": "x", "context": "", "response": False}, "`response` ... false"),
        ({"instruction": "x", "context": {}, "response": "x"}, "`context` ... an object"),
        ({"instruction": 1.5, "context": "", "response": "x"}, "`instruction` ... 1.5"),
        ({"instruction": "x", "output": "x"}, "Dolly"),
    ],
    "prompt and completion": [
        ({"prompt": None, "completion": "x"}, "`prompt` ... null"),
        ({"prompt": "x", "completion": [TOLD]}, "`completion` ... a list"),
        ({"prompt": [ASKED], "completion": "x"}, '`completion` ... "x"'),
        ({"prompt": [ASKED], "completion": [None]}, "`completion` ... null"),
        ({"prompt": [ASKED], "completion": [ASKED]}, "`completion` ... assistant"),
        ({"prompt": [TOLD | {"role": "x"}], "completion": [TOLD]}, "message 1 of `prompt`: `role`"),
        ({"prompt": {"role": "user"}, "completion": "x"}, "`prompt` ... an object"),
        ({"prompt": "x", "chosen": "x", "rejected": "y"}, "`prompt`/`completion` pairs"),
    ],
    "text": [
        ({"text": None}, "`text` ... null"),
        ({"text": ["a", "b"]}, "`text` ... a list"),
        ({"text": True}, "`text` ... true"),
        ({"content": "x"}, 'plain `text` ... "content"'),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "record", "facts"),
    [(layout, record, facts) for layout, cases in MALFORMED.items() for record, facts in cases],
)
def test_a_malformed_record_is_an_error_or_skipped_and_counted(layout, record, facts, read, error, write, tmp_path):
    (good, _), *_ = PUBLISHED[layout][1]
    expected = read(write(tmp_path / "t.jsonl", [good, good]))[0]
    for kind, place in (("lines.json", "lines.json:2"), ("array.json", "array.json: record 2")):
        file = write(tmp_path / kind, [good, record, good])
        assert tells(error(file), f"{tmp_path / place}: ... {facts}")
        trees, context = read(file, on_error="skip")
        assert [tree.messages for tree in trees] == [tree.messages for tree in expected]
        assert context.refused_records() == context.dropped.total() == 1
        assert context.totals.trees == 2


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        (None, "`messages` ... null"),
        ([ASKED, None], "`messages` ... null"),
        ([ASKED, TOLD | {"content": None}], f"{SECOND} `content` ... null"),
        ([{"role": None, "content": "x"}], f"{FIRST} `role` ... null"),
    ],
)
def test_nulls_in_a_table(messages, facts, error, drops, write, tmp_path):
    file = write(tmp_path / "t.parquet", [{"messages": [ASKED, TOLD]}, {"messages": messages}])
    assert tells(error(file), f"{file}: row 2: ... {facts}")
    assert drops(file, on_error="skip") == {"missing or wrong value": 1}
