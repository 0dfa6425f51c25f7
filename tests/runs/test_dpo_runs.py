"""Preference tuning as a whole: what it learns, what it starts from, and that it resumes and exports like any run."""

import json
import math

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from gpt2ft.errors import SettingsError
from gpt2ft.objectives.losses import start_loss
from gpt2ft.preference_losses import PREFERENCE_LOSSES
from gpt2ft.runs import evaluate_model
from gpt2ft.runs.loaded_model import find_model, load_model
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.sections import ModelSettings
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.training.reference_store import ReferenceLogProbError
from gpt2ft.training.tracking import Tracker

STEPS = 4
SETTINGS = {
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "sigmoid_norm": {"beta": 5.0},
    "simpo": {"beta": 2.0, "gamma": 0.5},
}
LORA = {"rank": 4, "alpha": 8.0, "targets": ["q", "v", "o", "fc"]}
EMBEDDINGS = LORA | {"embeddings": True}
DORA = LORA | {"dora": True, "plus_ratio": 4.0, "rank_per_target": ["v=6"]}


def logged(folder, prefix):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if f"{prefix}/loss" in line}


def stored(cache):
    """key -> (log-prob, tokens, log-probs) of all references in a cache."""
    rows = {}
    for file in sorted(cache.glob("reference/*/*.parquet")):
        table = pyarrow.parquet.read_table(file)
        columns = [table.column(name).to_pylist() for name in ("key", "log_prob", "tokens", "log_probs")]
        for key, *values in zip(*columns, strict=True):
            assert key not in rows
            rows[key] = values
    return rows


