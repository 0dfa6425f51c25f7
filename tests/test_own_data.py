"""The other first thing: a file of one's own, one line, and a model that answers from it."""

import csv
import re

import pytest
from processes import run

from gpt2ft.runs.loaded_model import find_model
from gpt2ft.runs.samples import answer

NAMES = "Arlo Bessa Cato Dilla Enzo Fenna Gorm Hilde Ivor Juno Kasper Lotte Milo Nora Otto Petra Quinn Rosa Sven Tilda"
TRADES = ("baker", "sailor", "nurse", "farmer", "pilot", "painter", "tailor")


@pytest.mark.long
def test_a_file_and_one_line_make_a_model_that_answers_from_it(tmp_path):
    """On fewer steps than the recipe makes of such a file."""
    pairs = [(f"What does {name} do?", f"{name} is a {TRADES[n % 7]}.") for n, name in enumerate(NAMES.split())]
    with (tmp_path / "faq.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer"), *pairs])
    output = tmp_path / "run"
    line = ["python", "launch/sft.py", "my-data", "--data.train", tmp_path / "faq.csv", "--output", output]
    done = run([*line, "--training.min_steps", 60], COLUMNS="200", seconds=300)
    trained = int(re.search(r"(\d+) of\s+20 conversations", done.stdout)[1])
    assert 17 <= trained < 20
    assert "the run takes about" in " ".join(done.stdout.split())
    loaded, _ = find_model(str(output))
    replies = answer(loaded, [[("user", question)] for question, _ in pairs], 30)
    right = [sample.reply == reply for sample, (_, reply) in zip(replies, pairs, strict=True)]
    assert sum(right) >= trained - 1
