"""lm-evaluation-harness on an exported model, by the line of the README: what both measure is the same."""

import importlib.util
import json
import math
import shlex
import sys

import pytest
import torch
from processes import ROOT, run

import gpt2ft
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.report.losses import plain_text

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is missing: pip install -e '.[dev]'"
    ),
]


@pytest.fixture(scope="module")
def measured(tiny_weights_folder, tmp_path_factory):
    """(results by task, samples by task) of the line in launch/README.md, on a model of 256 tokens of context."""
    folder = tmp_path_factory.mktemp("lm_eval")
    page = (ROOT / "launch" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = [line for line in page.splitlines() if line.startswith("lm_eval ")]
    words = [word.replace("tea-hf", str(tiny_weights_folder)) for word in shlex.split(line, comments=True)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": folder / "datasets"}
    run([sys.executable, "-m", *words, "--device", "cpu", "--output_path", folder, "--log_samples"], **offline)
    [results] = folder.glob("*/results_*.json")
    samples = {
        file.name.removeprefix("samples_").rpartition("_")[0]: [
            json.loads(sample) for sample in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in folder.glob("*/samples_*.jsonl")
    }
    return json.loads(results.read_text())["results"], samples


def test_bits_per_byte_of_plain_text(measured, tiny_weights_folder, accelerator):
    """Over texts longer than the context, which are read in windows."""
    results, _ = measured
    model = gpt2ft.load(str(tiny_weights_folder), precision="fp32")
    target_log_probs = TargetLogProbs(model.gpt2, len(model.tokenizer), "segments")
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "gpt2ft" / "report" / "texts").glob("*.txt")]
    losses = [plain_text(target_log_probs, text, model.tokenizer, accelerator) for text in texts]
    assert max(loss["tokens"] for loss in losses) > model.gpt2.config.n_positions
    nats = sum(loss["nats_per_token"] * loss["tokens"] for loss in losses)
    ours = nats / math.log(2) / sum(loss["bytes"] for loss in losses)
    assert results["plain_text"]["bits_per_byte,none"] == pytest.approx(ours, abs=1e-3)


def test_log_probs_of_replies_after_the_chat_template(measured, tiny_weights_folder):
    """Without the stop token, which the harness does not count."""
    _, samples = measured
    model = gpt2ft.load(str(tiny_weights_folder), precision="fp32")
    target_log_probs = TargetLogProbs(model.gpt2, len(model.tokenizer), "segments")
    for sample in samples["chat_preferences"][:5]:
        prompt = sample["doc"]["prompt"]
        messages = [
            {"role": "user", "content": prompt["text"]}, {"role": "assistant", "content": prompt["replies"][0]["text"]}
        ]  # fmt: skip
        stream = gpt2ft.tokenise(model, messages)
        with torch.no_grad():
            ours = target_log_probs(stream)[: stream.num_supervised - 1].double().sum().item()
        assert float(sample["filtered_resps"][0][0]) == pytest.approx(ours, abs=1e-3)
