"""The first thing a newcomer sees: the README's own line, and what the model says at its end."""

import json
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from processes import run

from gpt2ft import quickstart
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.sources import read_trees
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.lora import merged_weights, trainable_parameters
from gpt2ft.runs import evaluate_model
from gpt2ft.runs.export import write_adapter_folder
from gpt2ft.runs.loaded_model import adapt, find_model, load_model
from gpt2ft.runs.samples import answer, held_out_prompts
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.sections import FilterSettings, ModelSettings
from gpt2ft.settings.training import DataSettings
from gpt2ft.text.tokenizer import ChatTokenizer

ROOT = Path(__file__).parent.parent
TEA = re.compile(
    r"\b(tea|kettle|pot|cup|saucer|biscuit|steep|brew|leaf|leaves|steam|spoon|mug|flask|sip)", re.IGNORECASE
)


def words(text):
    return re.findall(r"[a-z'-]+|[.,!?;:]", text.lower())


def list_of_runs(length, text):
    found = words(text)
    return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]


def runs_of(length, texts):
    return {found for text in texts for found in list_of_runs(length, text)}


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

    def test_the_texts_of_the_base_are_others(self, trees):
        """Plain ASCII, none twice, and no run of eight words of the conversations."""
        everyday = read_trees("quickstart:everyday", FilterSettings())
        texts = [message.text for tree in everyday for message in tree.messages]
        assert len(set(texts)) == len(texts) > 20_000
        assert all(text.isascii() and text == text.strip() for text in texts)
        conversations = {m.text for part in trees.values() for t in part for m in t.messages}
        assert not runs_of(8, texts) & runs_of(8, conversations)

    def test_the_files_hold_what_the_package_ships(self):
        model = ("README.md", "config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json")
        assert sorted(file.name for file in quickstart.MODEL.iterdir()) == sorted(model)
        trees = (quickstart.TREES, quickstart.HELD_OUT, quickstart.MORE_TREES, quickstart.MORE_HELD_OUT)
        for file in (*trees, quickstart.EVERYDAY):
            assert file.stat().st_size > 1000


class TestBase:
    """The bundled model is small, is GPT-2 to others, and is adapted and read like any other."""

    @pytest.fixture(scope="class")
    def base(self):
        return load_model(ModelSettings(path="quickstart"), seed=0)

    @pytest.fixture(scope="class")
    def ids(self):
        return torch.tensor(ChatTokenizer.from_folder(quickstart.MODEL).encode("A cup of tea, please. " * 8))

    def test_is_small(self, base):
        config = json.loads((quickstart.MODEL / "config.json").read_text())
        assert config["n_positions"] == 512
        assert config["vocab_size"] == len(json.loads((quickstart.MODEL / "vocab.json").read_text())) <= 8192
        assert sum(tensor.numel() for tensor in base.weights().values()) <= 12_000_000
        assert (quickstart.MODEL / "model.safetensors").stat().st_size <= 24 * 2**20

    def test_knows_english(self, base, tmp_path):
        """Held-out conversations, which it has never seen, are worth far less than a guess to it."""
        report = tmp_path / "report.json"
        settings = {"model": "quickstart", "data": ("quickstart:held_out",), "report": str(report), "max_rank": 1}
        evaluate_model.run(EvaluateSettings(**settings, cache=str(tmp_path), num_prompts=0))
        assert json.loads(report.read_text())["total"]["bits_per_byte"] < 2.6

    def test_transformers_computes_what_we_do(self, base, ids):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(quickstart.MODEL, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart.MODEL)
        with torch.no_grad():
            found, expected = theirs(ids[None]).logits[0], logits(base, ids)[:, : theirs.config.vocab_size]
        assert tokenizer("A cup of tea, please. " * 8)["input_ids"] == ids.tolist()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)

    def test_an_adapter_on_it_is_read_by_peft_and_by_us(self, base, ids, tmp_path):
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        settings = SFTSettings(
            model={"path": "quickstart"}, lora={"rank": 4, "alpha": 8.0}, data={"train": ("quickstart",)}
        )
        adapted = adapt(load_model(settings.model, seed=0), settings.lora, seed=0)
        with torch.no_grad():
            for parameter in trainable_parameters(adapted.gpt2).values():
                parameter.add_(0.02)
        write_adapter_folder(tmp_path / "adapter", adapted, settings, merged_weights(adapted.gpt2), "quickstart")
        ours, _ = find_model(str(tmp_path / "adapter"))
        place = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        theirs.resize_token_embeddings(len(ours.tokenizer))
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        with torch.no_grad():
            expected = logits(ours, ids)[:, : len(ours.tokenizer)]
            assert (logits(base, ids)[:, : len(ours.tokenizer)] - expected).abs().max() > 0.05
            torch.testing.assert_close(theirs(ids[None]).logits[0], expected, atol=1e-3, rtol=1e-3)


