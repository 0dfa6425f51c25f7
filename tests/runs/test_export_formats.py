"""What launch/export.py writes, in the programs that it is written for: transformers, PEFT, and GGUF's own reader."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gpt2ft.errors import SettingsError
from gpt2ft.files import write_safetensors
from gpt2ft.model import pretrained
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.gguf import write_gguf
from gpt2ft.model.pretrained import ModelError
from gpt2ft.runs import export
from gpt2ft.runs.loaded_model import find_model
from gpt2ft.settings.using import ExportSettings
from gpt2ft.text.added_tokens import AddedToken
from gpt2ft.text.template import CHAT_TEMPLATE, render_prompt
from gpt2ft.text.tokenizer import ChatTokenizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")

LORA = {"rank": 4, "alpha": 8.0, "targets": ["q", "v", "o", "fc"], "dora": True, "rank_per_target": ["v=6"]}
LAST_STEP = "checkpoints/step-00000002"
TURNS = [("system", "Talk of tea."), ("user", " What's 12 + 3?\n\n  é🙂"), ("assistant", ""), ("user", "日本")]


@pytest.fixture(scope="module")
def full_run(run_sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    run_sft(folder, 2)
    return folder


@pytest.fixture(scope="module")
def lora_run(run_sft, tiny_weights_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    run_sft(folder, 2, path=tiny_weights_folder, lora=LORA)
    return folder


def exported(model, output, **settings):
    export.run(ExportSettings(model=str(model), output=str(output), **settings))
    return output


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 2000, (100,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids):
    """Of a model folder, run or checkpoint, as this package computes them."""
    policy, _ = find_model(str(model))
    gpt2 = policy.gpt2.eval()
    hidden = gpt2(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids))))
    return gpt2.logits(hidden)[:, : len(policy.tokenizer)]


@torch.no_grad()
def their_logits(model, ids):
    return model.eval()(ids[None]).logits[0]


# --- hf -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "source"),
    [(run, source) for run in ("full_run", "lora_run") for source in ("", LAST_STEP)] + [("lora_run", "adapter")],
)
def test_transformers_computes_what_we_do(run, source, request, ids, tmp_path, capsys):
    model = request.getfixturevalue(run) / source
    folder = exported(model, tmp_path / "out", format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(their_logits(theirs, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    tokenizer = ChatTokenizer.from_folder(folder)
    assert tokenizer.has_chat_tokens
    messages = [{"role": role, "content": text} for role, text in TURNS]
    by_template = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert by_template == render_prompt(tokenizer, TURNS)
    assert capsys.readouterr().out.endswith(f"exported  {folder}, read back and compared\n")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_folder_in_half_precision_holds_the_rounded_weights(dtype, full_run, tmp_path):
    folder = exported(full_run, tmp_path / "out", format="hf", dtype=dtype)
    whole, half = (load_file(folder / "model.safetensors") for folder in (full_run / "model", folder))
    kind = getattr(torch, dtype)
    assert all(torch.equal(half[name], tensor.to(kind)) for name, tensor in whole.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == kind


# --- adapter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", LAST_STEP])
def test_peft_puts_an_exported_adapter_on_its_base(source, lora_run, tiny_weights_folder, ids, tmp_path):
    folder = exported(lora_run / source, tmp_path / "out", format="adapter")
    base = transformers.GPT2LMHeadModel.from_pretrained(tiny_weights_folder)
    found = their_logits(peft.PeftModel.from_pretrained(base, folder), ids)
    expected = logits(lora_run, ids)
    assert (expected - logits(tiny_weights_folder, ids)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["", LAST_STEP, "model"])
def test_without_an_adapter_there_is_none_to_export(source, full_run, tmp_path):
    with pytest.raises(ModelError, match="LoRA .* has no adapter"):
        exported(full_run / source, tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_base_has_changed_is_not_exported(lora_run, tiny_weights_folder, tmp_path, monkeypatch):
    from gpt2ft.runs import loaded_model

    real = pretrained.read_weights

    def changed(folder, config):
        weights = real(folder, config)
        return weights | {"wpe.weight": weights["wpe.weight"] + 0.1} if folder == tiny_weights_folder else weights

    monkeypatch.setattr(loaded_model.pretrained, "read_weights", changed)
    with pytest.raises(OSError, match="the adapter does not make of .* what was trained: `wpe.weight` differs"):
        exported(lora_run, tmp_path / "out", format="adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_needs_no_export(lora_run, tmp_path):
    with pytest.raises(ModelError, match="is an adapter already: copy the folder"):
        exported(lora_run / "adapter", tmp_path / "out", format="adapter")


# --- gguf -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def gguf_folder(request, full_run, tmp_path_factory):
    return exported(full_run, tmp_path_factory.mktemp("gguf") / "tea", format="gguf", dtype=request.param)


def test_transformers_computes_the_same_from_gguf(gguf_folder, full_run, ids):
    """It takes the number of positions for 1,024 unless it is told."""
    (file,) = gguf_folder.glob("*.gguf")
    config = transformers.AutoConfig.from_pretrained(full_run / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=file.name, config=config, dtype=torch.float32
    )
    tolerance = {"tea-f32": 1e-5, "tea-f16": 2e-3, "tea-bf16": 2e-2}[file.stem]
    expected = logits(full_run, ids)
    assert expected.std() > 0.05
    torch.testing.assert_close(their_logits(theirs, ids), expected, atol=tolerance, rtol=0)


def test_transformers_tokenises_the_same_from_gguf(gguf_folder, full_run):
    (file,) = gguf_folder.glob("*.gguf")
    ours = ChatTokenizer.from_folder(full_run / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_folder, gguf_file=file.name)
    draw = random.Random(0)
    alphabet = "abc ABC 123 .,!? \n\t'é日本🙂 tea kettle "
    lengths = set()
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        found = theirs(text, add_special_tokens=False)["input_ids"]
        assert found == ours.encode(text)
        lengths.add(len(found))
    assert len(lengths) > 10
    messages = [{"role": role, "content": text} for role, text in TURNS]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == render_prompt(ours, TURNS)


def test_what_a_gguf_file_says(gguf_folder, full_run):
    (file,) = gguf_folder.glob("*.gguf")
    ours = ChatTokenizer.from_folder(full_run / "model")
    reader = gguf.GGUFReader(file)
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tokens, kinds = said.pop("tokenizer.ggml.tokens"), said.pop("tokenizer.ggml.token_type")
    vocabulary = json.loads((full_run / "model" / "vocab.json").read_text())
    assert tokens == list(vocabulary)
    assert {name for name, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL} == {
        "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
    }  # fmt: skip
    assert kinds.count(gguf.TokenType.NORMAL) == len(ours) - 5
    merges = (full_run / "model" / "merges.txt").read_text().splitlines()[1:]
    assert said.pop("tokenizer.ggml.merges") == merges
    assert said.pop("gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert said == {
        "general.architecture": "gpt2",
        "general.name": file.stem,
        "general.file_type": {"tea-f32": 0, "tea-f16": 1, "tea-bf16": 32}[file.stem],
        "gpt2.context_length": 256,
        "gpt2.embedding_length": 32,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": ours.end_of_text_id,
        "tokenizer.ggml.eos_token_id": ours.end_id,
        "tokenizer.ggml.eot_token_id": ours.end_id,
        "tokenizer.ggml.padding_token_id": ours.end_of_text_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # the head is the embedding
    assert tuple(tensors["token_embd.weight"].shape) == (32, len(ours))  # cropped; the innermost size comes first
    assert tuple(tensors["blk.1.attn_qkv.weight"].shape) == (32, 96)
    kind = gguf.GGMLQuantizationType[file.stem.removeprefix("tea-").upper()]
    full = {name for name, tensor in tensors.items() if tensor.tensor_type == gguf.GGMLQuantizationType.F32}
    if kind != gguf.GGMLQuantizationType.F32:
        assert full == {name for name, tensor in tensors.items() if len(tensor.shape) == 1} | {"position_embd.weight"}
        assert {tensor.tensor_type for name, tensor in tensors.items() if name not in full} == {kind}


def test_the_modelfile_names_what_lies_beside_it(gguf_folder):
    """Line by line as Ollama reads it."""
    lines = (gguf_folder / "Modelfile").read_text().splitlines()
    assert (gguf_folder / lines[1].removeprefix("FROM ./")).is_file()
    assert lines[2].startswith('TEMPLATE """{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}')
    assert lines[3:] == ['PARAMETER stop "<|end|>"', "PARAMETER num_ctx 256"]
    assert sorted(file.name for file in gguf_folder.iterdir()) == sorted(
        [lines[1].removeprefix("FROM ./"), "Modelfile", "README.md"]
    )


