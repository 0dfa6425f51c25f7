"""A finished run verifies, on this machine or elsewhere, and two runs are compared."""

import json
import shutil

import processes
import pytest
from processes import ON_CPU
from verification import (
    STEPS,
    change_json,
    check,
    claims,
    edit_line,
    failures,
    forge_checkpoint,
    nudge,
    other_held_out_loss,
    other_loss,
    read,
)

from gpt2ft.errors import SettingsError
from gpt2ft.files import file_digest, write_json
from gpt2ft.runs import export, verify
from gpt2ft.runs.recompute import choose
from gpt2ft.settings.using import ExportSettings
from gpt2ft.training.tracking import line_digests

# --- runs that verify -----------------------------------------------------------------------------------------------


def test_a_finished_run_verifies_to_the_bit(run, tmp_path, capsys):
    assert failures(run) == {}
    certificate, page = read(run / "certificate.json"), (run / "certificate.md").read_text()
    assert {claim["result"] for claim in certificate["claims"]} == {"holds"}
    said = claims(run)["steps"]["detail"]
    assert said.startswith("7 computed again: from 0 to 2 metrics to the bit, weights to the bit; from 2 to 4 ")
    assert "tolerance" not in said
    assert certificate["verified"] is True
    assert certificate["environment"]["versions"]["gpt2ft"]
    assert certificate["files"]["metrics.jsonl"] == file_digest(run / "metrics.jsonl")
    assert file_digest(run / "certificate.json") in page
    assert file_digest(run / "certificate.json") in capsys.readouterr().out
    assert all(word in page for word in ("no signature", "ssh-keygen -Y sign", "gpg", "minisign", str(run)))
    export.run(ExportSettings(model=str(run), format="hf", output=str(tmp_path / "half"), dtype="bfloat16"))
    for model, told in ((run / "model", "model/"), (tmp_path / "half", "in bfloat16"), (run, "float32")):
        assert check(run / "certificate.json", model) is None
        assert told in capsys.readouterr().out


def test_cards_name_the_certificate_and_may_be_added_to(run, tmp_path):
    """They are the only files that a certificate has no digest of, and nothing else depends on them."""
    check(run, steps=1)
    for folder in ("model", "best"):
        assert file_digest(run / "certificate.json") in (run / folder / "README.md").read_text()
    files = read(run / "certificate.json")["files"]
    assert {"model/config.json", "best/model.safetensors"} <= files.keys()
    assert not any(name.endswith("README.md") for name in files)
    with (run / "model" / "README.md").open("a") as card:
        card.write("My words.")
    assert check(run / "certificate.json", run / "model") is None
    assert failures(run, steps=1) == {}
    card = (run / "model" / "README.md").read_text()
    assert file_digest(run / "certificate.json") in card
    assert card.endswith("My words.")
    nudge(run / "best" / "model.safetensors")
    assert "models" in failures(run, steps=1)
    assert "certificate.json" not in (run / "model" / "README.md").read_text()


def test_lines_that_are_no_runs_are_named(run, another):
    (run / "metrics.jsonl").write_text("1\n")
    with pytest.raises(SettingsError, match=str(run / "metrics.jsonl")):
        check(run, another)


@pytest.mark.parametrize(
    "content", [[1], {"format": 1, "step": 3}, *({"format": 1, "verified": True, "run": "r"} | more for more in (
        {}, {"models": [1]}, {"models": {"model": "all"}}, {"models": {"model": None}}))]
)  # fmt: skip
def test_another_file_is_no_certificate(content, tiny_weights_folder, tmp_path):
    write_json(tmp_path / "manifest.json", content)
    assert "is not the certificate of a run" in check(tmp_path / "manifest.json", tiny_weights_folder)


