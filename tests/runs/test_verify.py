"""A finished run verifies; whatever is changed in it, or in what it was made of, is found and named."""

import json
import shutil

import processes
import pytest
import yaml
from processes import ON_CPU
from safetensors.torch import load_file, save_file

from gpt2ft import quickstart
from gpt2ft.checkpoint_verification import manifest_entry
from gpt2ft.errors import SettingsError
from gpt2ft.files import file_digest, write_json
from gpt2ft.runs import export, verify
from gpt2ft.runs.recompute import choose
from gpt2ft.settings.measuring import VerifySettings
from gpt2ft.settings.scripts import ExportSettings
from gpt2ft.training.tracking import line_digests

STEPS = 7


def check(*paths, steps=100, seed=0):
    """Run the script; return None, or the sentence by which it fails."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        verify.run(VerifySettings(paths=[str(path) for path in paths], steps=steps, seed=seed))
    except verify.NotVerified as error:
        return str(error)
    return None


def claims(folder):
    return {claim["name"]: claim for claim in read(folder / "certificate.json")["claims"]}


def failures(folder, **how):
    """Verify a run; return the claims that fail, with what is said of them."""
    said = check(folder, **how)
    found = {name: claim["detail"] for name, claim in claims(folder).items() if claim["result"] == "fails"}
    assert (said is None) == (not found)
    assert all(name in said for name in found)
    return found


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A half of the quickstart's trees in a file of their own."""
    file = tmp_path_factory.mktemp("data") / "trees.jsonl"
    file.write_text("".join(quickstart.TREES.read_text(encoding="utf-8").splitlines(keepends=True)[::2]), "utf-8")
    return file


@pytest.fixture(scope="module")
def finished(run_sft, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_sft(folder, STEPS, data={"train": [str(data)]}, keep_for_verification=2)
    return folder


@pytest.fixture(scope="module")
def another(run_sft, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("another") / "run"
    run_sft(folder, STEPS, data={"train": [str(data)]}, seed=1)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# --- runs that verify -----------------------------------------------------------------------------------------------


def test_a_finished_run_verifies_to_the_bit(run, data, tmp_path, capsys):
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


def test_lines_that_are_no_runs_are_named(run, another):
    (run / "metrics.jsonl").write_text("1\n")
    with pytest.raises(SettingsError, match=str(run / "metrics.jsonl")):
        check(run, another)


def test_another_file_is_no_certificate(tiny_weights_folder, tmp_path):
    write_json(tmp_path / "manifest.json", {"format": 1, "step": 3})
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
        assert ("steps" in failures(run)) == is_found
        assert is_found or "metrics within 1e-05 (tolerance 0.001)" in claims(run)["steps"]["detail"]


# --- what is changed is found and named -----------------------------------------------------------------------------


def change_json(file, change):
    value = read(file)
    change(value)
    write_json(file, value)


def nudge(file, by=1e-4):
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] += by
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def renew(folder):
    """Have the manifest of a checkpoint state what lies beside it."""
    names = read(folder / "manifest.json")
    write_json(folder / "manifest.json", {name: manifest_entry(folder / name) for name in names})


def forge_checkpoint(run, step, by=1e-4):
    folder = run / "checkpoints" / f"step-{step:08d}"
    nudge(folder / "model.safetensors", by)
    renew(folder)


def swap_checkpoints(run, one, other):
    for name in ("model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"):
        shutil.copy(run / "checkpoints" / one / name, run / "checkpoints" / other / name)
    renew(run / "checkpoints" / other)


def export_earlier(run):
    shutil.rmtree(run / "model")
    earlier = str(run / "checkpoints" / "step-00000004")
    export.run(ExportSettings(model=earlier, format="hf", output=str(run / "model")))


def edit_recipe(run, section, name, value):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe[section][name] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def edit_settings(run, section, name, value, *places):
    edit_recipe(run, section, name, value)

    def change(manifest):
        for place in places:
            manifest[place][section][name] = value

    change_json(run / "manifest.json", change)


def edit_line(run, change, with_digests=False):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    change(lines)
    file.write_text("".join(lines))
    if with_digests:
        change_json(run / "manifest.json", lambda manifest: manifest.update(metrics=line_digests(file)))


def replace_in(number, old, new):
    def change(lines):
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new)

    return change


