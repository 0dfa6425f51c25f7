"""Whatever is changed in a finished run, or in what it was made of, is found and named."""

import shutil

import pytest
import yaml
from verification import (
    change_json,
    claims,
    edit_line,
    failures,
    forge_checkpoint,
    nudge,
    other_loss,
    read,
    renew,
    replace_in,
)

from gpt2ft.runs import export
from gpt2ft.settings.using import ExportSettings


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
def test_changed_data_are_found_and_named(what, run, own_trees):
    content = own_trees.read_bytes()
    try:
        rows = content.splitlines(keepends=True)
        if what == "a byte":
            place = content.rindex(b'"text"') + 12
            own_trees.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        elif what == "gone":
            own_trees.unlink()
        else:
            own_trees.write_bytes(b"".join(rows[:-1] if what == "a row dropped" else [*rows, rows[0]]))
        found = failures(run, steps=1)
    finally:
        own_trees.write_bytes(content)
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
