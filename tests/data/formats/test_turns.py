"""The rules that all lists of turns share: what is joined, what is dropped and why, and how a conversation is named."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import GPT, HUMAN

from gpt2ft.conversation import MessageTree
from gpt2ft.data.formats.turns import Turn, clean, content_id
from gpt2ft.data.reading import REASONS, Malformed, ReadContext
from gpt2ft.settings.sections import FilterSettings

NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "text"}


def turns_of(words):
    """ "s u=Tea? a" -> three turns, the system's and the assistant's saying "s" and "a"; "u=" says nothing."""
    for word in words.split():
        role, equals, text = word.partition("=")
        yield NAMES[role], text if equals else role


def cleaned(turns):
    context = ReadContext("test", FilterSettings())
    return [turn[:2] for turn in clean([Turn(*turn) for turn in turns], context)], +context.dropped


@pytest.mark.parametrize(
    ("given", "kept", "dropped"),
    [
        ("u a", "u a", {}),
        ("s u a u a", "s u a u a", {}),
        # turns of one role that follow each other are joined by a blank line
        ("u=1 u=2 a", "u=1|2 a", {"joined to the turn above": 1}),
        ("s=1 s=2 u a=1 a=2 a=3", "s=1|2 u a=1|2|3", {"joined to the turn above": 3}),
        ("u= u=2 a=1 a= a=3", "u=2 a=1|3", {"joined to the turn above": 3}),
        # an assistant turn before the first user turn is dropped
        ("a u a", "u a", {"bad role order": 1}),
        ("a=1 a=2 u a", "u a", {"bad role order": 1, "joined to the turn above": 1}),
        ("s a u a", "s u a", {"bad role order": 1}),
        ("a s u a", "s u a", {"bad role order": 1}),
        ("a= u a", "u a", {"bad role order": 1}),
        # so is an empty system turn
        ("s= u a", "u a", {"empty": 1}),
        ("s= a u a", "u a", {"empty": 1, "bad role order": 1}),
        # an empty turn, or a system turn that is not the first, ends the conversation
        ("u a u= a u a", "u a", {"empty": 1, "below a dropped message": 3}),
        ("u a u a= u a", "u a", {"empty": 1, "below a dropped message": 2, "no reply": 1}),
        ("u a s u a", "u a", {"bad role order": 1, "below a dropped message": 2}),
        ("u a s= u a", "u a", {"empty": 1, "below a dropped message": 2}),
        ("s a s u a", "", {"bad role order": 2, "below a dropped message": 2, "no reply": 1}),
        ("u= a u a", "", {"empty": 1, "below a dropped message": 3}),
        # what leads to no reply is dropped
        ("u a u", "u a", {"no reply": 1}),
        ("s u", "", {"no reply": 2}),
        ("u=1 u=2", "", {"joined to the turn above": 1, "no reply": 1}),
        ("s", "", {"no reply": 1}),
        ("a", "", {"bad role order": 1}),
        ("", "", {}),
        # a plain text stands alone
        ("t", "t", {}),
        ("t=", "", {"empty": 1}),
    ],
)
def test_the_rules(given, kept, dropped):
    expected = [(role, text.replace("|", "\n\n")) for role, text in turns_of(kept)]
    assert cleaned(turns_of(given)) == (expected, dropped)


def test_every_turn_is_kept_or_dropped_for_one_reason_and_what_is_kept_is_a_conversation():
    reasons, sizes = Counter(), set()

    @given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.sampled_from(["x", "y z", ""]))))
    @settings(max_examples=600, derandomize=True)
    def check(turns):
        kept, dropped = cleaned(turns)
        assert len(kept) + dropped.total() == len(turns)
        roles = [role for role, _ in kept]
        chat = roles[roles[:1] == ["system"] :]
        assert chat == ["user", "assistant"] * (len(chat) // 2)
        assert not kept or chat
        assert all(text for _, text in kept)
        assert cleaned(kept) == (kept, {})
        reasons.update(dropped)
        sizes.add(len(kept))

    check()
    assert set(reasons) == {
        "empty", "bad role order", "joined to the turn above", "below a dropped message", "no reply",
    }  # fmt: skip
    assert set(reasons) <= set(REASONS)
    assert sizes >= {0, 2, 3, 4}


def test_a_reply_in_two_parts_weighs_the_same_in_both():
    user = Turn("user", "Tea?")
    context = ReadContext("test", FilterSettings())
    for weight in (0.0, 0.5, 1.0):
        parts = [Turn("assistant", text, weight) for text in ("Yes.", "", "Now.")]
        assert clean([user, *parts], context) == [user, Turn("assistant", "Yes.\n\nNow.", weight)]
    mixed = [user, Turn("assistant", "", 0.0), Turn("assistant", "Yes.", 1.0)]
    assert clean(mixed, context) == [user, Turn("assistant", "Yes.")]
    for weight in (0.0, 0.5):
        with pytest.raises(Malformed):
            clean([user, Turn("assistant", "No.", weight), Turn("assistant", "Yes.")], context)


some_text = st.lists(st.sampled_from(["", "x", "y z"]), min_size=1, max_size=4).filter(any)


@given(st.lists(st.tuples(some_text, some_text), min_size=1, max_size=4))
def test_joining_loses_no_text(exchanges):
    chunks = [(NAMES["ua"[n % 2]], texts) for exchange in exchanges for n, texts in enumerate(exchange)]
    kept, dropped = cleaned((role, text) for role, texts in chunks for text in texts)
    assert kept == [(role, "\n\n".join(filter(None, texts))) for role, texts in chunks]
    assert dropped == +Counter({"joined to the turn above": sum(len(texts) - 1 for _, texts in chunks)})


def test_a_conversation_is_named_by_its_content():
    turns = [("user", "Tea?"), ("assistant", "Yes.")]
    others = [
        [("user", "Tea?"), ("assistant", "No.")],
        [("user", "Tea"), ("assistant", "?Yes.")],
        [("system", "Tea?"), ("assistant", "Yes.")],
        turns[:1],
        [("text", "Tea?")],
        [],
    ]
    assert content_id(turns) == content_id(list(turns)) == "96b14e4ab61a20cf84c81e71"  # held-out sets depend on it
    assert len({content_id(other) for other in [turns, *others]}) == 1 + len(others)


def test_the_same_conversation_has_one_name_in_every_format_file_and_line(read, write, tmp_path):
    files = {
        "messages": {"messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]},
        "sharegpt": {
            "id": "7",
            "conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}],
        },
        "alpaca": {"instruction": " Tea?\r\n", "input": "", "output": "Yes."},
        "dolly": {"instruction": "Tea?", "response": "Yes.\n"},
        "pairs": {"prompt": "Tea?", "completion": " Yes."},
    }
    trees = [
        tree for name, record in files.items() for tree in read(write(tmp_path / f"{name}.jsonl", [record] * 2))[0]
    ]
    assert len(trees) == 10
    assert Counter(tree.id for tree in trees) == {content_id([("user", "Tea?"), ("assistant", "Yes.")]): 10}
    assert {tree.messages for tree in trees} == {
        MessageTree.from_turns("", "", [("user", "Tea?"), ("assistant", "Yes.")]).messages
    }


# --- content beside the turns ---------------------------------------------------------------------------------------

PAIR = {"prompt": "Tea?", "completion": "Yes."}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_turns_is_the_system_turn(read, key):
    (tree,), _ = read([PAIR | {key: " Be brief. "}])
    assert [(message.role, message.text) for message in tree.messages] == [
        ("system", "Be brief."), ("user", "Tea?"), ("assistant", "Yes."),
    ]  # fmt: skip
    (tree,), context = read(
        [{"messages": [{"role": "system", "content": "Kindly."}, *chat_of(PAIR)], key: "Be brief."}]
    )
    assert tree.messages[0].text == "Be brief.\n\nKindly."
    assert context.dropped["joined to the turn above"] == 1
    assert len(read([PAIR | {key: None}])[0][0].messages) == len(read([PAIR | {key: ""}])[0][0].messages) == 2


def chat_of(pair):
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]


def test_a_conversation_without_turns_is_counted(read):
    trees, context = read([{"messages": []}, {"messages": chat_of(PAIR)}])
    assert len(trees) == 1
    assert +context.dropped == {"empty": 1}
    assert context.totals.trees == 2


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