def other_loss(lines):
    line = json.loads(lines[-2])
    lines[-2] = json.dumps(line | {"train/loss": line["train/loss"] + 1e-6}) + "\n"


CHANGES = {
    "learning rate": (lambda run, _: edit_recipe(run, "optimizer", "learning_rate", 2e-2), "recipe", "learning_rate"),
    "log_every": (lambda run, _: edit_recipe(run, "training", "log_every", 2), "recipe", "training.log_every"),
    "seed": (lambda run, _: edit_recipe(run, "training", "seed", 1), "recipe", "training.seed"),
    "seed everywhere": (
        lambda run, _: edit_settings(run, "training", "seed", 1, "settings", "identity"),
        *("checkpoints", "training.seed"),
    ),
    "rate in recipe and manifest": (
        lambda run, _: edit_settings(run, "optimizer", "learning_rate", 2e-2, "settings"),
        *("plan", "identity.optimizer.learning_rate"),
    ),
    "recipe of another run": (lambda run, other: shutil.copy(other / "recipe.yaml", run), "recipe", "seed"),
    "line edited": (lambda run, _: edit_line(run, other_loss), "metrics", "line 10"),
    "evaluation edited": (lambda run, _: edit_line(run, replace_in(0, "eval/loss", "eval/lose")), "metrics", "line 1"),
    "line dropped": (lambda run, _: edit_line(run, lambda lines: lines.pop(3)), "metrics", "line 4"),
    "line and digest": (lambda run, _: edit_line(run, other_loss, with_digests=True), "steps", "`train/loss`"),
    "data of a line": (
        lambda run, _: edit_line(run, replace_in(1, '"data": "', '"data": "0'), with_digests=True), "order", "step 1"
    ),
    "metrics removed": (lambda run, _: (run / "metrics.jsonl").unlink(), "metrics", "metrics.jsonl"),
    "checkpoint damaged": (
        lambda run, _: nudge(run / "checkpoints" / "step-00000004" / "model.safetensors"),
        *("checkpoints", "step-00000004/model.safetensors"),
    ),
    "checkpoint forged": (lambda run, _: forge_checkpoint(run, 4), "steps", "step-00000004"),
    "last one forged": (lambda run, _: forge_checkpoint(run, 7), "steps models", "step-00000007"),
    "swapped": (lambda run, _: swap_checkpoints(run, "step-00000002", "step-00000004"), "steps", "step-00000004"),
    "renamed": (
        lambda run, _: (run / "checkpoints" / "step-00000004").rename(run / "checkpoints" / "step-00000005"),
        *("checkpoints", "step-00000005"),
    ),
    "checkpoint of another run": (
        lambda run, other: shutil.copytree(
            other / "checkpoints" / "step-00000007", run / "checkpoints" / "step-00000007", dirs_exist_ok=True
        ),
        *("checkpoints", "training.seed"),
    ),
    "last one removed": (
        lambda run, _: shutil.rmtree(run / "checkpoints" / "step-00000007"), "checkpoints", "step-00000006"
    ),
    "model nudged": (lambda run, _: nudge(run / "model" / "model.safetensors"), "models", "model/model.safetensors"),
    "best nudged": (lambda run, _: nudge(run / "best" / "model.safetensors", 1e-6), "models", "best/model.safetensors"),
    "model of another run": (
        lambda run, other: shutil.copytree(other / "model", run / "model", dirs_exist_ok=True), "models", "model/model"
    ),
    "model of an earlier step": (lambda run, _: export_earlier(run), "models", "model/model"),
    "template of the model": (
        lambda run, _: (run / "model" / "chat_template.jinja").write_text("{{ messages }}"),
        *("models", "chat_template.jinja"),
    ),
    "ids": (
        lambda run, _: change_json(run / "model" / "config.json", lambda config: config.update(eos_token_id=3)),
        *("models", "model/config.json"),
    ),
    "one file more": (lambda run, _: (run / "model" / "tokenizer.model").write_text("{}"), "models", "tokenizer.model"),
}  # fmt: skip


