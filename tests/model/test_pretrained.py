"""Weights in and out: folders of transformers in every layout, refusals by name, exports that transformers reads."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run
from safetensors.torch import load_file, save_file
from small_gpt2 import LENGTH, SHAPE, TOKENS, logits

from gpt2ft.model.gpt2 import GPT2, GPT2Config
from gpt2ft.model.pretrained import (
    ModelError,
    find_folder,
    read_config,
    read_weights,
    weights_digest,
    write_model,
)
from gpt2ft.settings.choices import PUBLISHED_MODELS

TOKEN_IDS = {"bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 56}


def rewrite(folder, change):
    """Replaces the tensors of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


class TestLayouts:
    """However a folder of transformers holds a GPT-2, its logits are theirs."""

    def test_one_file_with_prefix(self, folder, expected, read_gpt2):
        assert all(name.startswith("transformer.") for name in load_file(folder / "model.safetensors"))
        assert (logits(read_gpt2(folder)) - expected).abs().max() <= 1e-4

    def test_the_model_without_a_head_has_no_prefix(self, theirs, tmp_path, expected, read_gpt2):
        theirs.transformer.save_pretrained(tmp_path)
        assert "wte.weight" in load_file(tmp_path / "model.safetensors")
        assert (logits(read_gpt2(tmp_path)) - expected).abs().max() <= 1e-4

    def test_shards(self, theirs, tmp_path, expected, read_gpt2):
        theirs.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert not (tmp_path / "model.safetensors").exists()
        assert (logits(read_gpt2(tmp_path)) - expected).abs().max() <= 1e-4

    @pytest.mark.parametrize("prefix", ["transformer.", ""])
    def test_the_constants_of_old_checkpoints_are_passed_over(self, prefix, folder, expected, read_gpt2):
        def with_constants(tensors):
            tensors = {name.replace("transformer.", prefix): tensor for name, tensor in tensors.items()}
            for layer in range(2):
                tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
                tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            return tensors

        rewrite(folder, with_constants)
        assert (logits(read_gpt2(folder)) - expected).abs().max() <= 1e-4

    def test_a_head_that_is_the_embedding(self, folder, expected, read_gpt2):
        rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})
        assert (logits(read_gpt2(folder)) - expected).abs().max() <= 1e-4

    def test_half_precision_is_read_as_float32(self, folder):
        exact = load_file(folder / "model.safetensors")
        rewrite(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
        weights = read_weights(folder, read_config(folder))
        assert len(weights) == 2 + 2 * 12 + 2
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, exact[f"transformer.{name}"].bfloat16().float())

    def test_the_epsilon_of_the_norms_is_the_folders(self, transformers_gpt2, tmp_path, read_gpt2):
        theirs = transformers_gpt2(SHAPE, layer_norm_epsilon=0.5)
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = theirs(TOKENS[None]).logits[0]
        assert (logits(read_gpt2(tmp_path)) - expected).abs().max() <= 1e-4


