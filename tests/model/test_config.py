"""config.json: the shapes that it gives, by whatever names, and configurations that are no GPT-2."""

import codecs
import json
import re

import pytest
import torch
from small_gpt2 import SHAPE, TOKENS, logits

from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.model.pretrained import ModelError, read_config


def reconfigure(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class TestRead:
    def test_keys_that_old_configurations_lack_have_gpt2s_values(self, folder):
        shape = dict(zip(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), SHAPE, strict=True))
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
        assert read_config(folder) == GPT2Config(**shape)

    def test_missing_sizes_are_those_of_transformers(self, tmp_path):
        from transformers import GPT2Config as Theirs

        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        assert read_config(tmp_path) == GPT2Config(Theirs().vocab_size)
        assert read_config(tmp_path) == GPT2Config(50257, 1024, 768, 12, 12, Theirs().layer_norm_epsilon)

    @pytest.mark.parametrize("missing", ["n_positions", "n_embd", "n_layer", "n_head"])
    def test_one_missing_size_has_gpt2s_value(self, missing, transformers_gpt2, tmp_path, read_gpt2):
        """Of the context and the rest alike; weights of another shape are then refused."""
        sizes = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
        small = {"n_positions": 24, "n_embd": 24, "n_layer": 1, "n_head": 2} | {missing: sizes[missing]}
        theirs = transformers_gpt2((60, *small.values()))
        theirs.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.pop(missing) == sizes[missing]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            expected = theirs(TOKENS[None]).logits[0]
        torch.testing.assert_close(logits(read_gpt2(tmp_path)), expected, atol=1e-4, rtol=1e-4)

    def test_sizes_by_other_names(self, folder, expected, read_gpt2):
        """Those that transformers reads too, and the context as OpenAI's first files have it."""
        names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        config = json.loads((folder / "config.json").read_text())
        del config["model_type"]
        for context in ("max_position_embeddings", "n_ctx"):
            renamed = {(names | {"n_positions": context}).get(key, key): value for key, value in config.items()}
            (folder / "config.json").write_text(json.dumps(renamed))
            assert (logits(read_gpt2(folder)) - expected).abs().max() <= 1e-4

    def test_gelu_by_all_its_names_and_no_other(self, folder):
        from transformers.activations import ACT2FN

        x = torch.linspace(-9, 9, 10_001, dtype=torch.float64)
        gelu = torch.nn.functional.gelu(x, approximate="tanh")
        names = [name for name in ACT2FN if "gelu" in name]
        same = {name for name in names if (ACT2FN[name](x) - gelu).abs().max() < 1e-9}
        for name in [*names, "relu", "silu", "tanh"]:
            reconfigure(folder, activation_function=name)
            if name in same:
                assert read_config(folder).n_embd == 16
            else:
                with pytest.raises(ModelError, match="`activation_function` must be 'gelu_new'"):
                    read_config(folder)
        assert {"gelu_new", "gelu_pytorch_tanh"} <= same < set(names)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_a_byte_order_mark_is_harmless(self, name, theirs, tmp_path, expected, read_gpt2):
        theirs.save_pretrained(tmp_path, max_shard_size="10KB")
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (tmp_path / name).read_bytes())
        assert (logits(read_gpt2(tmp_path)) - expected).abs().max() <= 1e-4


CONFIGURATIONS = {
    "exact gelu": ({"activation_function": "gelu"}, "`activation_function` must be 'gelu_new', but is 'gelu'"),
    "another model": ({"model_type": "llama"}, "`model_type` must be 'gpt2', but is 'llama'"),
    "unscaled attention": ({"scale_attn_weights": False}, "`scale_attn_weights` must be True, but is False"),
    "scaled by layer": (
        {"scale_attn_by_inverse_layer_idx": True},
        "`scale_attn_by_inverse_layer_idx` must be False, but is True",
    ),
    "cross attention": ({"add_cross_attention": True}, "`add_cross_attention` must be False, but is True"),
    "untied": ({"tie_word_embeddings": False}, "`tie_word_embeddings` must be True, but is False"),
    "narrow inside": ({"n_inner": 32}, "`n_inner` must be null or 4 `n_embd` = 64, but is 32"),
    "no width": ({"n_embd": None}, "`n_embd` must be a positive whole number, but is None"),
    "no layers": ({"n_layer": 0}, "`n_layer` must be a positive whole number, but is 0"),
    "half a head": ({"n_head": 0.5}, "`n_head` must be a positive whole number, but is 0.5"),
    "a textual size": ({"vocab_size": "60"}, "`vocab_size` must be a positive whole number, but is '60'"),
    "a true size": ({"n_positions": True}, "`n_positions` must be a positive whole number, but is True"),
    "heads that do not divide": ({"n_head": 3}, "`n_embd` must be a multiple of `n_head` = 3, but is 16"),
    "a size that is two": (
        {"num_attention_heads": 4},
        "`num_attention_heads` must be `n_head` = 2, but is 4",
    ),
    "a size by another name": (
        {"num_hidden_layers": 0},
        "`num_hidden_layers` must be `n_layer` = 2, but is 0",
    ),
    "no model type": (
        {"model_type": None, "architectures": ["LlamaForCausalLM"]},
        "`model_type` must be 'gpt2', but is None",
    ),
    "no epsilon": ({"layer_norm_epsilon": None}, "`layer_norm_epsilon` must be a positive number, but is None"),
}


class TestConfigurationsRefused:
    @pytest.mark.parametrize("case", CONFIGURATIONS)
    def test_by_value(self, case, folder):
        values, sentence = CONFIGURATIONS[case]
        reconfigure(folder, **values)
        with pytest.raises(ModelError, match="^" + re.escape(f"{folder / 'config.json'}: {sentence}") + "$"):
            read_config(folder)

    @pytest.mark.parametrize(("text", "sentence"), [("{", "must be JSON, but"), ("[]", "JSON object.* a list$")])
    def test_no_json_object(self, text, sentence, folder):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=sentence):
            read_config(folder)
