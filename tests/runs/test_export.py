"""The exported folder in transformers, with nothing of ours: same ids, same log-probs."""

import json
import math
import random
import re
import shlex
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from gpt2ft.conversation import CHAT_ROLES
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.sources import read_trees
from gpt2ft.runs import evaluate_model
from gpt2ft.runs.finish import next_commands
from gpt2ft.runs.loaded_model import find_model
from gpt2ft.runs.output import Output
from gpt2ft.runs.samples import answer, held_out_prompts
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.sections import CorpusSettings, FilterSettings
from gpt2ft.settings.training import DataSettings
from gpt2ft.text.template import CHAT_TEMPLATE, TRAINING_TEMPLATE, render_prompt
from gpt2ft.text.tokenizer import ChatTokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run_folder(run_sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    run_sft(folder, steps=6)
    return folder


@pytest.fixture(scope="module")
def theirs(run_folder):
    """transformers' model and tokenizer."""
    folder = run_folder / "model"
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def test_the_files(run_folder):
    for name in ("model", "best"):
        folder = run_folder / name
        config = json.loads((folder / "config.json").read_text())
        tokenizer = ChatTokenizer.from_folder(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            names = set(tensors.keys())
            assert "lm_head.weight" not in names
            assert tensors.get_slice("transformer.wte.weight").get_shape()[0] == len(tokenizer) == config["vocab_size"]
        assert config["n_ctx"] == config["n_positions"] == 256
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [tokenizer.end_id, tokenizer.end_of_text_id]
        assert (folder / "chat_template.jinja").read_text() == TRAINING_TEMPLATE
        assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE
        assert tokenizer.has_chat_tokens


def test_ids_equal_their_chat_template_on_1000_random_conversations(run_folder, theirs):
    tokenizer = ChatTokenizer.from_folder(run_folder / "model")
    draw = random.Random(0)
    alphabet = "abc ABC 123 .,!? \n\t'é日本🙂 tea kettle "
    lengths = set()
    for _ in range(1000):
        turns = [
            (draw.choice(CHAT_ROLES), "".join(draw.choices(alphabet, k=draw.randrange(40))))
            for _ in range(draw.randrange(1, 7))
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        for template in (None, CHAT_TEMPLATE):  # that of chat_template.jinja, and that of tokenizer_config.json
            settings = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
            ids = theirs[1].apply_chat_template(messages, **settings)
            assert ids == render_prompt(tokenizer, turns)
        lengths.add(len(ids))
    assert len(lengths) > 50


@torch.no_grad()
def test_log_probs_equal_those_of_evaluate(run_folder, theirs, tmp_path, capsys):
    """Each assistant turn scored once by transformers, below all the turns above it."""
    report_file = tmp_path / "report.json"
    settings = EvaluateSettings(
        model=str(run_folder), data=("quickstart:held_out",), report=str(report_file), cache=str(tmp_path / "cache")
    )
    evaluate_model.run(settings)
    report = json.loads(report_file.read_text())["total"]

    model, tokenizer = theirs
    nats, tokens, text_bytes = 0.0, 0, 0
    for tree in read_trees("quickstart:held_out", FilterSettings()):
        for index, message in enumerate(tree.messages):
            if message.role != "assistant":
                continue
            turns = [
                {"role": turn.role, "content": turn.text}
                for turn in (tree.messages[above] for above in tree.path_to(index))
            ]
            above = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
            ids = torch.tensor(tokenizer.apply_chat_template(turns, return_dict=False))
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
            scored = torch.arange(len(above), len(ids))
            nats -= float(log_probs[scored - 1, ids[scored]].double().sum())
            tokens += len(scored)
            text_bytes += len(message.text.encode())
    assert tokens == report["tokens"] > 1000
    assert report["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert "quickstart:held_out" in capsys.readouterr().out


def test_the_figures_do_not_depend_on_batch_size(run_folder, tmp_path):
    found = []
    for size in (256, 1024, 4096):
        report = tmp_path / f"{size}.json"
        evaluate_model.run(
            EvaluateSettings(
                model=str(run_folder / "model"),
                data=("quickstart:held_out",),
                tokens_per_micro_batch=size,
                report=str(report),
                cache=str(tmp_path / "cache"),
            )
        )
        found.append(json.loads(report.read_text())["total"]["nats_per_token"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_the_next_commands_talk_and_compare_the_run_with_its_start(run_folder, monkeypatch):
    """Parsed as a shell and the script would: the same data, filters and context."""
    monkeypatch.setattr(sys, "argv", ["launch/sft.py"])
    policy, _ = find_model(str(run_folder))
    data = {"train": ["a"], "eval": ["it's.jsonl", "b"], "max_rank": 0, "languages": ["en", "de"], "max_length": 128}
    settings = SFTSettings(
        data=data
        | {
            "reviewed_only": False,
            "on_error": "skip",
            "topic_replies": "tea.txt",
            "ignore_keys": ["a", "b"],
            "cache": "c",
        }
    )
    chat, evaluation = next_commands(settings, policy, Output(str(run_folder)))
    assert shlex.split(chat) == ["python", "launch/chat.py", str(run_folder)]
    program, script, *arguments = shlex.split(evaluation)
    assert (program, script) == ("python", "launch/evaluate.py")
    parsed = parse_script(EvaluateSettings, "model", arguments)
    assert parsed.models == (settings.model.path, str(run_folder))
    assert parsed.output == str(run_folder / "report")
    assert parsed.data == settings.data.eval
    for name in (*CorpusSettings.model_fields, "max_length"):
        assert getattr(parsed, name) == getattr(settings.data, name)
    from_nothing = SFTSettings(data={"train": ["a"], "eval": ["b"]}, model={"random_init": True})
    *_, evaluation = next_commands(from_nothing, policy, Output(str(run_folder)))
    assert parse_script(EvaluateSettings, "model", shlex.split(evaluation)[2:]).models == (str(run_folder),)


def test_adherence_to_a_topic(tmp_path, capsys):
    """Counted by whole words, whatever their case, in the replies of a model, here of one with random weights."""
    policy, _ = find_model("quickstart", random_init=True)
    held_out, _ = load_corpora(DataSettings(train=("quickstart:held_out",)), policy.tokenizer)
    replies = [sample.reply for sample in answer(policy, held_out_prompts(held_out, policy, 12, 10), 10)]
    words = Counter(word for reply in replies for word in set(re.findall(r"\w+", reply.lower())))
    word = next(word for word, number in words.most_common() if 0 < number < 12)
    report = tmp_path / "report.json"
    common = {"model": "quickstart", "random_init": True, "data": ("quickstart:held_out",), "report": str(report)}
    evaluate_model.run(EvaluateSettings(**common, topic=(word.upper(),), topic_prompts=12, max_new_tokens=10))
    figures = json.loads(report.read_text())["topic"]
    assert figures["prompts"] == 12
    assert figures["on_topic"] == words[word]
    assert f"topic: {words[word]} of 12 replies" in capsys.readouterr().out
    evaluate_model.run(EvaluateSettings(**common, topic=(word[:-1] + "~",), topic_prompts=12, max_new_tokens=10))
    assert json.loads(report.read_text())["topic"]["on_topic"] == 0


def test_a_checkpoint_evaluates_as_the_model_exported_from_it(run_folder, tmp_path):
    found = []
    for model in (run_folder, run_folder / "checkpoints" / "step-00000006"):
        report = tmp_path / "report.json"
        evaluate_model.run(
            EvaluateSettings(
                model=str(model), data=("quickstart:held_out",), report=str(report), cache=str(tmp_path / "cache")
            )
        )
        found.append(json.loads(report.read_text())["total"]["nats_per_token"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
