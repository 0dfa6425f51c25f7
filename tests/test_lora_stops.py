"""Adapters learn to stop as all weights do: the rows of the chat tokens are trained along."""

import json
from pathlib import Path

import pytest
from processes import run

from gpt2ft.data.sources import read_trees
from gpt2ft.settings.sections import FilterSettings

ROOT = Path(__file__).parent.parent
TRAINING = ["--model.dropout", "0", "--training.sample_prompts", "0"]


def launch(script, *arguments):
    run(["python", f"launch/{script}", *arguments], seconds=1200)


def stop_rate(model, report):
    launch("evaluate.py", model, "--data", "quickstart:held_out", "--topic", "tea", "--report", report)
    figures = json.loads(report.read_text())["topic"]
    assert figures["prompts"] == 44
    return figures["stopped"] / figures["prompts"]


@pytest.mark.campaign
def test_a_model_tuned_by_lora_stops_as_one_tuned_in_full(tmp_path):
    """On a base that knows the words of the quickstart as plain text, and nothing of turns."""
    texts = [message.text for tree in read_trees("quickstart", FilterSettings()) for message in tree.messages]
    documents = [" ".join(texts[start : start + 12]) for start in range(0, len(texts), 12)]  # too long to end soon
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    plain_text = ["--data.train", tmp_path / "texts.jsonl", "--data.eval", "--data.max_rank", "None"]
    plain_text += ["--training.eval_every", "None", "--training.epochs", "8"]
    launch("sft.py", "quickstart", *TRAINING, *plain_text, "--output", tmp_path / "base")
    rates = {"base": stop_rate(tmp_path / "base", tmp_path / "report.json")}
    chat = ["--model.path", tmp_path / "base", "--model.random_init", "false", "--training.eval_every", "None"]
    chat += ["--training.steps", "200"]
    for name, settings in {"full": [], "lora": ["--lora.rank", "8", "--optimizer.learning_rate", "0.01"]}.items():
        launch("sft.py", "quickstart", *TRAINING, *chat, *settings, "--output", tmp_path / name)
        rates[name] = stop_rate(tmp_path / name, tmp_path / "report.json")
    print(rates)
    assert rates["base"] <= 0.2
    assert rates["full"] >= 0.9
    assert rates["lora"] >= rates["full"] - 0.05
