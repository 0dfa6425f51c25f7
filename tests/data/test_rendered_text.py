"""Texts that another template has rendered are pointed out, with the layout that would read them; others are not."""

import pytest
from facts import tells

from gpt2ft.data.rendered_text import note_on
from gpt2ft.data.sources import open_source
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings

RENDERED = {
    "[INST] Tea? [/INST] Yes.": "`[INST]` ... `messages`",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nTea? [/INST] Yes. </s>": "`[INST]` ... `messages`",
    "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>": "`<|im_start|>` ... `messages`",
    "<|start_header_id|>user<|end_header_id|>\n\nTea?": "`<|start_header_id|>` ... `messages`",
    "<|user|>\nTea?</s>\n<|assistant|>\nYes.": "`<|user|>` ... `messages`",
    "<start_of_turn>user\nTea?<end_of_turn>": "`<start_of_turn>` ... `messages`",
    "Below is an instruction.\n\n### Instruction:\nTea?\n\n### Response:\nYes.": "`### Instruction` ... `instruction`",
    "Human: Tea?\n\nAssistant: Yes.": "`Human:` ... `dialogue` ... --data.columns dialogue=text",
    "### Human: Tea?### Assistant: Yes.": "`### Human:` ... --data.columns dialogue=text",
    "USER: Tea?\nASSISTANT: Yes.": "`USER:` ... --data.columns dialogue=text",
}


@pytest.mark.parametrize("text", RENDERED)
def test_it_is_pointed_out(text, write, tokenizer, tmp_path):
    file = write(tmp_path / "t.jsonl", [{"text": text}, {"text": "Tea is a drink."}])
    note = open_source(str(file)).rendered
    assert tells(note, f"1 of the first 2 texts ... {RENDERED[text]}")
    for _ in range(2):  # also from the cache
        assert open_store(str(file), FilterSettings(), tokenizer, tmp_path / "cache").notes == (note,)


@pytest.mark.parametrize(
    "text",
    [
        "Tea is a drink.",
        "# Instructions\n\n## Input\n",
        "Human: tea is hot.",
        "Assistants: none.",
        "a[INSTANCE]",
        "<|endoftext|>",
    ],
)
def test_other_texts_are_not(text):
    assert note_on([text]) == ""


def test_a_text_that_speaks_of_templates_is_not_one_of_many():
    assert note_on(["<|im_start|> opens a turn."] + ["Tea."] * 20) == ""
    assert note_on([]) == ""


def test_prompts_that_are_rendered_are_pointed_out_as_well(write, tmp_path):
    file = write(tmp_path / "t.jsonl", [{"prompt": "### Instruction:\nTea?\n\n### Response:", "completion": "Yes."}])
    assert tells(open_source(str(file)).rendered, "`### Instruction`")
