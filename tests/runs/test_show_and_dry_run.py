"""What is shown is what is computed, and the figures about data are those of a plain count."""

import json
import re

import numpy as np
import pytest

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.plan import Plan
from gpt2ft.runs.data_statistics import data_statistics
from gpt2ft.runs.describe import describe_streams
from gpt2ft.runs.show_examples import show_examples
from gpt2ft.settings.training import DataSettings


@pytest.fixture(scope="module")
def plan_of(tokenizer, cache):
    def make(max_length=256, weight="once", **settings):
        corpus, held_out = load_corpora(DataSettings(cache=str(cache), **settings), tokenizer)
        pieces = chunk(corpus.stores, corpus.rows, ConversationTrees(weight, max_length, 512))
        return corpus, held_out, Plan(pieces, 512, 2, seed=0)

    return make


def chats(file, *conversations):
    lines = []
    for turns in conversations:
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    file.write_text("".join(lines))
    return str(file)


def without_frame(text):
    """Only the tokens: neither the lines about a turn nor the bars of the tree."""
    lines = [line for line in text.splitlines() if not re.match(r"[│ ]*[├└]─ |example |what is", line)]
    return "".join(re.sub(r"^[│ ]*(│  |   )", "", line) for line in lines)


@pytest.mark.parametrize("weight", ["once", "leaves"])
def test_examples_are_the_tokens_of_the_first_streams(plan_of, tokenizer, weight):
    _, _, plan = plan_of(train=("quickstart",), weight=weight)
    number = sum(map(len, plan.micro_batches(0))) + 2  # into the second step
    text = show_examples(plan, tokenizer, number, width=10_000, colour=False)
    assert text.count("example ") == number
    first = plan.stream(plan.micro_batches(0)[0])
    said = tokenizer.decode(first.tokens[: first.num_tokens].tolist())
    shown = without_frame(text)
    assert shown.replace("»", "").replace("«", "").startswith(said)
    learnt = re.findall("»([^«]*)«", shown)
    targets = tokenizer.decode(first.targets[: first.num_supervised].tolist())
    assert "".join(learnt).startswith(targets)
    assert all(turn.endswith("<|end|>") for turn in learnt)
    assert "step 2, stream 1, from token 0" in text
    assert ("weight 2" in text) == (weight == "leaves")


def test_colour_shows_the_same_tokens(plan_of, tokenizer):
    _, _, plan = plan_of(train=("quickstart",))
    plain, coloured = (show_examples(plan, tokenizer, 3, width=10_000, colour=colour) for colour in (False, True))
    assert "\x1b[" not in plain
    uncoloured = re.sub("\x1b\\[[0-9;]*m", "", coloured)
    assert without_frame(uncoloured) == without_frame(plain).replace("»", "").replace("«", "")
    greens = re.findall("\x1b\\[(?:32|92)m([^\x1b]*)", coloured)
    assert "".join(greens) == "".join(re.findall("»([^«]*)«", without_frame(plain)))


