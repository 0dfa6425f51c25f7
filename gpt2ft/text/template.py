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

from gpt2ft.conversation import ROLES, Role
from gpt2ft.text.chat_tokens import END, END_OF_TEXT, ROLE_TOKENS
from gpt2ft.text.tokenizer import ChatTokenizer

# The same in Jinja, for the readers of an export. One line, without anything between the tags, so that it
# renders alike under every setting of trim_blocks and lstrip_blocks. `<|assistant|>` is never spelled whole:
# without Jinja llama.cpp guesses a template from such names, and would take this one for Phi-3's, which has newlines.
_CONTENT = (
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|end|>' }}"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'developer', 'user', 'assistant'] %}"
    "{{ raise_exception('`role` must be system, developer, user or assistant, but is ' + message['role'] | string) }}"
    "{% endif %}"
    "{% if message['content'] is not string %}"
    "{% if message['content'] is not defined or message['content'] is mapping or message['content'] is not iterable %}"
    "{{ raise_exception('`content` must be text or a list of text parts') }}"
    "{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] != 'text' or part['text'] is not string %}"
    "{{ raise_exception('`content` must hold parts of the type text alone') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|' + ('system' if message['role'] == 'developer' else message['role']) + '|>' }}" + _CONTENT + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|' + 'assistant' + '|>' }}{% endif %}"
)

# It renders to the same, and marks what is supervised for TRL. Plain Jinja refuses the tag, so it is written only where
# readers know it.
TRAINING_TEMPLATE = CHAT_TEMPLATE.replace(
    _CONTENT,
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}" + _CONTENT + "{% endgeneration %}"
    "{% else %}" + _CONTENT + "{% endif %}",
)

# And in the template language of Ollama, which reads no Jinja.
OLLAMA_TEMPLATE = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"


def render_turn(tokenizer: ChatTokenizer, role: Role, text: str) -> list[int]:
    """Return the ids of one turn: its role token, its content, `<|end|>`.

    Raises:
        ValueError: if there is no such role.
    """
    if role not in ROLES:
        raise ValueError(f"`role` must be one of {', '.join(ROLES)}, but is {role!r}")
    if role == "text":
        return [tokenizer.end_of_text_id, *tokenizer.encode(text), tokenizer.end_of_text_id]
    return [tokenizer.role_ids[role], *tokenizer.encode(text), tokenizer.end_id]


def render_prompt(tokenizer: ChatTokenizer, turns: Sequence[tuple[Role, str]]) -> list[int]:
    """Return the ids of all turns, then `<|assistant|>`: what the model continues."""
    ids = [id for role, text in turns for id in render_turn(tokenizer, role, text)]
    return [*ids, tokenizer.role_ids["assistant"]]


class _NamesAsIds:
    """Stand-in for a tokenizer whose "ids" are names and texts, so that a rendering can be read."""

    role_ids = ROLE_TOKENS
    end_id = END
    end_of_text_id = END_OF_TEXT

    def encode(self, text: str) -> list[str]:
        return [text]


def template_digest() -> str:
    """Return the SHA-256 of what the template makes of every role; it changes when either rendering changes."""
    turns = [(role, f" {role}\n") for role in ROLES]
    rendered = render_prompt(_NamesAsIds(), turns)  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps([rendered, CHAT_TEMPLATE]).encode()).hexdigest()
