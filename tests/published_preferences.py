"""Records of preferences as they are published, and the trees that they give."""

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.formats.turns import content_id

ASKED = ("user", "How do I brew tea?")
GOOD, BAD = "Warm the pot: a spoon for each cup.", "No idea."
BEFORE = (("user", "Which tea?"), ("assistant", "Sencha."), ("user", "How?"))
SYSTEM = ("system", "You are a tea master.")


def messages(*turns):
    return [{"content": text, "role": role} for role, text in turns]


def transcript(*turns):
    """As Anthropic writes it."""
    return "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {text}" for role, text in turns)


def told(text):
    return ("assistant", text)


def completion(text, score):
    return {
        "model": "ultralm-13b", "principle": "honesty", "custom_system_prompt": "Be honest.", "response": text,
        "critique": "Well said.", "overall_score": score, "fine-grained_score": 4.25,
        "annotations": {"honesty": {"Rating": "5", "Rationale": "It is."}},
    }  # fmt: skip


PAIR = ((GOOD, 0), (BAD, 1))
# {layout: (format, [(record as published, the prompt, (reply, rank) in order), ...])}
CHOSEN = "`chosen`/`rejected` preferences"
PUBLISHED = {
    "strings": (
        CHOSEN,
        [
            ({"prompt": ASKED[1], "chosen": GOOD, "rejected": BAD, "source_index": 7}, [ASKED], PAIR),
            ({"prompt": "Why?", "chosen": " So. ", "rejected": "Not."}, [("user", "Why?")], (("So.", 0), ("Not.", 1))),
        ],
    ),
    "messages that hold the replies alone": (
        CHOSEN,
        [
            (
                {"prompt": messages(ASKED), "chosen": messages(told(GOOD)), "rejected": messages(told(BAD))},
                [ASKED],
                PAIR,
            ),
            (
                {"prompt": messages(SYSTEM, *BEFORE), "chosen": messages(told(GOOD)), "rejected": messages(told(BAD))},
                [SYSTEM, *BEFORE],
                PAIR,
            ),
        ],
    ),
    "messages with an implicit prompt": (
        CHOSEN,
        [
            (
                {"chosen": messages(*BEFORE, told(GOOD)), "rejected": messages(*BEFORE, told(BAD))},
                [*BEFORE],
                PAIR,
            ),
        ],
    ),
    "binarised UltraFeedback": (
        CHOSEN,
        [
            (
                {
                    "prompt": ASKED[1], "prompt_id": "086b3e24", "chosen": messages(ASKED, told(GOOD)),
                    "rejected": messages(ASKED, told(BAD)), "messages": messages(ASKED, told(GOOD)),
                    "score_chosen": 8.5, "score_rejected": 6.0,
                },
                [ASKED],
                PAIR,
            ),
            (
                {
                    "prompt": ASKED[1], "prompt_id": "086b3e24", "chosen": messages(ASKED, told(GOOD)),
                    "rejected": messages(ASKED, told(BAD)), "messages": messages(ASKED, told(GOOD)),
                    "score_chosen": 8.5, "score_rejected": 8.5,
                },
                [ASKED],
                ((GOOD, 0), (BAD, 0)),
            ),
        ],
    ),
    "HH-RLHF": (
        CHOSEN,
        [
            ({"chosen": transcript(ASKED, told(GOOD)), "rejected": transcript(ASKED, told(BAD))}, [ASKED], PAIR),
            (
                {"chosen": transcript(*BEFORE, told(GOOD)), "rejected": transcript(*BEFORE, told(BAD))},
                [*BEFORE],
                PAIR,
            ),
            (
                {
                    "chosen": transcript(("user", "List:\n\na: 1\n\n\nb: 2"), told("Human: no.\n\nHumans: yes.")),
                    "rejected": transcript(("user", "List:\n\na: 1\n\n\nb: 2"), told("An Assistant: me.")),
                },
                [("user", "List:\n\na: 1\n\n\nb: 2")],
                (("Human: no.\n\nHumans: yes.", 0), ("An Assistant: me.", 1)),
            ),
        ],
    ),
    "HH-RLHF with its prompt apart": (
        CHOSEN,
        [
            (
                {"prompt": transcript(*BEFORE) + "\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
                [*BEFORE],
                PAIR,
            ),
            (
                {"prompt": transcript(*BEFORE).strip() + "\n\nAssistant: ", "chosen": GOOD, "rejected": BAD},
                [*BEFORE],
                PAIR,
            ),
            (
                {
                    "prompt": transcript(*BEFORE), "chosen": transcript(told(GOOD)), "rejected": transcript(told(BAD)),
                },
                [*BEFORE],
                PAIR,
            ),
            (
                {
                    "prompt": transcript(*BEFORE) + "\n\nAssistant:", "chosen": transcript(*BEFORE, told(GOOD)),
                    "rejected": transcript(*BEFORE, told(BAD)),
                },
                [*BEFORE],
                PAIR,
            ),
        ],
    ),
    "Intel's orca_dpo_pairs": (
        CHOSEN,
        [
            ({"system": SYSTEM[1], "question": ASKED[1], "chosen": GOOD, "rejected": BAD}, [SYSTEM, ASKED], PAIR),
            ({"system": "", "question": ASKED[1], "chosen": GOOD, "rejected": BAD}, [ASKED], PAIR),
        ],
    ),
    "LLaMA-Factory": (
        CHOSEN,
        [
            (
                {
                    "conversations": [{"from": "human", "value": ASKED[1]}],
                    "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
                },
                [ASKED],
                PAIR,
            ),
            (
                {
                    "system": SYSTEM[1],
                    "conversations": [
                        {"from": "gpt" if role == "assistant" else "human", "value": text} for role, text in BEFORE
                    ],
                    "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
                },
                [SYSTEM, *BEFORE],
                PAIR,
            ),
        ],
    ),
    "Alpaca's pairs": (
        CHOSEN,
        [
            ({"instruction": ASKED[1], "input": "", "chosen": GOOD, "rejected": BAD}, [ASKED], PAIR),
            (
                {"instruction": "Name it.", "input": "It is green.", "chosen": GOOD, "rejected": BAD, "history": []},
                [("user", "Name it.\n\nIt is green.")],
                PAIR,
            ),
        ],
    ),
    "Alpaca's pairs as conversations": (
        CHOSEN,
        [
            (
                {
                    "instruction": "Name it.", "input": "It is green.",
                    "chosen": messages(("user", "Name it.\n\nIt is green."), told(GOOD)),
                    "rejected": messages(("user", "Name it.\n\nIt is green."), told(BAD)),
                },
                [("user", "Name it.\n\nIt is green.")],
                PAIR,
            ),
        ],
    ),
    "lists of ShareGPT's turns": (
        CHOSEN,
        [
            (
                {
                    "chosen": [{"from": "human", "value": ASKED[1]}, {"from": "gpt", "value": GOOD}],
                    "rejected": [{"from": "human", "value": ASKED[1]}, {"from": "gpt", "value": BAD}],
                    "chosen-rating": 5.0, "rejected-rating": 1.0, "chosen-model": "a", "rejected_model": "b",
                },
                [ASKED],
                PAIR,
            ),
            (
                {
                    "prompt": messages(ASKED),
                    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
                    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}],
                },
                [ASKED],
                PAIR,
            ),
        ],
    ),
    "UltraFeedback": (
        "`completions` with scores",
        [
            (
                {
                    "source": "evol_instruct", "instruction": ASKED[1], "models": ["a", "b", "c", "d"],
                    "completions": [completion(f"{score}", score) for score in (7.5, 3.0, 10.0, 7.0)],
                    "correct_answers": ["None"], "incorrect_answers": ["None"],
                },
                [ASKED],
                (("10.0", 0), ("7.5", 1), ("7.0", 2), ("3.0", 3)),
            ),
            (
                {
                    "source": "flan", "instruction": "Why?", "models": ["a", "b", "c", "d"],
                    "completions": [completion(*reply) for reply in (("x", 4.0), ("y", None), ("z", 8.0), ("w", 4.0))],
                    "correct_answers": ["None"], "incorrect_answers": ["None"],
                },
                [("user", "Why?")],
                (("z", 0), ("x", 1), ("w", 1), ("y", None)),
            ),
            (
                {
                    "source": "flan", "instruction": "Who?", "models": ["a"], "completions": [completion("x", 4.0)],
                    "correct_answers": ["None"], "incorrect_answers": ["None"],
                },
                [("user", "Who?")],
                (("x", 0),),
            ),
        ],
    ),
}  # fmt: skip


def tree_of(source, prompt, replies):
    above = [Message(role, text, turn - 1 if turn else None) for turn, (role, text) in enumerate(prompt)]
    below = [Message("assistant", text, len(prompt) - 1, rank) for text, rank in replies]
    return MessageTree(content_id(prompt), source, (*above, *below))
