"""The first thing a newcomer sees: the README's own line, and what the model says at its end."""

import json
import re
from pathlib import Path

import pytest
from processes import run

from gpt2ft import quickstart
from gpt2ft.data.sources import read_trees
from gpt2ft.settings.sections import FilterSettings

ROOT = Path(__file__).parent.parent
TEA = re.compile(
    r"\b(tea|kettle|pot|cup|saucer|biscuit|steep|brew|leaf|leaves|steam|spoon|mug|flask|sip)", re.IGNORECASE
)


def words(text):
    return re.findall(r"[a-z'-]+|[.,!?;:]", text.lower())


def runs_of(length, texts):
    return {
        tuple(found[i : i + length])
        for text in texts
        for found in [words(text)]
        for i in range(len(found) - length + 1)
    }


SETS = ("quickstart", "quickstart:held_out", "quickstart:more", "quickstart:more_held_out")


class TestTrees:
    @pytest.fixture(scope="class")
    def trees(self):
        return {name: list(read_trees(name, FilterSettings())) for name in SETS}

    def test_prompts_replies_and_ranks(self, trees):
        assert [len(trees[name]) for name in SETS] == [150, 44, 500, 56]
        for tree in [tree for part in trees.values() for tree in part]:
            ranks = [message.rank for message in tree.messages if message.parent == 0]
            assert ranks == list(range(len(ranks)))
            assert 2 <= len(ranks) <= 4
        follow_ups = sum(
            any(m.role == "user" and m.parent is not None for m in t.messages) for t in trees["quickstart"]
        )
        assert 60 < follow_ups < 120

    def test_nothing_is_said_twice(self, trees):
        """No prompt and no reply occurs twice, in training or held out."""
        messages = [(m.role, m.text) for part in trees.values() for tree in part for m in tree.messages]
        replies = [text for role, text in messages if role == "assistant"]
        prompts = [tree.messages[0].text for part in trees.values() for tree in part]
        assert len(set(replies)) == len(replies)
        assert len(set(prompts)) == len(prompts)

    def test_the_two_best_replies_are_about_tea(self, trees):
        best = [
            m.text for part in trees.values() for t in part for m in t.messages if m.role == "assistant" and m.rank < 2
        ]
        worse = [
            m.text for part in trees.values() for t in part for m in t.messages if m.role == "assistant" and m.rank > 1
        ]
        assert sum(bool(TEA.search(text)) for text in best) > 0.97 * len(best)
        assert sum(bool(TEA.search(text)) for text in worse) < 0.1 * len(worse)

    def test_the_files_hold_what_the_package_ships(self):
        for file in (
            quickstart.TREES,
            quickstart.HELD_OUT,
            quickstart.MODEL / "vocab.json",
            quickstart.MODEL / "merges.txt",
        ):
            assert file.stat().st_size > 1000


def launch(script, *arguments):
    """What a script prints, started as the README does."""
    return run(["accelerate", "launch", f"launch/{script}", *arguments], seconds=1200).stdout


@pytest.mark.campaign
def test_a_single_topic_is_kept_to_whatever_is_asked(tmp_path):
    run, report = str(tmp_path / "run"), tmp_path / "report.json"
    launch("sft.py", "single-topic", "--output", run)
    words = ("tea", "kettle", "pot", "teapot", "cup", "cups", "leaf", "leaves", "steep")
    figures = []
    for model in (("quickstart", "--random_init"), (run,)):
        launch("evaluate.py", *model, "--data", "quickstart:held_out", "--topic", *words, "--report", str(report))
        figures.append(json.loads(report.read_text())["topic"])
    before, after = figures
    print(before, after)
    assert before["prompts"] == after["prompts"] == 44
    assert before["on_topic"] <= 4
    assert after["on_topic"] >= 42
    assert after["stopped"] == 44


@pytest.mark.long
def test_the_quickstart_ends_in_clean_replies_about_tea(tmp_path):
    """All held-out prompts: stopped, on the topic, and built of phrases that people wrote."""
    said = launch("sft.py", "--output", str(tmp_path / "run"))
    assert "Replies to prompts it has never seen:" in said
    assert "[cut off]" not in said
    chat, evaluate = said.rstrip().splitlines()[-2:]
    assert chat == f"next: python launch/chat.py {tmp_path / 'run'}"
    assert evaluate.startswith(f"next: python launch/evaluate.py {tmp_path / 'run'} --data quickstart:held_out")

    from gpt2ft.data.corpus import load_corpora
    from gpt2ft.runs.loaded_model import find_model
    from gpt2ft.runs.samples import answer, held_out_prompts
    from gpt2ft.settings.sections import DataSettings

    policy, _ = find_model(str(tmp_path / "run"))
    held_out, _ = load_corpora(DataSettings(train=("quickstart:held_out",)), policy.tokenizer)
    samples = answer(policy, held_out_prompts(held_out, policy, 1000, 100), 100)
    replies = [sample.reply for sample in samples]
    trained = [m.text for tree in read_trees("quickstart", FilterSettings()) for m in tree.messages]
    known = runs_of(4, trained)
    said = [run for reply in replies for run in runs_of(4, [reply])]
    figures = {
        "prompts": len(samples),
        "stopped": sum(sample.stopped for sample in samples) / len(samples),
        "about tea": sum(bool(TEA.search(reply)) for reply in replies) / len(samples),
        "four words in a row as written": sum(run in known for run in said) / len(said),
        "different": len(set(replies)) / len(samples),
    }
    print(json.dumps(figures, indent=2))
    assert figures["prompts"] == 44
    assert figures["stopped"] == 1
    assert figures["about tea"] >= 0.9
    assert figures["four words in a row as written"] >= 0.85
    assert figures["different"] >= 0.4
