"""Models as people have them: vocabularies without an end of text, adapters that added a token, words in a reply."""

import codecs
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ft.inference.generate import generate
from gpt2ft.inference.model import InferenceModel
from gpt2ft.inference.prompt_format import prompt_format_for
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.peft import WEIGHTS
from gpt2ft.model.pretrained import ADAPTER_CONFIG, ModelError
from gpt2ft.runs.loaded_model import adapt, load_model
from gpt2ft.settings.sections import LoRASettings, ModelSettings

peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

MERGES = ["t h", "th e", "Ġ t", "e a", "Ġt ea"]
IDS = torch.tensor([4, 70, 256, 9, 258, 30, 257])


@torch.no_grad()
def disturb(parameters):
    random = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter += 0.3 * torch.randn(parameter.shape, generator=random)


def write_lists(folder, control):
    """vocab.json and merges.txt with the control tokens first, which added_tokens.json names."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [*control, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(names)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({name: id for id, name in enumerate(control)}))
    return len(names)


@pytest.fixture
def model_folder(tmp_path):
    """model_folder(control, more_rows=0, **config): a tiny GPT-2 of transformers and its vocabulary."""

    def make(control, more_rows=0, **config):
        folder = tmp_path / "model"
        rows = write_lists(folder, control) + more_rows
        shape = {"vocab_size": rows, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **config))
        disturb(model.parameters())
        model.save_pretrained(folder)
        return folder

    return make


def load(folder, seed=0):
    return load_model(ModelSettings(path=str(folder)), seed)


@torch.no_grad()
def log_probs(loaded, ids=IDS):
    gpt2 = loaded.gpt2.eval()
    hidden = gpt2(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids))))
    return gpt2.logits(hidden)[:, : len(loaded.tokenizer.known)].log_softmax(-1)


@torch.no_grad()
def their_log_probs(model, ids=IDS):
    return model.eval()(ids[None]).logits[0].log_softmax(-1)


class TestNoEndOfText:
    CONTROL = ("<s>", "<pad>", "</s>")

    def check(self, folder, source):
        loaded = load(folder)
        tokenizer, table = loaded.tokenizer, loaded.gpt2.wte.weight
        new = [tokenizer.end_of_text_id, *tokenizer.role_ids.values(), tokenizer.end_id]
        assert new == list(range(264, 269))
        assert table.isfinite().all()
        assert torch.equal(table[:264], load_file(folder / "model.safetensors")["transformer.wte.weight"])
        rows = table[new]
        mean, spread = table[:264].mean(0), table[:264].std(0)
        near_the_mean = ((rows - mean).abs() < 0.6 * spread).all(1).tolist()
        assert near_the_mean == [source is None, True, True, True, source is None]
        if source is not None:
            assert torch.equal(rows[0], table[source])
            assert torch.equal(rows[4], table[source])
        return loaded

    @pytest.mark.parametrize(("eos", "source"), [(2, 2), ([2, 1], 2), (0, 0)])
    def test_the_ends_start_from_the_models_own_end(self, eos, source, model_folder):
        loaded = self.check(model_folder(self.CONTROL, eos_token_id=eos), source)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(loaded.source)
        torch.testing.assert_close(log_probs(loaded), their_log_probs(theirs), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("eos", [None, 50256, 264, 268, 30, [], "2"])
    def test_what_is_no_control_token_is_no_end(self, eos, model_folder):
        folder = model_folder(self.CONTROL)
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": eos}
        (folder / "config.json").write_text(json.dumps(config))
        self.check(folder, None)

    def test_an_adapter_carries_the_row_of_the_end_of_text(self, model_folder):
        """Its start is random, and the base has none to fall back on."""
        loaded = adapt(load(model_folder(self.CONTROL)), LoRASettings(rank=2), seed=0)
        assert loaded.tokenizer.end_of_text_id in loaded.gpt2.wte.row_ids

    def test_with_an_end_of_text_it_carries_the_chat_tokens_alone(self, model_folder):
        loaded = adapt(load(model_folder(("<|endoftext|>",))), LoRASettings(rank=2), seed=0)
        tokenizer = loaded.tokenizer
        assert loaded.gpt2.wte.row_ids.tolist() == [*tokenizer.role_ids.values(), tokenizer.end_id]


class TestAdaptersThatAddedTokens:
    @pytest.fixture
    def trained(self, model_folder, tmp_path):
        """trained(added, **resize): a folder that PEFT leaves, and its log-probs."""

        def make(added, more_rows=0, indices=None, **resize):
            base = model_folder(("<|endoftext|>",), more_rows)
            (base / "added_tokens.json").unlink()
            tokenizer = transformers.GPT2Tokenizer.from_pretrained(base)
            tokenizer.add_tokens([token for token in added if not token.startswith("[")])
            tokenizer.add_special_tokens({"additional_special_tokens": [token for token in added if token[0] == "["]})
            model = transformers.GPT2LMHeadModel.from_pretrained(base)
            resized = resize.pop("resized", True)
            if resized:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False, **resize)
            settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
            model = peft.get_peft_model(model, peft.LoraConfig(trainable_token_indices=indices, **settings))
            tables = {id(parameter) for parameter in [model.get_input_embeddings().weight] if resized}
            disturb(p for p in model.parameters() if p.requires_grad or id(p) in tables)
            model.save_pretrained(tmp_path / "adapter")
            tokenizer.save_pretrained(tmp_path / "adapter")
            return tmp_path / "adapter", model

        return make

    @pytest.mark.parametrize(
        ("added", "resize"),
        [
            (("[PAD]",), {}),
            (("[PAD]", "glorbnax", "[SEP]"), {}),
            (("[PAD]",), {"pad_to_multiple_of": 64}),
            (("[PAD]", "glorbnax"), {"indices": [262, 263]}),
            (("[PAD]",), {"more_rows": 8}),
        ],
    )
    def test_the_table_grows_by_what_the_adapter_adds(self, added, resize, trained):
        folder, theirs = trained(added, **resize)
        loaded = load(folder)
        assert len(loaded.tokenizer.known) == 262 + len(added)
        ids = torch.tensor([*IDS.tolist(), 262, 262 + len(added) - 1, 4])
        expected = their_log_probs(theirs, ids)[:, : 262 + len(added)].log_softmax(-1)
        torch.testing.assert_close(log_probs(loaded, ids), expected, atol=1e-4, rtol=1e-4)
        assert (expected[:7] - log_probs(load(folder.parent / "model"))[:, :1]).abs().max() > 0.1
        assert {name for name in added if name[0] == "["} == loaded.tokenizer.known.control_ids.keys() - {
            "<|endoftext|>"
        }
        assert loaded.tokenizer.end_id == 262 + len(added) + 3
        text = "the glorbnax tea"
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded.tokenizer.encode(text) == theirs(text).input_ids

    def test_a_row_that_was_not_resized_is_the_bases(self, trained):
        folder, theirs = trained(("[PAD]",), more_rows=2, resized=False)
        loaded = load(folder)
        expected = their_log_probs(theirs)[:, :263].log_softmax(-1)
        torch.testing.assert_close(log_probs(loaded), expected, atol=1e-4, rtol=1e-4)

    def test_the_larger_tokenizer_counts(self, trained):
        """The base knows [PAD], the tokenizer beside the adapter does not."""
        folder, _ = trained(("[PAD]",), more_rows=1, resized=False)
        (folder / "tokenizer.json").rename(folder.parent / "model" / "tokenizer.json")
        for name in ("vocab.json", "merges.txt"):
            (folder / name).write_bytes((folder.parent / "model" / name).read_bytes())
            (folder.parent / "model" / name).unlink()
        assert load(folder).tokenizer.known.control_ids["[PAD]"] == 262

    def test_a_row_that_nobody_holds_is_named(self, trained):
        folder, _ = trained(("[PAD]",))
        tensors = {name: t for name, t in load_file(folder / WEIGHTS).items() if "lora_" in name}
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ModelError, match="lacks the one of id 262"):
            load(folder)

    def test_rows_without_a_tokenizer_are_refused(self, trained):
        folder, _ = trained(("[PAD]",))
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="262, but has 263, .* tokenizer"):
            load(folder)

    def spoiled(self, vocabulary, kind):
        ids = vocabulary["model"]["vocab"]
        if kind == "ids exchanged":
            ids["!"], ids['"'] = ids['"'], ids["!"]
        elif kind == "a merge less":
            vocabulary["model"]["merges"].pop()
            id = ids.pop("Ġtea")
            vocabulary["added_tokens"].append({"id": id, "content": "<x>", "special": True})
        elif kind == "a control token as a word":
            vocabulary["added_tokens"][0] |= {"content": "<|other|>", "special": False}
            ids["<|other|>"] = ids.pop("<|endoftext|>")
        return vocabulary

    @pytest.mark.parametrize("kind", ["ids exchanged", "a merge less", "a control token as a word"])
    def test_other_meanings_are_refused(self, kind, trained):
        folder, _ = trained(("[PAD]",))
        (folder / "tokenizer_config.json").unlink()
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(self.spoiled(json.loads(file.read_text()), kind)))
        with pytest.raises(ModelError, match="another tokenizer than its base"):
            load(folder)

    def test_a_byte_order_mark_in_any_of_its_files_is_harmless(self, trained):
        folder, _ = trained(("[PAD]", "glorbnax"))
        plain = load(folder)
        files = [*Path(folder).glob("*.json"), *(folder.parent / "model").glob("*.json")]
        assert {ADAPTER_CONFIG, "config.json", "tokenizer.json", "vocab.json"} <= {file.name for file in files}
        for file in files:
            file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
        marked = load(folder)
        assert (marked.digest, marked.tokenizer.digest) == (plain.digest, plain.tokenizer.digest)


def test_a_model_says_an_added_word(model_folder):
    folder = model_folder(("<|endoftext|>",), more_rows=1)
    (folder / "added_tokens.json").write_text('{"glorbnax": 262}')
    loaded = load(folder)
    with torch.no_grad():  # whatever it is asked, it says this word
        loaded.gpt2.ln_f.weight.zero_()
        loaded.gpt2.ln_f.bias.copy_(10 * loaded.gpt2.wte.weight[262])
    tokenizer = loaded.tokenizer
    model = InferenceModel(loaded.gpt2.eval(), tokenizer, prompt_format_for(tokenizer), "test", loaded.digest)
    prompt = model.text_prompt("the glorbnax", 4)
    assert prompt.ids[-1] == 262
    (completion,) = generate(model.decoder([tokenizer.end_of_text_id]), [prompt.ids], 3)
    assert completion.ids == [262] * 3
    detokenizer = model.chat_detokenizer()
    assert "".join(map(detokenizer.push, completion.ids)) + detokenizer.finish() == "glorbnax" * 3