IN_PLAIN_TESTS = (
    *("learning rate", "seed everywhere", "line edited", "line and digest", "checkpoint forged"),
    *("checkpoint of another run", "model nudged", "model of another run", "template of the model"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_PLAIN_TESTS else pytest.mark.long) for name in CHANGES]
)
def test_every_change_is_found_and_named(name, run, another):
    """Also those that come with digests to match: then the steps that are computed again find them."""
    change, expected, named = CHANGES[name]
    change(run, another)
    found = failures(run, steps=100 if expected.startswith("steps") else 1)
    assert set(expected.split()) <= set(found), found
    assert named in found[expected.split()[0]]
    assert read(run / "certificate.json")["verified"] is False
    assert "Not verified" in (run / "certificate.md").read_text()


@pytest.mark.parametrize(
    "what", ["a byte", "a row dropped", *(pytest.param(w, marks=pytest.mark.long) for w in ("a row twice", "gone"))]
)
def test_changed_data_are_found_and_named(what, run, data):
    content = data.read_bytes()
    try:
        rows = content.splitlines(keepends=True)
        if what == "a byte":
            place = content.rindex(b'"text"') + 12
            data.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        elif what == "gone":
            data.unlink()
        else:
            data.write_bytes(b"".join(rows[:-1] if what == "a row dropped" else [*rows, rows[0]]))
        found = failures(run, steps=1)
    finally:
        data.write_bytes(content)
    assert list(found) == ["setup" if what == "gone" else "data"]
    assert "trees.jsonl" in next(iter(found.values()))
    assert claims(run)["steps"]["result"] == "not checked"


def test_another_template_or_start_is_found_and_named(run, tiny_model_folder, monkeypatch):
    from gpt2ft.data import store
    from gpt2ft.runs import loaded_model, manifest

    with monkeypatch.context() as patch:
        for module in (store, manifest):
            patch.setattr(module, "template_digest", lambda: "another")
        assert list(failures(run, steps=1)) == ["template"]
    seed_for = loaded_model.seed_for
    with monkeypatch.context() as patch:
        patch.setattr(loaded_model, "seed_for", lambda seed, purpose: seed_for(seed + 1, purpose))
        assert list(failures(run, steps=1)) == ["start"]


def test_what_is_no_finished_run_is_refused(tmp_path, finished):
    assert verify.NotVerified.exit_code == 1
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SettingsError, match="finished run"):
        check(tmp_path)
    with pytest.raises(SettingsError, match="runs of this version"):
        check(finished, tmp_path)


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


def test_two_runs_are_compared_line_by_line(finished, another, run_sft, data, tmp_path, capsys):
    run_sft(tmp_path / "same", STEPS, data={"train": [str(data)]})
    assert check(finished, tmp_path / "same") is None
    out = capsys.readouterr().out
    assert "the same    7 lines" in out
    assert "settings    `training.keep_for_verification`: 2 and 0" in out
    assert "differ first at step 1, in what was trained on: `data`" in check(finished, another)
    assert "seed        `training.seed`: 0 and 1" in capsys.readouterr().out
    run_sft(tmp_path / "rate", STEPS, data={"train": [str(data)]}, learning_rate=1.1e-2)
    assert "differ first at step 1, in numbers: `train/learning_rate`" in check(finished, tmp_path / "rate")
    assert "settings    `optimizer.learning_rate`" in capsys.readouterr().out
    run_sft(tmp_path / "short", 3)
    assert "in what was trained on" in check(finished, tmp_path / "short")
    assert "data        `identity.tokenised_data." in capsys.readouterr().out
    edit_line(tmp_path / "same", other_loss)
    assert "differ first at step 7, in numbers: `train/loss`" in check(finished, tmp_path / "same")
    change_json(tmp_path / "same" / "manifest.json", lambda manifest: manifest["versions"].update(torch="9"))
    check(finished, tmp_path / "same")
    assert "versions    `versions.torch`" in capsys.readouterr().out
