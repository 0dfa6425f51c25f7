"""Records of known data sets, with all their keys, are read as they are published."""

import pytest
from layouts import ASKED, COMPARED, GPT, HUMAN, LAYOUTS, PAIR, TOLD

from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES

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
