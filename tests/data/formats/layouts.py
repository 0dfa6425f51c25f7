"""A record of each layout, and a message of each that has messages, with all they can say and no more."""

import pytest

from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES

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


def supervised(trees):
    return [[message.text for message in tree.messages if message.is_supervised] for tree in trees]
