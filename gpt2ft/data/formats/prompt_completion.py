"""A prompt and its completion, {prompt, completion}: both text, a user and an assistant turn, or both lists of
messages."""

from gpt2ft.data.formats.messages import chat_messages
from gpt2ft.data.formats.turns import Format, Turns, conversation
from gpt2ft.data.reading import Malformed, Record, value


def turns(record: Record) -> Turns:
    if record.get("label") is False:
        raise Malformed("`label` must be true or absent, as every completion is trained on, but is false")
    if isinstance(record["prompt"], list):
        completion = chat_messages(record, "completion")
        if any(role != "assistant" for role, _ in completion):
            raise Malformed("`completion` must hold assistant messages only, as all else belongs to the prompt")
        return [*chat_messages(record, "prompt"), *completion]
    prompt, completion = (value(record, key, str, "a string") for key in ("prompt", "completion"))
    return [("user", prompt), ("assistant", completion)]


FORMAT = Format("`prompt`/`completion` pairs", ("prompt", "completion"), conversation(turns), also=("label",))
