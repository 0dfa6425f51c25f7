"""PEFT loads what we write and we load what PEFT writes, with equal logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ft.model.attention import dense_attention
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.lora import adapted_projections, apply_lora, columns_of, merged_weights, trainable_parameters
from gpt2ft.model.peft import WEIGHTS, merge_adapter, read_base, write_adapter
from gpt2ft.model.pretrained import ADAPTER_CONFIG, ModelError
from gpt2ft.settings.choices import LORA_TARGETS
from gpt2ft.settings.sections import LoRASettings

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCABULARY = 100
SHAPE = (VOCABULARY, 64, 48, 2, 4)
ROW_IDS = [97, 98, 99]


@pytest.fixture(scope="module")
def base_folder(transformers_gpt2, tmp_path_factory):
    """transformers' GPT-2 before the chat tokens were added: 97 ids, saved by transformers."""
    folder = tmp_path_factory.mktemp("base")
    transformers_gpt2((97, *SHAPE[1:])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(base_folder, read_gpt2):
    """The same with three more rows."""
    small = read_gpt2(base_folder)
    config = type(small.config)(VOCABULARY, *SHAPE[1:3], SHAPE[3], SHAPE[4])
    gpt2 = GPT2(config)
    weights = dict(small.named_parameters())
    extra = torch.randn(3, SHAPE[2], generator=torch.Generator().manual_seed(7))
    gpt2.load_state_dict(weights | {"wte.weight": torch.cat([weights["wte.weight"].detach(), extra])})
    return gpt2


@pytest.fixture(scope="module")
def ids():
    ids = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0))
    ids[[3, 9, 30]] = torch.tensor(ROW_IDS)
    return ids


@torch.no_grad()
def logits(gpt2, ids):
    return gpt2.eval().logits(gpt2(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids)))))


def assert_same(found, expected):
    """Within rounding of the largest logit."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def plain(gpt2, weights):
    other = GPT2(gpt2.config)
    other.load_state_dict(weights)
    return other


def disturb(parameters, seed=2):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)


KINDS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "each its own": {"rank_per_target": True, "alpha_per_target": True},
    "embeddings": {"embeddings": True},
    "all": {"embeddings": True, "rslora": True, "dora": True, "rank_per_target": True, "alpha_per_target": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rank", "targets"),
    [
        (1, ("q",)),
        (4, ("q", "v")),
        (3, ("k", "o")),
        (4, ("q", "k", "v", "o")),
        (2, ("fc", "proj")),
        (3, tuple(LORA_TARGETS)),
    ],
)
def test_adapter_merged_peft_and_transformers_agree(base, base_folder, ids, tmp_path, rank, targets, kind):
    others = {"rank_per_target": {targets[0]: rank + 2}, "alpha_per_target": {targets[-1]: 3}}
    settings = LoRASettings(
        rank=rank, alpha=6.0, targets=targets, **KINDS[kind] | {k: others[k] for k in KINDS[kind].keys() & others}
    )
    model = plain(base, dict(base.named_parameters()))
    apply_lora(model, settings, ROW_IDS, torch.Generator().manual_seed(1))
    disturb(trainable_parameters(model).values())
    write_adapter(tmp_path, model, settings, str(base_folder), VOCABULARY)
    adapted = logits(model, ids)
    merged = merged_weights(model)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_folder)
    theirs.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        by_peft = theirs(ids[None]).logits[0]
        by_transformers = theirs.merge_and_unload()(ids[None]).logits[0]
    assert read_base(tmp_path) == str(base_folder)
    loaded = merge_adapter(tmp_path, dict(base.named_parameters()))
    assert (adapted - logits(base, ids)).abs().max() > 0.1
    for found in (logits(plain(base, merged), ids), by_peft, by_transformers, logits(plain(base, loaded), ids)):
        assert_same(found, adapted)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "c_proj"], "use_rslora": True, "lora_alpha": 5},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.1.attn.c_attn": 3}},
        {"target_modules": ["c_attn"], "trainable_token_indices": ROW_IDS},
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 98]}, "layers_to_transform": [1]},
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "rank_pattern": {"mlp.c_proj": 2}},
        {"target_modules": ["c_attn"], "use_dora": True, "lora_dropout": 0.5, "trainable_token_indices": ROW_IDS},
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_fc"], "bias": "lora_only", "use_dora": True},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]},
        {"target_modules": ["c_attn", "c_fc"], "modules_to_save": ["c_attn"], "fan_in_fan_out": False},
        {"target_modules": ["c_attn"], "modules_to_save": ["mlp", "ln_1"], "bias": "all", "use_dora": True},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
)
def test_what_peft_has_trained(base, base_folder, ids, tmp_path, settings):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_folder)
    theirs.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(base.wte.weight)
    settings = {"r": 4, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"} | settings
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    disturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(ids[None]).logits[0]
    found = logits(plain(base, merge_adapter(tmp_path, dict(base.named_parameters()))), ids)
    assert (expected - logits(base, ids)).abs().max() > 0.1
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"modules_to_save": ["wte"]}, "`modules_to_save` must not train one of wte and lm_head alone"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` must not train one of wte and lm_head alone"),
        ({"modules_to_save": ["wte", "lm_head"]}, "lm_head.weight` must equal .*wte.weight"),
        ({"modules_to_save": ["wte"], "ensure_weight_tying": True}, "`modules_to_save` must not train one of"),
        ({"target_modules": ["c_attn", "wte"]}, "wte.lora_embedding_A.* is nothing that an adapter"),
        ({"lora_bias": True}, "`lora_bias` must be off"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` must leave the base as it is"),
    ],
)
def test_what_peft_has_trained_that_has_no_place_here(base, base_folder, tmp_path, settings, problem):
    """In PEFT all of these work: `wte` alone, for example, is a table that the head no longer shares."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_folder)
    settings = {"r": 4, "fan_in_fan_out": True, "task_type": "CAUSAL_LM", "target_modules": ["c_attn"]} | settings
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    disturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=problem):
        merge_adapter(tmp_path, dict(base.named_parameters()))


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_gradients_are_those_of_peft(base, base_folder, ids, tmp_path, kind):
    settings = LoRASettings(rank=3, alpha=6.0, targets=("q", "v", "o", "fc", "proj"), **KINDS[kind])
    model = plain(base, dict(base.named_parameters()))
    apply_lora(model, settings, ROW_IDS, torch.Generator().manual_seed(1))
    disturb(trainable_parameters(model).values())
    write_adapter(tmp_path, model, settings, str(base_folder), VOCABULARY)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_folder)
    theirs.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).eval()
    factors = torch.randn(len(ids), VOCABULARY, generator=torch.Generator().manual_seed(4))
    (theirs(ids[None]).logits[0] * factors).sum().backward()
    attend = dense_attention(torch.full_like(ids, len(ids)))
    (model.eval().logits(model(ids, torch.arange(len(ids)), attend)) * factors).sum().backward()
    compared = 0
    for name, module in adapted_projections(model):
        layer, at, width = theirs.base_model.model.transformer.get_submodule(name), 0, module.weight.shape[1]
        for target, own in module.adapters.items():
            rows, columns = slice(at, at + 3), columns_of(target, width)
            pairs = [
                (own.A.grad, layer.lora_A["default"].weight.grad[rows]),
                (own.B.grad, layer.lora_B["default"].weight.grad[columns, rows]),
            ]
            if settings.dora:
                found = layer.lora_magnitude_vector["default"].weight.grad[columns]
                pairs.append((own.magnitude_change.grad, found))
            for found, expected in pairs:
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
                compared += 1
            at += 3
    assert compared == (3 if settings.dora else 2) * 2 * 5


