"""Model cards: valid for the hub's own reader, true to the run, and hostile to no reader whatever names they hold."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from gpt2ft import quickstart
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.runs import export, lineage
from gpt2ft.runs.identity import settings_that_train
from gpt2ft.runs.lineage import _base_origin, _data_origin
from gpt2ft.runs.model_card import Card, name_certificate
from gpt2ft.settings.choices import PUBLISHED_MODELS
from gpt2ft.settings.scripts import DPOSettings, SFTSettings
from gpt2ft.settings.sections import ModelSettings
from gpt2ft.settings.using import ExportSettings

LORA = {"rank": 4, "alpha": 8.0}
COUNTS = {"mixing_weight": 1.0, "conversations": 3, "tokens": 40, "supervised": 20, "pairs": 0}
OASST = {"name": "oasst1", "repository": "OpenAssistant/oasst1", "revision": "fdf72ae0827c", "license": "apache-2.0"}
GPT2 = {"name": "gpt2", "repository": "openai-community/gpt2", "revision": "607a30d783df", "license": "mit"}
HOSTILE = "a|b`c*<script>[x](y)\n# $z$ ```"


def loaded(text, folder):
    (folder / "README.md").write_text(text, encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    assert yaml.safe_load(card.data.to_yaml()) == yaml.safe_load(text.split("---")[1])
    return card


def card_text(tmp_path, base=GPT2, origins=(OASST,), layout="hf", kind=SFTSettings, names=(), lines=(), **settings):
    chosen = kind(**{"output": "runs/tea", **settings})
    of_data = [COUNTS | dict(origin) for origin in origins]
    method = "DPO" if kind is DPOSettings else "SFT"
    manifest = {
        "settings": chosen.model_dump(mode="json"),
        "precision": "fp32",
        "versions": {"gpt2ft": "1", "torch": "2"},
        "identity": settings_that_train(chosen) | {"steps": 9, "held_out_data": {"conversations": 5}},
        "lineage": {"method": method, "base": base, "data": of_data, "names": dict(names)},
    }
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "eval/lo')
    return Card(manifest, metrics, GPT2Config(100, n_layer=1), 9).text(layout)


# --- metadata -------------------------------------------------------------------------------------------------------


def test_metadata_says_what_is_known(tmp_path):
    data = loaded(card_text(tmp_path), tmp_path).data
    assert (data.base_model, data.datasets, data.license) == ("openai-community/gpt2", ["OpenAssistant/oasst1"], "mit")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", None)
    assert data.tags == ["gpt2", "conversational", "sft", "gpt2ft"]
    assert [loaded(card_text(tmp_path, layout=kind), tmp_path).data.library_name for kind in ("adapter", "gguf")] == [
        "peft", "gguf"
    ]  # fmt: skip


@pytest.mark.parametrize("unknown", [{"name": "mine.jsonl"}, OASST | {"license": "cc-by-nc-4.0"}])
def test_no_licence_is_claimed_where_data_may_forbid_it(unknown, tmp_path):
    card = loaded(card_text(tmp_path, origins=(OASST, unknown)), tmp_path)
    assert card.data.license is None
    assert unknown.get("license", "not known here") in card.text


def test_languages_are_codes(tmp_path):
    card = card_text(tmp_path, data={"languages": ["en", "pt-BR", "EN", "german"]})
    assert loaded(card, tmp_path).data.language == ["en", "pt"]


def test_a_run_on_a_run_names_the_base_and_the_data_of_both(tmp_path):
    first = {"method": "SFT LoRA", "base": GPT2, "data": [COUNTS | OASST], "names": {}}
    base = {"name": "first|run", "lineage": first}
    hh = {"name": "hh-rlhf", "repository": "Anthropic/hh-rlhf", "revision": "09be8c5bbc57", "license": "mit"}
    card = loaded(card_text(tmp_path, base=base, origins=(hh,), kind=DPOSettings), tmp_path)
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.datasets == ["OpenAssistant/oasst1", "Anthropic/hh-rlhf"]
    assert card.data.tags == ["gpt2", "conversational", "sft", "lora", "dpo", "gpt2ft"]
    assert "dpo.loss: sigmoid" in card.text
    on_disk = loaded(card_text(tmp_path, base=base, layout="adapter"), tmp_path)
    assert on_disk.data.base_model is None  # it loads on the run, which the hub does not have


# --- text -----------------------------------------------------------------------------------------------------------


def test_names_mean_nothing_in_markdown_and_yaml(tmp_path):
    lines = [{"step": step, "eval/loss": 2.0, f"eval/loss/{HOSTILE}": None, "other/loss": 1} for step in (0, 9)]
    hostile = {"base": {"name": HOSTILE}, "origins": ({"name": HOSTILE},), "names": {HOSTILE: HOSTILE}}
    card = card_text(tmp_path, **hostile, lines=lines, output=f"runs/{HOSTILE}")
    text = loaded(card, tmp_path).text
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\n# $z" not in text
    outside = "".join(text.split("```")[::2])
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert len(rows) == 3 + 4
    cells = [row.replace("\\|", "").count("|") for row in rows]
    assert cells == [8] * 3 + [5] * 4
    assert "- |" in rows[-1]  # a loss that was not finite


def test_settings_are_fenced_whatever_they_hold(tmp_path):
    card = card_text(tmp_path, data={"ignore_keys": ["```", "x"], "max_length": 77})
    assert "\n````yaml\n" in card
    assert "data.max_length: 77" in card


def test_only_settings_that_change_the_model_and_no_paths_are_told(tmp_path):
    model, data = {"path": "/home/me/m"}, {"train": ["/home/me/a.jsonl"], "cache": "/home/me/cache"}
    card = card_text(tmp_path, base={"name": "m"}, model=model, data=data, optimizer={"learning_rate": 3e-4})
    assert "/home/me" not in card
    assert "optimizer.learning_rate: 0.0003" in card
    assert "model.path" not in card
    assert "output" not in yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])


def test_figures_have_units_and_come_from_the_step_of_the_model(tmp_path):
    lines = [{"step": step, "eval/loss": 5.0 - step, "eval/perplexity": 7.0} for step in (0, 3)]
    assert "None were measured at this step" in card_text(tmp_path, lines=lines)
    lines.append({"step": 9, "eval/loss": 2.5, "eval/bits_per_byte": 1.25, "eval/stopped": 1.0})
    card = card_text(tmp_path, lines=lines)
    assert "| loss | nats/token | 5 | 2.5 |" in card
    assert "bits/byte | - | 1.25 |" in card
    assert "On 5 conversations that" in card
    lines[-1] |= {"eval/accuracy": 0.75}
    for loss, share in (("sigmoid", "pairs"), ("kto", "replies")):
        card = card_text(tmp_path, lines=lines, kind=DPOSettings, dpo={"loss": loss})
        assert "| loss |  | 5 | 2.5 |" in card
        assert f"| accuracy | share of {share} | - | 0.75 |" in card
        assert "On 5 prompts that" in card


# --- where things come from -----------------------------------------------------------------------------------------


def test_origins_of_bases(tmp_path, monkeypatch):
    by_name = {path: _base_origin(ModelSettings(path=path)) for path in ("gpt2", "openai-community/gpt2", "quickstart")}
    assert by_name["gpt2"]["repository"] == by_name["openai-community/gpt2"]["repository"] == "openai-community/gpt2"
    assert by_name["openai-community/gpt2"]["revision"] == PUBLISHED_MODELS["gpt2"].revision
    assert by_name["quickstart"] == {"name": "quickstart", "license": "apache-2.0"}
    assert _base_origin(ModelSettings(path="gpt2", random_init=True)) == {"name": "random weights"}
    monkeypatch.setattr(lineage, "commit_of", lambda repository, revision, kind: "c0ffee")
    assert _base_origin(ModelSettings(path="a/b@v1")) == {"name": "a/b", "repository": "a/b", "revision": "c0ffee"}
    (tmp_path / "mine").mkdir()
    assert _base_origin(ModelSettings(path=str(tmp_path / "mine"))) == {"name": "mine"}


def test_origins_of_data(tmp_path):
    (tmp_path / "oasst1.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert _data_origin(str(tmp_path / "oasst1.jsonl")) == {"name": "oasst1.jsonl"}
    assert _data_origin("oasst1") == OASST | {"revision": "fdf72ae0827c1cda404aff25b6603abec9e3399b"}
    assert _data_origin("quickstart:held_out") == {"name": "quickstart:held_out", "license": "mit"}
    assert "MIT" in (quickstart.MODEL / "README.md").read_text()


@pytest.mark.parametrize(("loss", "method"), [("sigmoid", "DPO"), ("kto", "KTO"), ("orpo", "ORPO")])
def test_a_loss_that_is_no_dpo_is_called_by_its_name(loss, method):
    assert lineage.lineage(DPOSettings(dpo={"loss": loss}, data={"train": ["quickstart"]}), [])["method"] == method


# --- of runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_run(run_sft, tiny_weights_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "tea|pot"
    run_sft(folder, 2, path=tiny_weights_folder, lora=LORA)
    return folder


@pytest.fixture(scope="module")
def dpo_run(run_dpo, lora_run):
    folder = lora_run.parent / "dpo"
    run_dpo(folder, 2, path=lora_run, data={"train": [str(quickstart.TREES)]})
    return folder


def exported(model, output, **settings):
    export.run(ExportSettings(model=str(model), output=str(output), **settings))
    return output


def test_every_folder_of_a_run_has_its_card(lora_run, dpo_run):
    for folder, library in (("model", "transformers"), ("best", "transformers"), ("adapter", "peft")):
        card = ModelCard.load(lora_run / folder / "README.md")
        assert card.data.library_name == library
        assert card.text.startswith("\n# tea\\|pot\n") or "# tea\\|pot" in card.text
    card = ModelCard.load(dpo_run / "model" / "README.md")
    assert {"sft", "lora", "dpo"} <= set(card.data.tags)
    assert "| DPO | trees.jsonl | not known here |" in card.text
    assert "| SFT LoRA | quickstart x 0.4 | mit |" in card.text
    for file in (*lora_run.rglob("README.md"), *dpo_run.rglob("README.md")):
        assert str(lora_run.parent) not in file.read_text()
        assert str(Path(quickstart.TREES).parent) not in file.read_text()


@pytest.mark.parametrize("layout", ["model", "adapter"])
def test_the_code_of_a_card_loads_the_model(layout, lora_run, tiny_weights_folder, capsys):
    folder = lora_run / layout
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('"PATH"', repr(str(folder))).replace('"BASE"', repr(str(tiny_weights_folder))), {})
    assert capsys.readouterr().out.endswith("\n")  # a reply, if an empty one


def test_exports_have_cards_of_their_step_and_layout(lora_run, tmp_path):
    mine = lora_run / "model" / "README.md"
    written = mine.read_text()
    mine.write_text(written + "My words.\n")
    assert (exported(lora_run, tmp_path / "hf", format="hf") / "README.md").read_text() == mine.read_text()
    mine.write_text(written)
    merged = exported(lora_run / "adapter", tmp_path / "merged", format="hf") / "README.md"
    assert ModelCard.load(merged).data.library_name == "transformers"
    checkpoint = exported(lora_run / "checkpoints" / "step-00000002", tmp_path / "2", format="adapter")
    assert "after step 2 of 2" in (checkpoint / "README.md").read_text()
    gguf = exported(lora_run, tmp_path / "gguf", format="gguf") / "README.md"
    assert ModelCard.load(gguf).data.library_name == "gguf"
    assert "llama-server" in gguf.read_text()


def test_a_model_of_no_run_gets_no_card_and_keeps_its_own_to_itself(lora_run, tmp_path):
    model = shutil.copytree(lora_run / "model", tmp_path / "theirs")
    (model / "README.md").write_text("Theirs.")
    assert not (exported(model, tmp_path / "out", format="hf") / "README.md").exists()
    assert (model / "README.md").read_text() == "Theirs."
    beside = shutil.copytree(model, lora_run / "theirs")
    assert not (exported(beside, tmp_path / "again", format="hf") / "README.md").exists()
    shutil.rmtree(beside)


def test_a_certificate_is_named_and_taken_back_and_a_card_of_others_stays(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(before := card_text(tmp_path) + "My words.\n")
    name_certificate(tmp_path, "abc")
    assert "`abc`" in file.read_text()
    assert "launch/verify.py certificate.json PATH" in file.read_text()
    name_certificate(tmp_path, "def")
    assert "`abc`" not in file.read_text()
    assert "`def`" in file.read_text()
    name_certificate(tmp_path, "")
    assert file.read_text() == before
    file.write_text("Mine.")
    name_certificate(tmp_path, "abc")
    assert file.read_text() == "Mine."
    file.unlink()
    name_certificate(tmp_path, "abc")
    assert not file.exists()