def test_gpt2s_own_vocabulary(gpt2_tokenizer, tiny_gpt2, tmp_path):
    gpt2 = tiny_gpt2(gpt2_tokenizer.padded_size, 64, n_embd=16)
    write_gguf(
        tmp_path / "gpt2.gguf",
        dict(gpt2.named_parameters()),
        gpt2.config,
        export.gguf_tokenizer(gpt2_tokenizer),
        torch.float16,
    )
    fields = gguf.GGUFReader(tmp_path / "gpt2.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 50261
    assert tokens[50256:] == ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert tokens[gpt2_tokenizer.encode(" tea")[0]] == "Ġtea"
    assert len(fields["tokenizer.ggml.merges"].contents()) == 50000


# --- what cannot be exported ----------------------------------------------------------------------------------------


@pytest.fixture
def small(tiny_gpt2, tokenizer):
    """write(file, **changes of its tokenizer): a GGUF file of a tiny model."""
    gpt2 = tiny_gpt2(tokenizer.padded_size, 16, n_embd=8)

    def write(file, weights=None, dtype=torch.float16, **changes):
        changed = replace(export.gguf_tokenizer(tokenizer), **changes)
        write_gguf(file, dict(gpt2.named_parameters()) | (weights or {}), gpt2.config, changed, dtype)

    return write


def test_names_that_llama_cpp_takes_for_others_are_refused(small, tokenizer, tmp_path):
    names = tokenizer.vocabulary.names()
    for id, name in ((5, "</s>"), (5, "<|start|>"), (tokenizer.role_ids["user"], "<|return|>")):
        with pytest.raises(ModelError, match=rf"must not hold .* \(id {id}\) to be exported as GGUF"):
            small(tmp_path / "out.gguf", names=[*names[:id], name, *names[id + 1 :]])
    with pytest.raises(ModelError, match="merges .* GGUF"):
        small(tmp_path / "out.gguf", merges=[])
    assert not list(tmp_path.iterdir())


def with_words(tokenizer, **flags):
    added = {"glorbnax": AddedToken(len(tokenizer), False, **flags), "<think>": AddedToken(len(tokenizer) + 1, False)}
    return ChatTokenizer(replace(tokenizer.vocabulary, words=added))


def test_added_words_are_kept_in_gguf(tokenizer, tiny_gpt2, tmp_path):
    """Spelled as they are, and to be found before BPE."""
    known = with_words(tokenizer)
    gpt2 = tiny_gpt2(known.padded_size, 16, n_embd=8)
    weights = dict(gpt2.named_parameters())
    write_gguf(tmp_path / "out.gguf", weights, gpt2.config, export.gguf_tokenizer(known), torch.float16)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[-2:] == ["glorbnax", "<think>"]
    user_defined = [id for id, kind in enumerate(kinds) if kind == gguf.TokenType.USER_DEFINED]
    assert user_defined == [len(tokens) - 2, len(tokens) - 1]


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_words_that_gguf_cannot_describe_are_refused(flag, tokenizer):
    with pytest.raises(ModelError, match=f"'glorbnax' .* `{flag}` .* GGUF"):
        export.gguf_tokenizer(with_words(tokenizer, **{flag: True}))


def test_a_folder_keeps_added_words(tokenizer, tiny_gpt2, tmp_path):
    known = with_words(tokenizer, rstrip=True)
    gpt2 = tiny_gpt2(known.padded_size, 16, n_embd=8)
    export.write_folder(tmp_path / "out", dict(gpt2.named_parameters()), gpt2.config, known)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = find_model(str(tmp_path / "out"))[0].tokenizer
    for text in ("take glorbnax  daily", "<think>tea</think>", "glorbnaxglorbnax \n"):
        assert theirs(text).input_ids == ours.encode(text) == known.encode(text)
    assert (ours.digest, ours.has_chat_tokens) == (known.digest, True)
    messages = [{"role": role, "content": f"{text} glorbnax <think>"} for role, text in TURNS]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == render_prompt(ours, [(role, f"{text} glorbnax <think>") for role, text in TURNS])


def test_weights_too_large_for_half_precision_are_refused(small, tmp_path):
    large = {"h.1.mlp.c_fc.weight": torch.full((8, 32), 7e4)}
    with pytest.raises(ModelError, match=r"`h.1.mlp.c_fc.weight` must fit into float16, but holds 70000"):
        small(tmp_path / "out.gguf", weights=large)
    assert not list(tmp_path.iterdir())
    small(tmp_path / "out.gguf", weights=large, dtype=torch.bfloat16)


def spoil_hf(patch):
    def write(file, tensors):
        name = "transformer.h.1.ln_1.bias"
        write_safetensors(file, tensors | {name: tensors[name] + 1e-3})

    patch.setattr(pretrained, "write_safetensors", write)
    return "h.1.ln_1.bias"


def spoil_tensors(patch):
    real = gguf.quantize
    patch.setattr(gguf, "quantize", lambda data, kind: real(data + 1e-3, kind))
    return "blk.0.attn_norm.bias"


def spoil_metadata(patch):
    real = gguf.GGUFWriter.add_bool
    patch.setattr(gguf.GGUFWriter, "add_bool", lambda writer, key, value: real(writer, key, True))
    return "tokenizer.ggml.add_bos_token"


@pytest.mark.parametrize("spoil", [spoil_hf, spoil_tensors, spoil_metadata])
def test_a_wrong_file_is_never_left_behind(spoil, full_run, tmp_path, monkeypatch):
    name = spoil(monkeypatch)
    with pytest.raises(OSError, match=f"`{name}` is not what was written when read back"):
        exported(full_run, tmp_path / "out", format="hf" if spoil is spoil_hf else "gguf")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(full_run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SettingsError, match="`output` = .* must not exist"):
        exported(full_run, tmp_path / "out", format="hf")
    with pytest.raises(SettingsError, match="must be a folder for the .gguf file to lie in"):
        exported(full_run, tmp_path / "tea.gguf", format="gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def base_folder(tiny_model_folder, tmp_path_factory):
    """A GPT-2 that knows no chat tokens, as published ones are."""
    folder = tmp_path_factory.mktemp("base")
    known = ChatTokenizer.from_folder(tiny_model_folder)
    kept = [
        name
        for id, name in enumerate(known.vocabulary.names())
        if id not in known.control_ids or name == "<|endoftext|>"
    ]
    (folder / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(kept)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *known.vocabulary.merges(), ""]))
    config = transformers.AutoConfig.from_pretrained(tiny_model_folder, vocab_size=len(kept))
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    assert not ChatTokenizer.from_folder(folder).has_chat_tokens
    return folder


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_model_that_was_never_trained_to_chat_is_refused(kind, base_folder, tmp_path):
    with pytest.raises(ModelError, match="only chat models"):
        exported(base_folder, tmp_path / "out", format=kind)


def test_a_checkpoint_of_what_began_without_chat_tokens_has_learnt_them(base_folder, run_sft, ids, tmp_path):
    run_sft(tmp_path / "run", 2, path=base_folder)
    folder = exported(tmp_path / "run" / LAST_STEP, tmp_path / "out", format="hf")
    torch.testing.assert_close(logits(folder, ids), logits(tmp_path / "run", ids), atol=0, rtol=0)
    assert ChatTokenizer.from_folder(folder).has_chat_tokens


def test_without_the_package_gguf_it_says_what_to_install(full_run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs the package gguf: pip install -e '\.\[gguf\]'"):
        exported(full_run, tmp_path / "out", format="gguf")