def test_a_model_of_another_run_or_with_other_words_is_not_the_certificates(run, another, tiny_weights_folder):
    check(run, steps=1)
    for folder in (another / "model", tiny_weights_folder):
        assert "is no model of" in check(run / "certificate.json", folder)
    change_json(run / "certificate.json", lambda values: values["models"]["model"].update(tokenizer="0"))
    assert "another tokenizer" in check(run / "certificate.json", run / "model")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "optimizer: {}\n")
    check(run, steps=1)
    assert "is not the certificate of a run that verifies" in check(run / "certificate.json", another / "model")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_lora_run_verifies(run_sft, tiny_weights_folder, tmp_path, precision):
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q", "v", "o", "fc"], "dora": True, "plus_ratio": 4.0}
    run_sft(tmp_path / "run", 4, path=tiny_weights_folder, lora=lora, precision=precision)
    assert failures(tmp_path / "run") == {}
    assert "metrics to the bit, weights to the bit" in claims(tmp_path / "run")["steps"]["detail"]
    if precision == "fp32":  # an adapter on the adapter stands on start/
        run_sft(tmp_path / "second", 2, path=tmp_path / "run" / "adapter", lora=lora)
        assert failures(tmp_path / "second") == {}
    nudge(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in failures(tmp_path / "run", steps=1)["models"]


def test_a_dpo_run_verifies_with_its_reference(run_dpo, tmp_path):
    run_dpo(tmp_path / "run", 4, data={"cache": str(tmp_path / "cache")})
    assert failures(tmp_path / "run") == {}
    found = claims(tmp_path / "run")
    assert found["reference"]["detail"].startswith("the same, those of step ")
    assert "within 0 nats/token" in found["reference"]["detail"]
    assert "metrics to the bit, weights to the bit" in found["steps"]["detail"]
    shutil.rmtree(tmp_path / "cache" / "reference")  # what can be made again is
    assert failures(tmp_path / "run", steps=1) == {}
    manifest = read(tmp_path / "run" / "manifest.json")
    write_json(tmp_path / "run" / "manifest.json", manifest | {"reference": manifest["reference"] | {"digest": "0"}})
    assert "`digest` was '0'" in failures(tmp_path / "run", steps=1)["reference"]


def test_a_resumed_run_verifies_whatever_was_logged_before(run_sft, stopped_after, tmp_path):
    with stopped_after(5):
        run_sft(tmp_path / "run", STEPS)
    run_sft(tmp_path / "run", STEPS, log_every=3)
    assert failures(tmp_path / "run") == {}
    said = claims(tmp_path / "run")["steps"]["detail"]
    assert "from 6 to 7 metrics to the bit, weights to the bit" in said


@pytest.mark.long
def test_a_run_that_went_on_with_more_processes_verifies_on_one_and_on_two(run_sft, stopped_after, tmp_path):
    """To the bit where as many processes compute again, within the tolerance elsewhere."""
    with stopped_after(5):
        run_sft(tmp_path / "first", STEPS)
    folder = shutil.copytree(tmp_path / "first", tmp_path / "run")
    processes.run([*processes.torchrun(2), "launch/sft.py", folder / "recipe.yaml", "--output", folder], **ON_CPU)
    assert [start["processes"] for start in read(folder / "manifest.json")["starts"]] == [1, 2]
    assert failures(folder) == {}
    assert "(`processes` was 2 and is now 1)" in claims(folder)["steps"]["detail"]
    done = processes.run([*processes.torchrun(2), "launch/verify.py", folder], **ON_CPU)
    assert done.stdout.count("certificate ") == 1
    assert read(folder / "certificate.json")["verified"] is True
    assert "from 6 to 7 metrics to the bit, weights to the bit" in claims(folder)["steps"]["detail"]
    forge_checkpoint(folder, STEPS)
    end = processes.run([*processes.torchrun(2), "launch/verify.py", folder], code=1, **ON_CPU)
    assert "step-00000007" in end.printed


def test_elsewhere_the_tolerance_holds_and_is_named(run):
    """On other hardware, as the manifest has it; weights are those of the same bits all the same."""
    change_json(run / "manifest.json", lambda manifest: manifest["starts"][0]["hardware"].update(threads=64))
    assert failures(run) == {}
    assert "`hardware.threads` was 64 and is now" in claims(run)["steps"]["detail"]
    file, line = run / "metrics.jsonl", [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for factor, is_found in ((1 + 1e-5, False), (1.01, True)):
        changed = [dict(values) for values in line]
        changed[-2]["train/loss"] *= factor
        file.write_text("".join(json.dumps(values) + "\n" for values in changed))
        change_json(run / "manifest.json", lambda manifest: manifest.update(metrics=line_digests(file)))
        assert ("steps" in failures(run, steps=1)) == is_found
        assert is_found or "metrics within 1e-05 (tolerance 0.001)" in claims(run)["steps"]["detail"]


def test_what_is_no_finished_run_is_refused(tmp_path, finished):
    assert verify.NotVerified.exit_code == 1
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SettingsError, match="runs of this version"):
        check(finished, tmp_path)
    for manifest, why in (
        (None, "manifest.json is missing or cannot be read"),
        ("[]", "manifest.json is missing or cannot be read"),
        ('{"settings": {}, "precision": "no"}', "manifest.json has no `starts`, `finished`, `metrics`, `identity`"),
    ):
        if manifest:
            (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(SettingsError, match=f"finished run of this version, but its {why}"):
            check(tmp_path)
    (tmp_path / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    for settings in (3, {"model": {"path": "quickstart", "sizes": 1}}):  # of another version
        change_json(tmp_path / "manifest.json", lambda manifest, new=settings: manifest.update(settings=new))
        with pytest.raises(SettingsError, match=r"manifest\.json") as error:
            check(tmp_path)
        assert "pydantic" not in str(error.value)


# --- which steps are computed again ---------------------------------------------------------------------------------


def test_the_end_and_random_lines_are_chosen_within_the_number_of_steps():
    import numpy as np

    saved, lines = {40: None, 80: None, 100: None}, range(10, 101, 10)
    chosen = [choose(lines, saved, 50, np.random.default_rng(seed)) for seed in range(20)]
    assert all(sum(last - first for first, last in stretches) <= 50 for stretches in chosen)
    assert all(stretches[-1] == (80, 100) for stretches in chosen)
    assert {first for stretches in chosen for first, _ in stretches} == {0, 40, 80}
    assert choose(lines, saved, 1000, np.random.default_rng(0)) == [(0, 40), (40, 80), (80, 100)]
    assert choose([50, 100], {100: None}, 40, np.random.default_rng(0)) == []


# --- two runs -------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_line_by_line(finished, another, run_sft, own_trees, tmp_path, capsys):
    run_sft(tmp_path / "same", STEPS, data={"train": [str(own_trees)]})
    assert check(finished, tmp_path / "same") is None
    out = capsys.readouterr().out
    assert "the same    7 lines" in out
    assert "settings    `training.keep_for_verification`: 2 and 0" in out
    assert "differ first at step 1, in what was trained on: `data`" in check(finished, another)
    assert "seed        `training.seed`: 0 and 1" in capsys.readouterr().out
    run_sft(tmp_path / "rate", STEPS, data={"train": [str(own_trees)]}, learning_rate=1.1e-2)
    assert "differ first at step 1, in numbers: `train/learning_rate`" in check(finished, tmp_path / "rate")
    assert "settings    `optimizer.learning_rate`" in capsys.readouterr().out
    run_sft(tmp_path / "short", 3)
    assert "in what was trained on" in check(finished, tmp_path / "short")
    assert "data        `identity.tokenised_data." in capsys.readouterr().out
    edit_line(tmp_path / "same", other_held_out_loss)
    assert "differ first at step 7, in what was held out: `eval/loss`" in check(finished, tmp_path / "same")
    edit_line(tmp_path / "same", other_loss)
    assert "differ first at step 7, in numbers: `train/loss`" in check(finished, tmp_path / "same")
    change_json(tmp_path / "same" / "manifest.json", lambda manifest: manifest["versions"].update(torch="9"))
    check(finished, tmp_path / "same")
    assert "versions    `versions.torch`" in capsys.readouterr().out