@pytest.fixture(scope="module")
def run_folder(run_dpo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    run_dpo(folder, STEPS)
    return folder


@pytest.mark.parametrize(
    "loss",
    [
        loss if loss in ("ipo", "simpo") else pytest.param(loss, marks=pytest.mark.long)
        for loss, traits in PREFERENCE_LOSSES.items()
        if traits.of_pairs
    ],
)
def test_every_loss_trains(loss, run_dpo, tmp_path):
    """The first loss is the known one, and chosen replies come to be rewarded more than rejected ones."""
    last = 24 if loss == "orpo" else 8  # which mostly learns the chosen replies
    run_dpo(tmp_path / "run", last, dpo={"loss": loss} | SETTINGS.get(loss, {}), eval_every=last)
    steps = logged(tmp_path / "run", "train")
    assert len(steps) == last
    if PREFERENCE_LOSSES[loss].needs_reference:
        known = start_loss(PreferenceSettings(loss=loss, **SETTINGS.get(loss, {}))) or steps[1]["train/loss"]
        assert steps[1]["train/loss"] == pytest.approx(known, rel=1e-4)
        for name in ("reward_chosen", "reward_rejected", "margin"):
            assert steps[1][f"train/{name}"] == pytest.approx(0, abs=1e-4)
    assert steps[last]["train/loss"] < steps[1]["train/loss"]
    held_out = logged(tmp_path / "run", "eval")
    if loss == "apo_down":  # pushes both replies down, and the longer ones, which people prefer, fall further at first
        assert held_out[last]["eval/loss"] < held_out[0]["eval/loss"]
        assert held_out[last]["eval/reward_chosen"] < 0
        assert held_out[last]["eval/reward_rejected"] < 0
        return
    assert held_out[last]["eval/margin"] > held_out[0]["eval/margin"]
    assert held_out[last]["eval/accuracy"] > held_out[0]["eval/accuracy"]


def test_what_is_logged(run_folder):
    steps, held_out = logged(run_folder, "train"), logged(run_folder, "eval")
    names = {"loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "likelier", "both_fall"}
    names |= {"chosen_change_per_token", "rejected_change_per_token", "chosen_length", "rejected_length"}
    assert {f"train/{name}" for name in names} | {"train/grad_norm"} <= steps[1].keys()
    assert {f"eval/{name}" for name in names} | {"eval/stopped"} <= held_out[0].keys()
    assert held_out[0]["eval/accuracy"] == 0.5
    assert held_out[0]["eval/both_fall"] == 0
    assert held_out[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert held_out[STEPS].keys() == held_out[0].keys()
    assert steps[STEPS]["train/margin"] == pytest.approx(
        steps[STEPS]["train/reward_chosen"] - steps[STEPS]["train/reward_rejected"], abs=1e-9
    )


def test_samples_of_start_and_policy_stand_side_by_side(run_dpo, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(Tracker, "log_text", lambda self, step, name, text: texts.append((step, name, text)))
    run_dpo(tmp_path / "run", 3, learning_rate=0.03)
    samples = [(step, text) for step, name, text in texts if name == "samples/0"]
    assert [step for step, _ in samples] == [0, 3]
    before, now = zip(*(text.split("\nbefore: ")[1].split("\nnow:    ") for _, text in samples), strict=True)
    assert before[0] == before[1] == now[0]
    assert now[1] != before[1]


def test_the_output_is_a_run_like_any(run_folder):
    transformers = pytest.importorskip("transformers")
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert manifest["finished"]["step"] == STEPS
    assert manifest["reference"]["computed_by"]["weights"] == manifest["identity"]["initial_weights"]
    policy, folder = find_model(str(run_folder))
    assert folder == run_folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "model")
    table = theirs.transformer.wte.weight
    assert torch.equal(table, policy.gpt2.wte.weight[: len(table)])
    checkpoint, _ = find_model(str(run_folder / "checkpoints" / f"step-{STEPS:08d}"))
    assert checkpoint.digest == policy.digest


@pytest.mark.parametrize(
    ("lora", "stop_after"),
    [
        pytest.param({}, 3, id="full, 3", marks=pytest.mark.long),
        pytest.param(LORA, 1, id="lora, 1"),
        pytest.param({}, 1, id="full, 1", marks=pytest.mark.long),
        pytest.param(DORA, 3, id="dora, 3", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_ends_in_the_same_bits(lora, stop_after, run_dpo, stopped_after, tmp_path, capsys):
    """And never takes the reference from the policy it has come to: that is still the start's."""
    caches = [{"cache": str(tmp_path / name)} for name in ("one", "two")]
    how = {"lora": lora, "learning_rate": 1e-2, "dpo": {"whole_trees": bool(lora)}}
    run_dpo(tmp_path / "whole", STEPS, data=caches[0], **how)
    with stopped_after(stop_after):
        run_dpo(tmp_path / "run", STEPS, data=caches[1], **how)
    for file in (tmp_path / "two" / "reference").glob("*/*"):
        file.unlink()  # what is missing is computed again, from the start
    run_dpo(tmp_path / "run", STEPS, data=caches[1], **how)
    assert f"from step 0 to step {STEPS}: held-out loss 0.6931 -> " in capsys.readouterr().out
    for name in ("model", "best"):
        expected, found = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "run"))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert len(stored(tmp_path / "one")) > 100


@pytest.mark.parametrize(
    ("seed", "lora", "precision"),
    [(0, LORA, "bf16"), (0, EMBEDDINGS, "bf16"), (1, DORA, "bf16"), (0, LORA, "fp16")],
    ids=["lora", "embeddings", "dora", "fp16"],
)
def test_adapters_in_half_precision_start_from_their_reference(seed, lora, precision, run_dpo, tmp_path, capsys):
    """Frozen matrices are rounded before the reference is computed, and what they are held in names its folder."""
    run_dpo(tmp_path / "run", 1, seed=seed, lora=lora, precision=precision, sample_prompts=0)
    assert "the start is the reference within 0 nats/token, loss 0.6931" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["reference"]["computed_by"]["rounds_frozen_matrices"] == (
        "except the table" if lora is EMBEDDINGS else True
    )
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["eval/margin"] == 0
    assert start["eval/accuracy"] == 0.5


def test_lora_tunes_an_adapter_merged_first(run_sft, run_dpo, tiny_weights_folder, tmp_path):
    """The reference is what the first adapter has made of its base, rows of the chat tokens included."""
    run_sft(tmp_path / "sft", 4, path=tiny_weights_folder, lora=LORA, dropout=0.0)
    cache = {"cache": str(tmp_path / "cache")}
    run_dpo(tmp_path / "merged", 2, path=tmp_path / "sft", lora=LORA, data=cache)
    run_dpo(tmp_path / "adapter", 2, path=tmp_path / "sft" / "adapter", lora=LORA, data=cache)
    ids = torch.arange(30)
    found = {}
    for name in ("merged", "adapter"):
        first = logged(tmp_path / name, "train")[1]
        assert first["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
        held_out = logged(tmp_path / name, "eval")
        assert held_out[2]["eval/margin"] > 0
        for folder in ("model", "adapter"):
            policy, _ = find_model(str(tmp_path / name / folder))
            found[name, folder] = policy.gpt2.wte.weight[ids]
    values = list(found.values())
    assert all(torch.allclose(value, values[0], atol=1e-4) for value in values)
    base = load_model(ModelSettings(path=str(tiny_weights_folder)), seed=0)
    sft, _ = find_model(str(tmp_path / "sft"))
    assert base.digest != sft.digest


def test_a_sweep_shares_one_reference(run_dpo, tmp_path, capsys):
    """Learning rate, beta, adapters and the order of the data change nothing about what the start says."""
    cache = {"cache": str(tmp_path / "cache"), "train": ["quickstart"]}  # of a half, each seed takes another
    run_dpo(tmp_path / "reference", 1, data=cache, only_reference=True)
    assert "0 of them computed now" not in capsys.readouterr().out
    rows = stored(tmp_path / "cache")
    sweep = [
        {"lora": DORA, "learning_rate": 5e-3, "dpo": {"beta": 0.5}},
        {"dpo": {"loss": "ipo", "pairs": "best_worst"}, "seed": 7, "tokens_per_micro_batch": 2048},
    ]
    for number, settings in enumerate(sweep):
        run_dpo(tmp_path / str(number), 1, data=cache, **settings)
        assert " 0 of them computed now" in capsys.readouterr().out
    assert stored(tmp_path / "cache") == rows


def test_the_pass_does_not_change_training(run_folder, run_dpo, tmp_path, capsys):
    run_dpo(tmp_path / "run", STEPS)
    assert " 0 of them computed now" in capsys.readouterr().out
    run_dpo(tmp_path / "other", STEPS, data={"cache": str(tmp_path / "cache")})
    assert " 0 of them computed now" not in capsys.readouterr().out
    expected, *found = (
        load_file(run / "model" / "model.safetensors") for run in (run_folder, tmp_path / "run", tmp_path / "other")
    )
    assert all(torch.equal(expected[key], other[key]) for key in expected for other in found)


def test_a_trained_in_place_model_is_another_reference(run_dpo, tiny_weights_folder, tmp_path):
    """The reference goes by content: the same path with other weights in it reads nothing that is stale."""
    start = tmp_path / "start"
    cache = {"cache": str(tmp_path / "cache")}
    start.mkdir()
    for file in tiny_weights_folder.iterdir():
        (start / file.name).write_bytes(file.read_bytes())
    run_dpo(tmp_path / "one", 1, path=start, data=cache)
    (start / "model.safetensors").write_bytes((tmp_path / "one" / "model" / "model.safetensors").read_bytes())
    run_dpo(tmp_path / "two", 1, path=start, data=cache)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2
    assert logged(tmp_path / "two", "train")[1]["train/loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "dpo", [{}, {"loss": "ipo", "beta": 0.5}, {"loss": "simpo", "beta": 2.0, "gamma": 0.5}], ids=lambda dpo: str(dpo)
)
def test_evaluation_reports_what_training_saw(dpo, run_dpo, tmp_path):
    """The loss too, by the run's own objective."""
    run_folder, steps = tmp_path / "run", 2
    run_dpo(run_folder, steps, dpo=dpo)
    report = tmp_path / "report.json"
    evaluate_model.run(
        EvaluateSettings(
            model=str(run_folder),
            data=("quickstart:held_out",),
            pairs="all",
            report=str(report),
            max_length=256,
            cache=str(tmp_path),
            precision="fp32",
            num_prompts=0,
        )
    )
    found = json.loads(report.read_text())["preferences"]
    held_out = logged(run_folder, "eval")[steps]
    names = {"loss", "likelier", "chosen_length"}
    if PREFERENCE_LOSSES[found["objective"]].needs_reference:
        names |= {"accuracy", "margin", "reward_chosen", "both_fall"}
    for name in names:
        assert found[name] == pytest.approx(held_out[f"eval/{name}"], rel=1e-4, abs=1e-6)
    assert found["objective"] == dpo.get("loss", "sigmoid")
    assert "both_fall" in found  # changes from what the run started from, whether its loss reads them or not
    assert found["pairs"] > 40
    assert 0 < found["longer"] < 1


def test_a_reference_that_does_not_fit_the_start_is_refused(run_dpo, tmp_path):
    cache = tmp_path / "cache"
    run_dpo(tmp_path / "reference", 1, data={"cache": str(cache)}, only_reference=True)
    for file in cache.glob("reference/*/*.parquet"):
        table = pyarrow.parquet.read_table(file)
        shifted = pyarrow.compute.subtract(table.column("log_prob"), 1.0)
        pyarrow.parquet.write_table(table.set_column(1, "log_prob", shifted), file)
    with pytest.raises(ReferenceLogProbError, match=r"differ from what the start of this run gives by .*; remove "):
        run_dpo(tmp_path / "run", 1, data={"cache": str(cache)})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_store_tells_of_the_pairs_and_of_later_models(run_dpo, tiny_weights_folder, tmp_path, capsys):
    run_dpo(tmp_path / "run", STEPS, learning_rate=1e-2)
    report, later = tmp_path / "new" / "report.json", (str(tiny_weights_folder), str(tmp_path / "run"))
    run_dpo(tmp_path / "reference", STEPS, only_reference=True, report=str(report), later=later)
    found = json.loads(report.read_text())
    start, end = found["later"]
    assert start["divergence"] == pytest.approx(0, abs=1e-9)
    assert end["divergence"] > 1e-4
    assert [row["beta"] for row in found["saturation"]] == sorted(row["beta"] for row in found["saturation"])
    shares = [row["saturated"] for row in found["saturation"]]
    assert shares == sorted(shares)  # the larger beta, the smaller the margin that saturates
    worst = [pair["difference"] for pair in found["suspicious"]]
    assert worst == sorted(worst)
    assert len(worst) == min(10, found["likely_mislabelled"])
    for pair in found["suspicious"]:
        assert all(pair[name].strip() and "<|" not in pair[name] for name in ("prompt", "chosen", "rejected"))
    assert "nats/token from the start" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="must not exist yet"):
        run_dpo(tmp_path / "reference", STEPS, only_reference=True, report=str(report))