class TestFindFolder:
    def test_a_model_folder_or_the_run_around_it(self, folder):
        assert find_folder(str(folder)) == folder
        folder.rename(folder.with_name("model"))
        assert find_folder(str(folder.parent)) == folder.with_name("model")

    def test_neither_a_folder_nor_a_published_name(self):
        names = ", ".join(PUBLISHED_MODELS)
        with pytest.raises(ModelError, match=f"must be a folder or one of quickstart, {names}, but 'bert' is neither"):
            find_folder("bert")

    @pytest.mark.parametrize(
        ("path", "meant"),
        [
            ("gpt2-meduim", "`gpt2-medium`"),
            ("quikstart", "`quickstart`"),
            ("my-run", "`runs/my-run`"),
            ("runs/my-rnu", "`runs/my-run`"),
            ("runs/other", None),
        ],
    )
    def test_a_name_that_is_nearly_one_is_answered_with_it(self, path, meant, tmp_path, monkeypatch):
        (tmp_path / "runs" / "my-run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError) as error:
            find_folder(path)
        assert ("did you mean" in str(error.value)) == (meant is not None)
        assert (meant or path) in str(error.value)

    def test_a_file_is_named_as_such(self, tmp_path):
        (tmp_path / "mine.jsonl").write_text("{}")
        with pytest.raises(ModelError, match=r"mine\.jsonl is a file"):
            find_folder(str(tmp_path / "mine.jsonl"))

    def test_a_run_that_has_not_finished(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(ModelError, match="is a run that has not finished: run the same command again"):
            find_folder(str(tmp_path))

    def test_a_checkpoint(self, tmp_path):
        (tmp_path / "state.json").write_text("{}")
        with pytest.raises(ModelError, match=r"is a checkpoint: `python launch/export.py .* --format hf"):
            find_folder(str(tmp_path))

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(ModelError, match=r"holds no config.json, so it is not a model folder"):
            find_folder(str(tmp_path))


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


def with_one_value(tensors, name, value):
    tensors[name].view(-1)[3] = value
    return tensors


BIAS = "transformer.h.1.mlp.c_fc.bias"
TENSORS = {
    "missing": (lambda t: without(t, BIAS), "lacks 1 parameter, the first is `h.1.mlp.c_fc.bias`"),
    "unknown": (
        lambda t: t | {"transformer.h.2.ln_1.weight": torch.ones(16)},
        "`transformer.h.2.ln_1.weight` is not a parameter of this GPT-2",
    ),
    "an adapter's": (
        lambda t: t | {"h.0.attn.c_attn.lora_A": torch.ones(2, 16)},
        "`h.0.attn.c_attn.lora_A` is not a parameter of this GPT-2",
    ),
    "misshapen": (lambda t: t | {BIAS: torch.ones(63)}, f"`{BIAS}` must have shape (64,), but has (63,)"),
    "transposed": (
        lambda t: t | {"transformer.h.0.mlp.c_fc.weight": torch.ones(64, 16)},
        "`transformer.h.0.mlp.c_fc.weight` must have shape (16, 64), but has (64, 16)",
    ),
    "not a number": (
        lambda t: with_one_value(t, BIAS, torch.nan),
        "`h.1.mlp.c_fc.bias` holds values that are not finite",
    ),
    "infinite": (
        lambda t: with_one_value(t, "transformer.wte.weight", -torch.inf),
        "`wte.weight` holds values that are not finite",
    ),
    "a head of its own": (
        lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] * 1.001},
        "`lm_head.weight` must equal `wte.weight` (GPT-2's head is tied), but differs",
    ),
    "a larger head": (
        lambda t: t | {"lm_head.weight": torch.ones(64, 16)},
        "`lm_head.weight` must equal `wte.weight` (GPT-2's head is tied), but differs",
    ),
}


def refusal(folder):
    """The sentence with which the weights of a folder are refused; it names the folder."""
    with pytest.raises(ModelError) as found:
        read_weights(folder, GPT2Config(*SHAPE))
    assert str(folder) in str(found.value)
    assert "\n" not in str(found.value)
    return str(found.value)


