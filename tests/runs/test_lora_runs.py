"""A LoRA run resumes, evaluates and exports like a full one, and every script takes its adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt2ft import checkpoint
from gpt2ft.errors import SettingsError
from gpt2ft.model.attention import dense_attention
from gpt2ft.model.pretrained import ModelError
from gpt2ft.runs import evaluate_model
from gpt2ft.runs.loaded_model import find_model, load_model
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.sections import ModelSettings

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q", "v", "o", "fc"]}
DORA = LORA | {"dora": True, "plus_ratio": 4.0, "rank_per_target": ["v=6", "fc=2"], "alpha_per_target": ["v=3"]}
KINDS = {
    "lora-fp32": (LORA, "fp32"),
    "dora-bf16": (DORA, "bf16"),
    "embeddings-bf16": (LORA | {"embeddings": True}, "bf16"),
}
STEPS = 6


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def run_folder(kind, run_sft, tiny_weights_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    run_sft(folder, STEPS, path=tiny_weights_folder, lora=kind[0], precision=kind[1])
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each test may choose its own precision."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@torch.no_grad()
def logits(gpt2, ids):
    return gpt2.eval().logits(gpt2(ids, torch.arange(len(ids)), dense_attention(torch.full_like(ids, len(ids)))))


@torch.no_grad()
def test_model_adapter_peft_and_transformers_agree(run_folder, tiny_weights_folder):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    merged, _ = find_model(str(run_folder))
    adapter, _ = find_model(str(run_folder / "adapter"))
    size = len(merged.tokenizer)
    ids = torch.randint(0, size, (60,), generator=torch.Generator().manual_seed(0))
    ids[::7] = merged.tokenizer.end_id
    expected = logits(merged.gpt2, ids)[:, :size]
    base = transformers.GPT2LMHeadModel.from_pretrained(tiny_weights_folder)
    base.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(run_folder / "adapter")))
    by_peft = peft.PeftModel.from_pretrained(base, run_folder / "adapter").eval()
    by_transformers = transformers.GPT2LMHeadModel.from_pretrained(run_folder / "model").eval()
    before = load_model(ModelSettings(path=str(tiny_weights_folder)), seed=0)
    assert (logits(before.gpt2, ids)[:, :size] - expected).abs().max() > 0.05
    for found in (
        logits(adapter.gpt2, ids)[:, :size],
        by_peft(ids[None]).logits[0],
        by_transformers(ids[None]).logits[0],
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert adapter.tokenizer.digest == merged.tokenizer.digest


def test_run_adapter_and_checkpoint_evaluate_alike(run_folder, tmp_path):
    found = []
    for model in (run_folder, run_folder / "adapter", run_folder / "checkpoints" / f"step-{STEPS:08d}"):
        report = tmp_path / "report.json"
        evaluate_model.run(
            EvaluateSettings(
                model=str(model),
                data=("quickstart:held_out",),
                report=str(report),
                cache=str(tmp_path),
                precision="fp32",
            )
        )
        found.append(json.loads(report.read_text())["total"]["nats_per_token"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_checkpoints_hold_what_is_trained_alone(kind, run_folder, tiny_weights_folder):
    per_adapter = {"A", "B", "magnitude_change"} if kind[0] is DORA else {"A", "B"}
    names = set(checkpoint.read_weights(run_folder / "checkpoints" / f"step-{STEPS:08d}"))
    table = "weight" if "embeddings" in kind[0] else "rows"
    assert {name.rpartition(".")[2] for name in names} == {*per_adapter, table}
    assert len(names) == 2 * 4 * len(per_adapter) + 1
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_weights_folder, run_folder / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".h.")[2][2:] or "wte" for name in changed} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "wte",
    }  # fmt: skip
    changed_rows = before["transformer.wte.weight"] != after["transformer.wte.weight"]
    assert changed_rows.any(1).sum() == (len(changed_rows) if "embeddings" in kind[0] else 4)  # the chat tokens
    keys = after["transformer.h.0.attn.c_attn.weight"] - before["transformer.h.0.attn.c_attn.weight"]
    assert not keys[:, 32:64].any()  # k is no target


@pytest.mark.parametrize("stop_after", [4, pytest.param(1, marks=pytest.mark.long)])
def test_a_stopped_run_ends_in_the_same_bits(
    stop_after, kind, run_folder, run_sft, tiny_weights_folder, stopped_after, tmp_path
):
    settings = {"steps": STEPS, "path": tiny_weights_folder, "lora": kind[0], "precision": kind[1]}
    with stopped_after(stop_after):
        run_sft(tmp_path / "run", **settings)
    run_sft(tmp_path / "run", **settings)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors", "best/model.safetensors"):
        expected, found = load_file(run_folder / file), load_file(tmp_path / "run" / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_adapter_is_merged_before_it_is_adapted_again(kind, run_folder, run_sft, tmp_path):
    """`start/` is the whole model that the new adapter stands on."""
    run_sft(tmp_path / "run", 2, path=run_folder / "adapter", lora=kind[0])
    ids = torch.arange(40)
    first, start, adapter, merged = (
        logits(find_model(str(folder))[0].gpt2, ids)
        for folder in (run_folder, *(tmp_path / "run" / name for name in ("start", "adapter", "model")))
    )
    torch.testing.assert_close(start, first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapter, merged, atol=1e-5, rtol=1e-5)
    assert (merged - first).abs().max() > 1e-3


def test_what_cannot_be_adapted_is_refused():
    settings = SFTSettings(model={"random_init": True}, lora={"rank": 4, "targets": []}, data={"train": ["quickstart"]})
    assert [problem.split(",")[0] for problem in settings.problems()] == [
        "`lora.targets` must name at least one of q",
        "`model.random_init` must be off where `lora.rank` is set: adapters need trained weights to adapt",
    ]


def test_another_setting_of_the_adapters_is_another_run(run_sft, tiny_weights_folder, tmp_path):
    run_sft(tmp_path / "run", 2, path=tiny_weights_folder, lora=LORA)
    (tmp_path / "run" / "model" / "config.json").unlink()
    for name, value, said in (
        ("alpha", 9.0, r"`lora.alpha` was 8.0 and is now 9.0"),
        ("dora", True, r"`lora.dora` was false and is now true"),
        ("plus_ratio", 2.0, r"`lora.plus_ratio` was 1.0 and is now 2.0"),
        ("rank_per_target", ["q=5"], r"`lora.rank_per_target` was empty and is now q=5"),
    ):
        with pytest.raises(SettingsError, match=said):
            run_sft(tmp_path / "run", 2, path=tiny_weights_folder, lora=LORA | {name: value})


def test_an_adapter_without_its_base_says_so(run_folder, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (run_folder / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/where"}))
    with pytest.raises(ModelError, match="'/no/where' is neither"):
        find_model(str(folder))
