"""Control tokens: `<|endoftext|>`, which GPT-2 knows, and the four chat tokens, which training teaches it.

They have ids, but no text: the encoder has never heard of them, so no content can produce one.
"""

from gpt2ft.conversation import CHAT_ROLES, Role

END_OF_TEXT = "<|endoftext|>"
ROLE_TOKENS: dict[Role, str] = {role: f"<|{role}|>" for role in CHAT_ROLES}
END = "<|end|>"
CHAT_TOKENS = (*ROLE_TOKENS.values(), END)
CONTROL_TOKENS = (END_OF_TEXT, *CHAT_TOKENS)


def with_missing_tokens(control_ids: dict[str, int], first_free_id: int) -> dict[str, int]:
    """Add the control tokens that are not in `control_ids`, with the ids from `first_free_id` on."""
    missing = [name for name in CONTROL_TOKENS if name not in control_ids]
    return control_ids | {name: first_free_id + number for number, name in enumerate(missing)}