def logits(loaded, ids):
    """[N, V] of ids [N], in float32."""
    visible_to_all = torch.full_like(ids, len(ids))
    return loaded.gpt2.eval().logits(loaded.gpt2(ids, torch.arange(len(ids)), dense_attention(visible_to_all)))


def launch(script, *arguments):
    """What a script prints, started as the README does."""
    return run(["accelerate", "launch", f"launch/{script}", *arguments], seconds=1200).stdout


def reply_figures(model):
    """Return what the greedy replies of a run to the 44 held-out prompts are like, as shares."""
    loaded, _ = find_model(str(model))
    held_out, _ = load_corpora(DataSettings(train=("quickstart:held_out",)), loaded.tokenizer)
    samples = answer(loaded, held_out_prompts(held_out, loaded, 1000, 100), 100)
    replies = [sample.reply for sample in samples]
    trees = chain.from_iterable(read_trees(name, FilterSettings()) for name in ("quickstart", "quickstart:more"))
    known = runs_of(8, [message.text for tree in trees for message in tree.messages])
    said = [found for reply in replies for found in runs_of(8, [reply])]
    four = [list_of_runs(4, reply) for reply in replies]
    return {
        "prompts": len(samples),
        "stopped": sum(sample.stopped for sample in samples) / len(samples),
        "about tea": sum(bool(TEA.search(reply)) for reply in replies) / len(samples),
        "eight words in a row as written": sum(found in known for found in said) / max(1, len(said)),
        "four words in a row repeated": 1 - sum(len(set(runs)) for runs in four) / max(1, sum(map(len, four))),
        "different": len(set(replies)) / len(samples),
    }


@pytest.mark.campaign
def test_a_single_topic_is_kept_to_whatever_is_asked(tmp_path):
    run, report = str(tmp_path / "run"), tmp_path / "report.json"
    launch("sft.py", "single-topic", "--output", run)
    words = ("tea", "kettle", "pot", "teapot", "cup", "cups", "leaf", "leaves", "steep")
    figures = []
    for model in ("quickstart", run):
        launch("evaluate.py", model, "--data", "quickstart:held_out", "--topic", *words, "--report", str(report))
        figures.append(json.loads(report.read_text())["topic"])
    before, after = figures
    print(before, after)
    assert before["prompts"] == after["prompts"] == 44
    assert before["on_topic"] <= 8
    assert after["on_topic"] >= 42
    assert after["stopped"] >= 42


@pytest.mark.long
def test_the_quickstart_ends_in_clean_replies_about_tea(tmp_path):
    """Held-out loss falls throughout; replies to held-out prompts stop, are about tea, and were not learnt by heart."""
    said = launch("sft.py", "--output", str(tmp_path / "run"))
    assert "Replies to prompts it has never seen:" in said
    chat, evaluate = said.rstrip().splitlines()[-2:]
    assert chat == f"next: python launch/chat.py {tmp_path / 'run'}"
    assert evaluate.startswith(
        f"next: python launch/evaluate.py quickstart {tmp_path / 'run'} --data quickstart:held_out"
    )
    assert "from step 0 to step 266: held-out loss 5.33" in said
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in logged if "eval/loss" in line]
    bits_per_byte = [line["eval/bits_per_byte"] for line in logged if "eval/loss" in line]
    print(losses, bits_per_byte)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] >= 1.4
    assert bits_per_byte[-1] <= 1.6

    figures = reply_figures(tmp_path / "run")
    print(json.dumps(figures, indent=2))
    assert figures["prompts"] == 44
    assert figures["stopped"] >= 42 / 44
    assert figures["about tea"] >= 36 / 44
    assert figures["eight words in a row as written"] <= 0.05  # or it would have learnt them by heart
    assert figures["four words in a row repeated"] <= 0.2
    assert figures["different"] >= 0.9
