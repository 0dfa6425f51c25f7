"""Texts that look like conversations rendered by another template: learnt as they stand, its control words are text."""

import re
from collections.abc import Sequence

from gpt2ft.data.formats.messages import transcript

_OTHERWISE = {
    r"<\|im_start\|>": "`messages`",
    r"<\|(?:start_header_id|begin_of_text|user|assistant|system)\|>": "`messages`",
    r"<start_of_turn>": "`messages`",
    r"\[/?INST\]": "`messages`",
    r"^### ?(?:Instruction|Input|Response)\b": "`instruction`, `input` and `output`",
}
_LEAST = 0.1  # of the texts: a few may speak of such words


def note_on(texts: Sequence[str]) -> str:
    """Return a line for people if some of the texts look rendered, else ""."""
    for pattern, layout in _OTHERWISE.items():
        marks = [found[0] for text in texts if (found := re.search(pattern, text, re.MULTILINE))]
        if marks and len(marks) >= _LEAST * len(texts):
            return (
                f"rendered already? {len(marks):,} of the first {len(texts):,} texts hold `{marks[0]}`, which is "
                f"learnt as plain text; the same as {layout} would be read as turns"
            )
    spoken = [text for text in texts if transcript(text)]
    if spoken and len(spoken) >= _LEAST * len(texts):
        opening = spoken[0].lstrip().partition(":")[0]
        return (
            f"rendered already? {len(spoken):,} of the first {len(texts):,} texts open with `{opening}:` or the like, "
            "learnt as plain text; as `dialogue` they would be read as turns (--data.columns dialogue=text)"
        )
    return ""
