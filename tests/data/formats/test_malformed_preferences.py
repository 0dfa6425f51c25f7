"""A record of preferences that cannot be read is named by its place, or counted."""

import pytest
from facts import tells
from published_preferences import (
    ASKED,
    BAD,
    BEFORE,
    CHOSEN,
    GOOD,
    PUBLISHED,
    SYSTEM,
    messages,
    told,
    transcript,
    tree_of,
)

from gpt2ft.data.kinds import PREFERENCES

ALONE = {"chosen": GOOD, "rejected": BAD}
NEEDS_PROMPT = "`prompt` ... `chosen` is a reply alone"
MALFORMED = {
    "strings": [
        (ALONE, f'{NEEDS_PROMPT} ... "Warm the pot'),
        (ALONE | {"prompt": None}, NEEDS_PROMPT),
        (ALONE | {"theme": "Tea?"}, NEEDS_PROMPT),
        (ALONE | {"chosen": messages(told(GOOD))}, NEEDS_PROMPT),
        ({"prompt": "Tea?", "chosen": GOOD}, f'{CHOSEN} ... "prompt", "chosen"'),
        (ALONE | {"prompt": 3}, "`prompt` ... 3"),
        (ALONE | {"prompt": {"role": "user"}}, "`prompt`: `content` ... missing"),
        (ALONE | {"prompt": "Tea?", "chosen": None}, "`chosen` ... null"),
        (ALONE | {"prompt": "Tea?", "rejected": 1.5}, "`rejected` ... 1.5"),
        (
            ALONE | {"conversations": [], "chosen": {"from": "gpt", "value": GOOD}},
            "`conversations` ... user turn ... `chosen` ... empty",
        ),
        (ALONE | {"prompt": "Tea?", "chosen": {"from": "gpt"}}, "`chosen`: `value` ... missing"),
        (ALONE | {"prompt": "Tea?", "rejected": "\ud83d"}, "`rejected` ... half of a surrogate"),
        (ALONE | {"prompt": "Tea?", "history": ["x"]}, "`history`"),
    ],
    "messages that hold the replies alone": [
        (ALONE | {"prompt": []}, "`prompt` ... user turn ... `chosen` ... empty"),
        (
            ALONE | {"prompt": messages(ASKED, told("Well,"))},
            "`prompt` ... user turn ... `chosen` ... role assistant",
        ),
        (
            ALONE | {"prompt": messages(SYSTEM)},
            "`prompt` ... user turn ... `chosen` ... role system",
        ),
        (ALONE | {"prompt": messages(ASKED), "chosen": []}, "`chosen` ... empty"),
        (ALONE | {"prompt": messages(ASKED), "chosen": [GOOD]}, "`chosen` ... objects"),
        (ALONE | {"prompt": [{"role": "x"}]}, "message 1 of `prompt`: `role` ... prompter"),
        (
            ALONE | {"prompt": messages(ASKED), "rejected": [{"role": "assistant", "content": None}]},
            "message 1 of `rejected`: `content` ... null",
        ),
    ],
    "messages with an implicit prompt": [
        (
            {"prompt": messages(*BEFORE), "chosen": messages(ASKED, told(GOOD)), "rejected": messages(*BEFORE)},
            "`chosen` ... `prompt`",
        ),
    ],
    "binarised UltraFeedback": [
        (
            {"prompt": "Coffee?", "chosen": messages(ASKED, told(GOOD)), "rejected": messages(ASKED, told(BAD))},
            "`chosen` ... `prompt` ... user turn",
        ),
    ],
    "HH-RLHF": [
        (
            {"chosen": transcript(ASKED, told(GOOD)), "rejected": "Human: x"},
            "`prompt` ... `rejected` is a reply alone",
        ),
    ],
    "HH-RLHF with its prompt apart": [
        (
            {"prompt": transcript(*BEFORE) + "\n\nAssistant:", "context": "It is green.", **ALONE},
            "`context` ... would be lost",
        ),
        (
            {"prompt": transcript(*BEFORE, told("Well,")), **ALONE},
            "`prompt` ... user turn ... `chosen` ... role assistant",
        ),
        (
            {"prompt": transcript(ASKED), "chosen": transcript(*BEFORE, told(GOOD)), "rejected": BAD},
            "`chosen` ... `prompt`",
        ),
    ],
    "Intel's orca_dpo_pairs": [
        (ALONE | {"question": 3}, "`question` ... 3"),
        (ALONE | {"question": "Tea?", "system": 3}, "`system` ... 3"),
    ],
    "Alpaca's pairs": [
        (ALONE | {"instruction": "Tea?", "input": 3}, "`input` ... 3"),
        (ALONE | {"instruction": "Tea?", "input": "", "prompt": "Coffee?"}, "`instruction` ... would be lost"),
        (ALONE | {"instruction": "Tea?", "input": "", "messages": messages(ASKED)}, "`messages` ... would be lost"),
    ],
    "UltraFeedback": [
        ({"instruction": None, "completions": []}, "`instruction` ... null"),
        ({"instruction": "x", "completions": None}, "`completions` ... null"),
        ({"instruction": "x", "completions": ["y"]}, '`completions` ... "y"'),
        ({"instruction": "x", "completions": [{"overall_score": 1.0}]}, "`response` ... missing"),
        (
            {"instruction": "x", "completions": [{"response": "y", "overall_score": "8"}]},
            '`overall_score` ... "8"',
        ),
        (
            {"instruction": "x", "completions": [{"response": "y", "overall_score": True}]},
            "`overall_score` ... true",
        ),
        ({"instruction": "x", "output": "y"}, "`completions` with scores"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "record", "facts"),
    [(layout, record, facts) for layout, cases in MALFORMED.items() for record, facts in cases],
)
def test_a_malformed_record_is_an_error_or_skipped_and_counted(layout, record, facts, compare, error, write, tmp_path):
    (good, prompt, replies), *_ = PUBLISHED[layout][1]
    for kind, place in (("lines.json", "lines.json:2"), ("array.json", "array.json: record 2")):
        file = write(tmp_path / kind, [good, record, good])
        assert tells(error(file, kind=PREFERENCES), f"{tmp_path / place}: ... {facts}")
        trees, context = compare(file, on_error="skip")
        assert [tree.messages for tree in trees] == [tree_of("", prompt, replies).messages] * 2
        assert context.refused_records() == context.dropped.total() == 1
        assert context.totals.trees == 2
