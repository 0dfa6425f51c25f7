"""Prompts are read, answered turn by turn, and become exchanges that can be measured."""

import pytest
import torch

from gpt2ft.errors import SettingsError
from gpt2ft.report import PROMPTS
from gpt2ft.report.conversations import Prompt, converse, exchanges, fits, greedy, read_prompts
from gpt2ft.report.instructions import obeys
from gpt2ft.report.replies import holds_word


def test_the_bundled_prompts_measure_what_they_are_for():
    prompts = read_prompts(PROMPTS)
    shown = prompts[:3]
    assert [len(prompt.turns) for prompt in shown] == [1, 2, 1]
    probes = [prompt for prompt in prompts if prompt.earlier]
    assert len(probes) >= 5
    for probe in probes:
        assert any(holds_word(turn, probe.earlier) for turn in probe.turns[:-1])
        assert not holds_word(probe.turns[-1], probe.earlier)
    assert sum(obeys(prompt.turns[-1], "") is not None for prompt in prompts) >= 7
    assert len({prompt.turns for prompt in prompts}) == len(prompts)


def test_prompts_of_a_file(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("\ufeffWhat is tea?\n\n  And milk?\n", encoding="utf-8")
    assert read_prompts(lines) == [Prompt(("What is tea?",)), Prompt(("And milk?",))]
    records = tmp_path / "prompts.jsonl"
    records.write_text(
        '"What\u2028is tea?"\n{"turns": ["I am Ann.", "Who am I?"], "earlier": ["Ann"]}\n', encoding="utf-8"
    )
    first, second = read_prompts(records)
    assert first == Prompt(("What\u2028is tea?",))
    assert second == Prompt(("I am Ann.", "Who am I?"), earlier=("Ann",))


@pytest.mark.parametrize(
    "line",
    [
        '"\\ud83d"',
        "{",
        "5",
        "null",
        '{"turns": []}',
        '{"turns": "a"}',
        '{"turns": ["a", ""]}',
        '{"turns": ["a"], "b": 1}',
        "[]",
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(line, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(SettingsError, match=r"prompts.jsonl, line 2"):
        read_prompts(file)
    with pytest.raises(SettingsError, match="no.jsonl"):
        read_prompts(tmp_path / "no.jsonl")


def test_every_turn_stands_below_the_model_s_own_replies():
    asked = []

    def answer(conversations):
        asked.append([list(turns) for turns in conversations])
        return [{"text": f"reply {len(turns)}", "stopped": True} for turns in conversations]

    before = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    prompts = [Prompt(("one", "two"), earlier=("x",)), Prompt(("only",), before)]
    replies = converse(answer, prompts)
    assert asked[0] == [[("user", "one")], [*before, ("user", "only")]]
    assert asked[1] == [[("user", "one"), ("assistant", "reply 1"), ("user", "two")]]
    assert [[reply["text"] for reply in said] for said in replies] == [["reply 1", "reply 3"], ["reply 4"]]
    found = exchanges(prompts, replies, topic=("tea",))
    assert [(each.prompt, each.reply, each.earlier) for each in found] == [
        ("one", "reply 1", ()), ("two", "reply 3", ("x",)), ("only", "reply 4", ()),
    ]  # fmt: skip
    assert all(each.topic == ("tea",) for each in found)
    assert converse(answer, []) == []


def test_replies_are_greedy_and_a_prompt_too_long_is_refused(tiny_gpt2, tokenizer):
    gpt2 = tiny_gpt2(tokenizer.padded_size, 64).eval()
    answer = greedy(gpt2, tokenizer, 5)
    one, other = answer([[("user", "Tea?")], [("user", "Milk, please.")]])
    assert [one, other] == [*answer([[("user", "Tea?")]]), *answer([[("user", "Milk, please.")]])]
    with pytest.raises(SettingsError, match="`prompts`"):
        answer([[("user", "word " * 100)]])
    long = ("user", "word " * 100)
    assert fits(Prompt(("Tea?",), (long, ("assistant", "Yes."))), gpt2, tokenizer, 5)  # without what is above
    assert not fits(Prompt((long[1],)), gpt2, tokenizer, 5)
    with torch.no_grad():
        gpt2.wte.weight[0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        answer([[("user", "Tea?")]])
