"""Replies that are good or bad by themselves: any layout of conversations, with `label` (or `kto_tag`) beside it.

    {prompt, completion, label: true}      the last reply is desirable
    {messages: [...], label: false}        the last reply is undesirable

A conversation whose last reply is lost to the rules of `turns` is dropped: its label would be that of another reply.
"""

from dataclasses import dataclass, replace

from gpt2ft.conversation import MessageTree, tidy
from gpt2ft.data.formats import messages, prompt_reply
from gpt2ft.data.formats.layout import Format
from gpt2ft.data.formats.turns import content_id
from gpt2ft.data.reading import Malformed, ReadContext, Record, of, show

LABELS = ("label", "kto_tag")
_OF_TABLES = {"true": True, "1": True, "false": False, "0": False}  # in CSV all is text


@dataclass(frozen=True)
class Labelled:
    """A layout of conversations, each with a label for its last reply."""

    conversation: Format

    @property
    def name(self) -> str:
        return f"{self.conversation.name} with `label`"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.conversation.columns + LABELS

    @property
    def passed_over(self) -> tuple[str, ...]:
        return self.conversation.passed_over

    def matches(self, record: Record) -> bool:
        return any(key in record for key in LABELS) and self.conversation.matches(record)

    def tree(self, record: Record, where: str, context: ReadContext) -> MessageTree | None:
        """Return the conversation, named by its prompt, its last reply labelled; None if that is not left.

        Raises:
            Malformed: if the record cannot be read, or has no label.
        """
        label = _label(record)
        unlabelled = {key: value for key, value in record.items() if key not in LABELS}
        tree = self.conversation.tree(unlabelled, where, context)
        if tree is None:
            return None
        ((turns, _),) = self.conversation.transcripts(unlabelled)
        *prompt, reply = tree.messages
        said = tidy(turns[-1].text)
        if turns[-1].role != "assistant" or not said or not reply.text.endswith(said):
            context.dropped["does not end in a reply"] += len(tree.messages)
            return None
        id = content_id([(message.role, message.text) for message in prompt])
        return MessageTree(id, tree.source, (*prompt, replace(reply, label=label)))


def _label(record: Record) -> bool:
    given = {key: record[key] for key in LABELS if record.get(key) is not None} or {LABELS[0]: None}
    found = {key: _OF_TABLES.get(label.lower()) if isinstance(label, str) else label for key, label in given.items()}
    for key, label in found.items():
        if not isinstance(label, int | float) or label not in (0, 1):
            raise Malformed(
                f"`{key}` must be true or 1 where the reply is desirable, false or 0 where not, but is "
                f"{show(given[key])}{of(record)}"
            )
    if len(set(found.values())) > 1:
        raise Malformed(f"{' and '.join(f'`{key}`' for key in found)} must agree, but do not{of(record)}")
    return bool(next(iter(found.values())))


FORMATS = tuple(Labelled(format) for format in (*messages.FORMATS, *prompt_reply.FORMATS))