@pytest.fixture
def adapter(base, base_folder, tmp_path):
    settings = LoRASettings(rank=4, alpha=8.0, targets=("q", "o"))
    model = plain(base, dict(base.named_parameters()))
    apply_lora(model, settings, ROW_IDS, torch.Generator().manual_seed(1))
    write_adapter(tmp_path, model, settings, str(base_folder), VOCABULARY)
    return tmp_path


def test_no_tensor_is_empty_and_the_file_is_small(adapter):
    tensors = load_file(adapter / WEIGHTS)
    assert len(tensors) == 2 * 2 * 2 + 1
    assert all(tensor.numel() > 40 for tensor in tensors.values())
    assert (adapter / WEIGHTS).stat().st_size < 100_000


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peft_type": "IA3"}, "`peft_type` must be LORA"),
        ({"use_dora": True}, "lacks `.*lora_magnitude_vector"),
        ({"bias": "all"}, r"lacks `.*h\.0\.attn\.c_attn\.bias"),
        ({"bias": "lora_only"}, r"lacks `.*h\.0\.attn\.c_attn\.bias"),
        ({"bias": "some"}, "`bias` must be none, all or lora_only"),
        ({"modules_to_save": ["ln_f"]}, r"lacks `.*ln_f\.bias"),
        ({"modules_to_save": "ln_f"}, "`modules_to_save` must be a list"),
        ({"modules_to_save": ["wte"]}, "`modules_to_save` must not train one of wte and lm_head alone"),
        ({"trainable_token_indices": [97, 98]}, "`trainable_token_indices` and the rows"),
        ({"trainable_token_indices": [97, 98, 100]}, "`trainable_token_indices` and the rows"),
    ],
)
def test_adapters_of_another_kind_are_refused(adapter, base, change, problem):
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=problem):
        merge_adapter(adapter, dict(base.named_parameters()))


def test_adapters_that_do_not_fit_are_refused(adapter, base):
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
    odd = {
        "does not fit|do not fit": tensors | {name: tensors[name][:, :-1].contiguous()},
        "lacks `.*lora_A": {key: tensor for key, tensor in tensors.items() if key != name},
        "is nothing that an adapter": tensors | {"base_model.model.transformer.wte.lora_embedding_A": torch.ones(2)},
        "`ln_f.bias` .* is nothing that": tensors | {"base_model.model.transformer.ln_f.bias": torch.ones(48)},
        "without `use_dora`": tensors | {name.replace("A.weight", "magnitude_vector"): torch.ones(144)},
        "twice and differs": tensors | {name.replace(".lora", ".modules_to_save.lora"): tensors[name] + 1},
        "not finite": tensors | {name: tensors[name] * torch.nan},
    }
    for problem, changed in odd.items():
        save_file(changed, adapter / WEIGHTS)
        with pytest.raises(ModelError, match=problem):
            merge_adapter(adapter, dict(base.named_parameters()))
    (adapter / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        merge_adapter(adapter, dict(base.named_parameters()))
    (adapter / ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(ModelError, match="`peft_type` must be LORA"):
        read_base(adapter)
