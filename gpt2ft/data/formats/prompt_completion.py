"""A prompt and its completion, {prompt, completion}: both text, a user and an assistant turn, or both lists of
messages."""

from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.formats.layout import conversation
from gpt2ft.data.formats.turns import Turn, Turns
from gpt2ft.data.reading import Malformed, Record, value


def turns(record: Record) -> Turns:
    if isinstance(record["prompt"], list):
        completion = chat_messages(record, "completion")
        if any(turn.role != "assistant" for turn in completion):
            raise Malformed("`completion` must hold assistant messages only, as all else belongs to the prompt")
        return [*chat_messages(record, "prompt"), *completion]
    prompt, completion = (value(record, key, str, "a string") for key in ("prompt", "completion"))
    return [Turn("user", prompt), Turn("assistant", completion)]


FORMAT = conversation("`prompt`/`completion` pairs", turns, ("prompt", "completion"))
