"""The oldest whole turns give way, in one way for training, chat and serving."""

import numpy as np
import pytest

from gpt2ft.text.context import kept_turns

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def kept(drawing, limit):
    """kept("u3 a4", 7): turns of a role's letter and their tokens."""
    turns = drawing.split()
    return kept_turns([ROLES[turn[0]] for turn in turns], [int(turn[1:]) for turn in turns], limit)


@pytest.mark.parametrize(
    ("drawing", "limit", "expected"),
    [
        ("u3 a4", 7, [0, 1]),  # exactly full
        ("u3 a4", 6, None),  # not even the last exchange
        ("u3 a4 u2 a5", 14, [0, 1, 2, 3]),
        ("u3 a4 u2 a5", 13, [2, 3]),  # whole turns, and a user turn opens
        ("u3 a4 u2 a5", 11, [2, 3]),
        ("u3 a4 u2 a5", 7, [2, 3]),
        ("u3 a4 u2 a5", 6, None),
        ("s1 u3 a4 u2 a5", 15, [0, 1, 2, 3, 4]),
        ("s1 u3 a4 u2 a5", 14, [0, 3, 4]),  # the system turn stays
        ("s1 u3 a4 u2 a5", 8, [0, 3, 4]),
        ("s1 u3 a4 u2 a5", 7, None),
        ("u3 a4 u2", 4, [2]),  # a chat that waits for its reply
        ("u3 a4 u2 u2", 4, [2, 3]),
        ("u3 a4 a5", 9, None),  # what follows the gap opens with a user turn
        ("s9", 9, [0]),
        ("s9", 8, None),
        ("u9", 8, None),
        ("a4", 4, [0]),
    ],
)
def test_exact_cases(drawing, limit, expected):
    assert kept(drawing, limit) == expected


def test_as_many_turns_as_fit():
    """Against every way there is to drop turns after the system turn, on random conversations."""
    random = np.random.default_rng(0)
    shortened = refused = 0
    for _ in range(500):
        roles = ["system"] * int(random.integers(2)) + ["user", "assistant"] * int(random.integers(1, 6))
        lengths = random.integers(2, 20, len(roles)).tolist()
        limit = int(random.integers(5, 120))
        system = [0] if roles[0] == "system" else []
        ways = [list(range(len(roles)))]
        ways += [system + list(range(start, len(roles))) for start, role in enumerate(roles) if role == "user"]
        fitting = [way for way in ways if sum(lengths[turn] for turn in way) <= limit]
        assert kept_turns(roles, lengths, limit) == max(fitting, key=len, default=None)
        shortened += bool(fitting) and ways[0] not in fitting
        refused += not fitting
    assert shortened > 50
    assert refused > 50
