"""Control tokens: each role has one, and those that a vocabulary lacks are added behind its ids."""

from gpt2ft.conversation import CHAT_ROLES
from gpt2ft.text.chat_tokens import CHAT_TOKENS, CONTROL_TOKENS, END, END_OF_TEXT, ROLE_TOKENS, with_missing_tokens


def test_every_role_of_a_chat_has_a_token_and_all_tokens_differ():
    assert list(ROLE_TOKENS) == list(CHAT_ROLES)
    assert CHAT_TOKENS == ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert {END, END_OF_TEXT} < set(CONTROL_TOKENS)
    assert len(set(CONTROL_TOKENS)) == len(CONTROL_TOKENS) == 5


def test_missing_tokens_follow_in_one_order_and_the_others_keep_their_ids():
    assert with_missing_tokens({END_OF_TEXT: 7}, first_free_id=8) == {
        END_OF_TEXT: 7, "<|system|>": 8, "<|user|>": 9, "<|assistant|>": 10, END: 11,
    }  # fmt: skip
    some = {END: 2, "<|pad|>": 3, "<|user|>": 0}
    assert with_missing_tokens(some, first_free_id=4) == some | {END_OF_TEXT: 4, "<|system|>": 5, "<|assistant|>": 6}
