"""Prompts, replies, lists of messages and their keys are read by all the names that they go by."""

import pytest
from facts import tells

from gpt2ft.data.formats import CONVERSATION_FORMATS, detect
from gpt2ft.data.formats.column_names import CONTEXTS, CONVERSATIONS, PROMPTS, REPLIES, ROLES, TEXTS
from gpt2ft.data.formats.messages import transcript
from gpt2ft.data.kinds import PREFERENCES

ASKED, TOLD = ("user", "Tea?"), ("assistant", "Yes.")


def turns(trees):
    return [[(message.role, message.text) for message in tree.messages] for tree in trees]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("reply", REPLIES)
def test_any_prompt_with_any_reply(prompt, reply, read):
    record = {prompt: "Tea?", reply: "Yes.", "id": 3}
    assert turns(read([record])[0]) == [[ASKED, TOLD]]
    assert turns(read([{"conversation": [record]}])[0]) == [[ASKED, TOLD]]


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "instruction"])
def test_what_goes_on_with_a_prompt(prompt, read, error):
    for context in CONTEXTS:
        assert turns(read([{prompt: "Name it.", context: "It is green.", "answer": "Sencha."}])[0]) == [
            [("user", "Name it.\n\nIt is green."), ("assistant", "Sencha.")]
        ]
    listed = {prompt: [{"role": "user", "content": "Tea?"}], "answer": [{"role": "assistant", "content": "Yes."}]}
    assert tells(error([listed | {"context": "It is green."}]), "`context` ... would be lost")


@pytest.mark.parametrize(
    "beside",
    [{"answer": "No."}, {"question": "Coffee?"}, {"options": ["Yes", "No"]}, {"explanation": "Hot."}, {"user": "Ann"}],
)
def test_a_second_prompt_or_reply_is_refused_and_not_dropped(beside, error, read):
    record = {"prompt": "Tea?", "completion": "Yes."}
    assert tells(error([record | beside]), f"`{next(iter(beside))}` ... would be lost")
    assert len(read([record | {"question": "tea?", "answer": "Yes."}])[0]) == 1  # which repeats


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_any_name_of_a_conversation(name, read, error):
    messages = [{"role": role, "content": text} for role, text in (ASKED, TOLD)]
    for said in (messages, ["Tea?", "Yes."], "User: Tea?\nAssistant: Yes."):
        assert turns(read([{name: said, "id": 3}])[0]) == [[ASKED, TOLD]]
    for wrong in (["Tea?", None], [3], "Tea?", {"role": "user"}, ["\ud83d"]):
        assert tells(error([{name: said}, {name: wrong}]), f"test.jsonl:2: `{name}`")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("text", TEXTS)
def test_any_names_of_role_and_text(role, text, read):
    record = {"messages": [{role: "human", text: "Tea?"}, {role: "bing", text: "Yes.", "id": 3, "weight": 1}]}
    assert turns(read([record])[0]) == [[ASKED, TOLD]]


def test_a_turn_and_its_reply_with_a_system_text(read, error):
    exchange = {"system": "Be brief.", "input": "Tea?", "output": "Yes."}
    assert turns(read([{"conversation": [exchange]}])[0]) == [[("system", "Be brief."), ASKED, TOLD]]
    assert tells(
        error([{"conversation": [exchange | {"persona": "A pirate."}]}]), "message 1 of `conversation`: `persona`"
    )
    assert tells(error([{"conversation": [{"input": "Tea?"}]}]), "`output` ... missing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Human: Tea?\n\nAssistant: Yes.", [ASKED, TOLD]),
        ("\n\nHuman: Tea?\n\nAssistant: Yes.", [ASKED, TOLD]),
        ("### Human: Tea?### Assistant: Yes.", [ASKED, TOLD]),
        ("System: Be brief.\nUSER : Tea?\nASSISTANT : Yes.", [("system", "Be brief."), ASKED, TOLD]),
        ("User: Tea?\nBot: Yes.\nmodel: X\nuser: y", [ASKED, ("assistant", "Yes.\nmodel: X\nuser: y")]),
        ("User: Tea?\nMilk?\nAI: Yes.\nUser: Tea?\nAI: Yes.", [("user", "Tea?\nMilk?"), TOLD, ASKED, TOLD]),
        ("Tea.\nUser: Tea?\nAssistant: Yes.", []),
        ("User: Tea?", []),
        ("Assistants: Yes.\nUsers: Tea?", []),
        ("", []),
    ],
)
def test_transcripts(text, expected):
    assert [(role, said) for role, said, _ in transcript(text)] == expected


def test_names_are_told_without_capitals(read, error):
    assert turns(read([{"Question": "Tea?", " ANSWER ": "Yes.", "Id": 3}])[0]) == [[ASKED, TOLD]]
    assert tells(error([{"Question": "Tea?", "question": "Coffee?", "answer": "Yes."}]), "`Question` ... would be lost")


def test_the_instances_of_an_instruction_are_conversations(read, error, drops):
    record = {
        "id": "seed_task_0", "name": "breakfast", "instruction": "Name it.", "is_classification": False,
        "instances": [{"input": "It is green.", "output": "Sencha."}, {"input": "", "output": "Tea."}],
    }  # fmt: skip
    assert turns(read([record])[0]) == [
        [("user", "Name it.\n\nIt is green."), ("assistant", "Sencha.")],
        [("user", "Name it."), ("assistant", "Tea.")],
    ]
    wrong = record | {"instances": [{"input": "", "output": 3}]}
    assert tells(error([record, wrong]), "test.jsonl:2, instance 1: `output` ... 3")
    assert tells(error([record, record | {"instances": ["x"]}]), 'test.jsonl:2: `instances` ... "x"')
    assert drops([record, record | {"instances": []}], on_error="skip") == {"another layout": 1}


@pytest.mark.parametrize("prompt", [*PROMPTS, *CONVERSATIONS])
def test_a_pair_under_any_name_of_its_prompt(prompt, read):
    said = [{"from": "human", "value": "Tea?"}] if prompt in CONVERSATIONS else "Tea?"
    for reply in (
        str,
        lambda text: {"from": "gpt", "value": text},
        lambda text: [{"role": "assistant", "content": text}],
    ):
        record = {prompt: said, "chosen": reply("Yes."), "rejected": reply("No.")}
        (tree,), _ = read([record], kind=PREFERENCES)
        assert turns([tree]) == [[ASKED, TOLD, ("assistant", "No.")]]


def test_layouts_are_told_by_keys_of_their_own():
    """No name of a prompt is one of a reply, so a record has one reading."""
    assert not set(PROMPTS) & set(REPLIES)
    assert not set(PROMPTS + REPLIES) & set(CONVERSATIONS)
    assert len({format.keys for format in CONVERSATION_FORMATS}) == len(CONVERSATION_FORMATS)
    assert all(detect(dict.fromkeys(format.keys)) is format for format in CONVERSATION_FORMATS)