class TestWeightsRefused:
    @pytest.mark.parametrize("case", TENSORS)
    def test_by_tensor(self, case, folder):
        change, sentence = TENSORS[case]
        rewrite(folder, change)
        assert refusal(folder).endswith(sentence)

    @pytest.mark.parametrize("keep", [0, 5, 500, -1])
    def test_cut_short(self, keep, folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        assert f"{file} is not a readable safetensors file" in refusal(folder)

    def test_a_pickle_is_named_and_never_opened(self, folder):
        class Trap:
            def __reduce__(self):
                return Path.touch, (folder / "sprung",)

        (folder / "model.safetensors").unlink()
        assert refusal(folder).endswith("holds no model.safetensors")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        assert refusal(folder).endswith(
            "holds no model.safetensors: pytorch_model.bin is a pickle and is never opened here, "
            "save it again with safe_serialization=True"
        )
        assert not (folder / "sprung").exists()

    @pytest.mark.parametrize("name", ["../outside.safetensors", "sub/inside.safetensors", "missing.safetensors", 7])
    def test_an_index_that_names_no_file_of_the_folder(self, name, folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "inside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
        assert refusal(folder) == f"{index} names '{name}', which is not a file of this folder"

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
    def test_a_damaged_index(self, text, folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json must be JSON with a `weight_map`" in refusal(folder)

    def test_a_missing_shard_is_told_by_what_it_held(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path, max_shard_size="10KB")
        index = tmp_path / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        left_out = names["transformer.wpe.weight"]
        kept = {name: file for name, file in names.items() if file != left_out}
        assert kept
        index.write_text(json.dumps({"weight_map": kept}))
        assert "parameters, the first is `" in refusal(tmp_path)


OFFLINE = """
import sys
from pathlib import Path
from gpt2ft.model.pretrained import ModelError, download
from gpt2ft.settings.choices import PUBLISHED_MODELS

def attempt(name):
    try:
        print(download(name).name)
    except ModelError as error:
        print(error)

def cached(name, files):
    hub = PUBLISHED_MODELS[name]
    folder = Path(sys.argv[1], "hub", "models--" + hub.repository.replace("/", "--"), "snapshots", hub.revision)
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()

attempt("gpt2")
cached("distilgpt2", ["config.json", "vocab.json"])
attempt("distilgpt2")
cached("gpt2-medium", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
attempt("gpt2-medium")
"""


def test_a_published_name_without_a_network(tmp_path):
    """In a process of its own, because huggingface_hub reads its environment when it is imported."""
    environment = dict.fromkeys(name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_")))
    environment |= {"HF_HOME": tmp_path, "HF_HUB_OFFLINE": "1"}
    ended = run(["python", "-W", "ignore", "-c", OFFLINE, tmp_path], **environment)
    absent, incomplete, complete = ended.stdout.splitlines()
    begin = r"gpt2 is not in the cache and could not be downloaded \(.*\): put config.json, "
    assert re.match(begin, absent)
    assert "HF_HUB_OFFLINE" in absent
    assert "huggingface.co/openai-community/gpt2 into a folder" in absent
    assert absent.endswith("train from random weights with `--model.random_init true`")
    assert re.match(  # huggingface_hub 1 finds out by itself that files are missing, 2 does not
        r"the cached copy of distilgpt2 in .* lacks model.safetensors, merges.txt: download it"
        rf"|distil{begin}",
        incomplete,
    )
    assert complete == "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"


class TestWriteModel:
    """What is written is read by transformers, with our logits."""

    @pytest.fixture
    def ours(self):
        config = GPT2Config(64, 24, n_embd=16, n_layer=2, n_head=4, dropout=0.25)
        model = GPT2(config).initialize(torch.Generator().manual_seed(0)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        return model

    @pytest.fixture
    def written(self, ours, tmp_path):
        write_model(tmp_path, dict(ours.named_parameters()), replace(ours.config, vocab_size=60), TOKEN_IDS)
        return tmp_path

    def test_is_read_by_transformers(self, ours, written):
        transformers = pytest.importorskip("transformers")
        theirs, report = transformers.GPT2LMHeadModel.from_pretrained(written, output_loading_info=True)
        assert not any(report[kind] for kind in ("unexpected_keys", "mismatched_keys", "error_msgs"))
        assert set(report["missing_keys"]) <= {"lm_head.weight"}
        assert theirs.lm_head.weight is theirs.transformer.wte.weight
        assert theirs.dtype == torch.float32
        with torch.no_grad():
            found = theirs.eval()(TOKENS[None]).logits[0]
        assert found.shape == (LENGTH, 60)
        assert found.std() > 0.3
        assert (found - logits(ours)[:, :60]).abs().max() <= 1e-4
        config = theirs.config
        assert {name: getattr(config, name) for name in TOKEN_IDS} == TOKEN_IDS
        assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.25, 0.25, 0)

    def test_holds_the_ids_in_use_and_no_second_table(self, ours, written):
        tensors = load_file(written / "model.safetensors")
        assert len(tensors) == len(dict(ours.named_parameters()))
        assert "lm_head.weight" not in tensors
        assert torch.equal(tensors["transformer.wte.weight"], ours.wte.weight[:60])
        config = json.loads((written / "config.json").read_text())
        assert (config["vocab_size"], config["n_ctx"], config["n_positions"]) == (60, 24, 24)
        assert config["architectures"] == ["GPT2LMHeadModel"]

    def test_reads_back_bit_for_bit(self, ours, written):
        config = read_config(written)
        assert config == GPT2Config(60, 24, n_embd=16, n_layer=2, n_head=4)
        weights = read_weights(written, config)
        expected = dict(ours.named_parameters()) | {"wte.weight": ours.wte.weight[:60]}
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        assert weights_digest(weights) == weights_digest(expected)


def test_the_digest_knows_names_shapes_and_every_value():
    weights = {"a": torch.zeros(4), "b": torch.ones(2, 3)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2, 3)},
        {"a": torch.zeros(4), "b": torch.ones(3, 2)},
        {"a": torch.tensor([0, 0, 0, 1e-9]), "b": torch.ones(2, 3)},
        {"a": torch.zeros(4)},
    ]
    digests = {weights_digest(each) for each in [weights, *others]}
    assert len(digests) == 5
    assert weights_digest(dict(reversed(weights.items()))) == weights_digest(weights)
    assert weights_digest({"a": torch.zeros(4), "b": torch.ones(3, 2).t()}) == weights_digest(weights)