@pytest.mark.parametrize("marks", [(0.25, 1), (0, 0.5)])
def test_weights_are_shown(marks, plan_of, tokenizer, tmp_path):
    messages = []
    for number, mark in enumerate(marks):
        messages += [{"role": "user", "content": f"Ask {number}."}]
        messages += [{"role": "assistant", "content": f"Told {number}.", "weight": mark}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    _, _, plan = plan_of(train=(str(tmp_path / "a.jsonl"),))
    plain, coloured = (show_examples(plan, tokenizer, 1, width=200, colour=colour) for colour in (False, True))
    told = [line for line in plain.splitlines() if "assistant: " in line]
    assert [line.rpartition(", ")[2] for line in told] == [f"weight {m:g}" if m else "not supervised" for m in marks]
    assert re.findall("»([^«]*>)«", plain) == [f"Told {n}.<|end|>" for n, mark in enumerate(marks) if mark]
    for colours, learnt in (("33|93", lambda mark: 0 < mark < 1), ("32|92", lambda mark: mark == 1)):
        shown = re.findall(f"\x1b\\[(?:{colours})m([^\x1b]*)", coloured)
        assert "".join(shown) == "".join(f"Told {n}.<|end|>" for n, mark in enumerate(marks) if learnt(mark))


def test_lines_fit_and_text_cannot_drive_the_terminal(plan_of, tokenizer, tmp_path):
    file = chats(tmp_path / "a.jsonl", ("\x1b[2J 🫖 tea", "one two three four " * 20 + "\nfive \x07"))
    text = show_examples(plan_of(train=(file,))[2], tokenizer, 1, width=60, colour=False)
    assert "🫖" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[2J" in text
    body = [line for line in text.splitlines() if not re.match("example|what is|[│ ]*[├└]", line)]
    assert len(body) > 6
    assert max(map(len, body)) <= 61


def test_figures_are_those_of_a_plain_count(plan_of, tokenizer):
    corpus, held_out, plan = plan_of(train=("quickstart",), eval=("quickstart:held_out",))
    text = data_statistics(corpus, held_out, plan, tokenizer)
    trees = [corpus.stores[store].tree(row, 0) for store, row in corpus.rows.tolist()]
    expected = {
        "tokens per conversation": [len(tree.tokens) for tree in trees],
        "tokens per message": [length for tree in trees for length in tree.lengths.tolist()],
        "turns on the longest path": [max(len(tree.path_to(n)) for n in range(len(tree.parents))) for tree in trees],
        "paths per conversation": [len(set(range(len(t.parents))) - set(t.parents.tolist())) for t in trees],
        "replies to a message": [
            count for tree in trees for count in np.unique(tree.parents[1:], return_counts=True)[1].tolist()
        ],
    }
    for name, values in expected.items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        figures = np.percentile(values, (0, 50, 90, 100), method="nearest").astype(int).tolist()
        assert [int(word.replace(",", "")) for word in line.removeprefix(name).split()] == figures
    assert "0 of 44 held-out first turns also in training" in text


def test_the_plan_tells_the_share_of_repeated_tokens(plan_of, tokenizer, tmp_path):
    turns = [f"Is there tea number {number}, and is it still warm enough?" for number in range(60)]
    _, _, plan = plan_of(train=(chats(tmp_path / "long.jsonl", turns),))
    share = sum(plan.stream(bin).num_repeated for bin in plan.streams) / plan.tokens
    assert 0.2 < share < 0.5
    assert describe_streams(plan).endswith(f"supervised, {share:.1%} are repeated as context")
    assert describe_streams(plan_of(train=("quickstart",))[2]).endswith("of the tokens are supervised")


def test_duplicates_and_leaks_are_counted_and_shown(plan_of, tokenizer, tmp_path):
    rows = [
        {"message_id": f"{tree}{n}", "parent_id": f"{tree}0" if n else None, "role": role, "text": text}
        for tree in "abc"
        for n, (role, text) in enumerate([("user", f"Ask {'a' if tree < 'c' else 'c'}."), ("assistant", "Tea.")])
    ]
    flat = tmp_path / "flat.jsonl"
    flat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = chats(tmp_path / "held.jsonl", ("Ask a.", "Other."), ("New.", "Tea."), ("New too.", "New."))
    text = data_statistics(*plan_of(train=(f"{flat}@2",), eval=(held_out,)), tokenizer)
    assert "1 conversation and 2 supervised messages are word for word as another" in text
    assert '3 times "Tea."' in text
    assert "1 of 3 held-out first turns also in training" in text
    assert re.search(rf'"Ask a\." in {held_out} \w+ and {flat} a0', text)
    assert "1 of 3 held-out supervised messages also in training" in text


def test_a_very_deep_conversation(plan_of, tokenizer, tmp_path):
    deep = chats(tmp_path / "deep.jsonl", [f"Turn {n}." for n in range(2000)])
    corpus, _, plan = plan_of(train=(deep,))
    assert re.search(r"turns on the longest path +2,000 +2,000", data_statistics(corpus, None, plan, tokenizer))
    assert show_examples(plan, tokenizer, 2, width=100, colour=False).count("example ") == 2


def test_a_long_talk_stays_in_its_column(plan_of, tokenizer, tmp_path):
    talk = chats(tmp_path / "talk.jsonl", [f"Turn {n}." for n in range(12)])
    text = show_examples(plan_of(train=(talk,))[2], tokenizer, 9, width=60, colour=False)
    heads = [line for line in text.splitlines() if "positions" in line]
    assert [line[:3] for line in heads] == ["├─ "] * 11 + ["└─ "]
    assert "no more: 1 example in all" in text


def test_a_reply_that_leaks_from_a_plain_text_is_found(plan_of, tokenizer, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Tea leaks.", "Tea does not.")))
    held_out = chats(tmp_path / "held.jsonl", ("Does tea leak?", "Tea leaks."))
    text = data_statistics(*plan_of(train=(str(texts),), eval=(held_out,)), tokenizer)
    assert "1 of 1 held-out supervised message also in training" in text
    assert f'"Tea leaks." in {held_out}' in text
