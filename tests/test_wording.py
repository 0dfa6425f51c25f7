"""One thing is not spoken of as many."""

import pytest

from gpt2ft.wording import counted


@pytest.mark.parametrize(
    ("number", "plural", "said"),
    [(0, "", "0 steps"), (1, "", "1 step"), (2, "", "2 steps"), (1234, "", "1,234 steps"), (2, "stairs", "2 stairs")],
)
def test_numbers_and_their_nouns(number, plural, said):
    assert counted(number, "step", plural) == said
