"""A prompt and its reply in two columns, whatever these are called: {prompt, completion}, {question, answer}, ...

Alpaca {instruction, input, output} and Dolly {instruction, context, response} are two of them. Both are texts, a user
and an assistant turn, or both lists of messages.
"""

from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.formats.column_names import CONTEXTS, PROMPTS, REPLIES
from gpt2ft.data.formats.keys import is_empty, refuse_keys
from gpt2ft.data.formats.layout import Format, conversation
from gpt2ft.data.formats.turns import Turn, Turns
from gpt2ft.data.reading import Malformed, Record, value

_KNOWN_AS = {
    ("instruction", "output"): "Alpaca `instruction`/`input`/`output`",
    ("instruction", "response"): "Dolly `instruction`/`context`/`response`",
}
# As published: all of the record once more, as one prompt (Alpaca), and the kind of its task (self-instruct).
_PASSED_OVER = {("instruction", "output"): ("text", "is_classification")}


def contexts_of(prompt: str) -> tuple[str, ...]:
    """Return the columns that may go on with a prompt."""
    return tuple(name for name in CONTEXTS if name != prompt)


def asked(record: Record, prompt: str) -> str:
    """Return the text of a prompt and of what goes on with it, as one user turn."""
    texts = [value(record, prompt, str, "a string")]
    texts += (value(record, name, str, "a string or null", optional=True) for name in contexts_of(prompt))
    return "\n\n".join(filter(None, texts))


def _pairs(prompt: str, reply: str) -> Format:
    def turns(record: Record) -> Turns:
        if not isinstance(record[prompt], list):
            return [Turn("user", asked(record, prompt)), Turn("assistant", value(record, reply, str, "a string"))]
        refuse_keys(record, [name for name in contexts_of(prompt) if not is_empty(record.get(name))])
        replies = chat_messages(record, reply)
        if any(turn.role != "assistant" for turn in replies):
            raise Malformed(f"`{reply}` must hold assistant messages only, as all else belongs to the prompt")
        return [*chat_messages(record, prompt), *replies]

    name = _KNOWN_AS.get((prompt, reply), f"`{prompt}`/`{reply}` pairs")
    passed_over = _PASSED_OVER.get((prompt, reply), ())
    return conversation(name, turns, (prompt, reply), also=contexts_of(prompt), passed_over=passed_over)


FORMATS = tuple(_pairs(prompt, reply) for prompt in PROMPTS for reply in REPLIES)
