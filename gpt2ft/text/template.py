"""The chat template, the only renderer there is: training, chat, server and export all go through here.

    <|user|>What is tea?<|end|><|assistant|>A hot drink.<|end|><|user|>And cold?<|end|><|assistant|>
    `------- a turn -----------'`------ a turn --------------'                     `- what the model continues

A plain text stands between two `<|endoftext|>`, as in GPT-2's own training.

Content goes in verbatim, whitespace included. Control tokens are put in as ids and never as text, so that
no content can forge one.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt2ft.conversation import CHAT_ROLES, ROLES, Role

if TYPE_CHECKING:
    from gpt2ft.text.tokenizer import ChatTokenizer

ROLE_TOKENS: dict[Role, str] = {role: f"<|{role}|>" for role in CHAT_ROLES}
END = "<|end|>"

# The same in Jinja, for the readers of an export. One line, without anything between the tags, so that it
# renders alike under every setting of trim_blocks and lstrip_blocks. `<|assistant|>` is never spelled whole:
# without Jinja llama.cpp guesses a template from such names, and would take this one for Phi-3's, which has newlines.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('`role` must be system, user or assistant, but is ' + message['role'] | string) }}"
    "{% endif %}"
    "{% if message['content'] is not string %}"
    "{{ raise_exception('`content` must be text') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|' + 'assistant' + '|>' }}{% endif %}"
)

# And in the template language of Ollama, which reads no Jinja.
OLLAMA_TEMPLATE = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"


def render_turn(tokenizer: "ChatTokenizer", role: Role, text: str) -> list[int]:
    """The ids of one turn: its role token, its content, `<|end|>`.

    Raises:
        ValueError: if there is no such role.
    """
    opening, end = _frame(tokenizer, role)
    return [opening, *tokenizer.encode(text), end]


def render_prompt(tokenizer: "ChatTokenizer", turns: Sequence[tuple[Role, str]]) -> list[int]:
    """The ids of all turns, then `<|assistant|>`: what the model continues."""
    ids = [id for role, text in turns for id in render_turn(tokenizer, role, text)]
    return [*ids, tokenizer.role_ids["assistant"]]


def _frame(tokenizer: "ChatTokenizer", role: Role) -> tuple[int, int]:
    """The control ids before and after the content of a turn."""
    if role not in ROLES:
        raise ValueError(f"`role` must be one of {', '.join(ROLES)}, but is {role!r}")
    if role == "text":
        return tokenizer.end_of_text_id, tokenizer.end_of_text_id
    return tokenizer.role_ids[role], tokenizer.end_id


class _Speller:
    """Stands in for a tokenizer: its "ids" are the texts themselves, so a rendering can be read."""

    role_ids = ROLE_TOKENS
    end_id = END
    end_of_text_id = "<|endoftext|>"

    def encode(self, text: str) -> list[str]:
        return [text]


def template_digest() -> str:
    """SHA-256 of what the template makes of every role; changes when either rendering changes."""
    turns = [(role, f" {role}\n") for role in ROLES]
    rendered = render_prompt(_Speller(), turns)  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps([rendered, CHAT_TEMPLATE]).encode()).hexdigest()
