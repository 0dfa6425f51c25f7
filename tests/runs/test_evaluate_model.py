"""Comparison of models as a whole: what is in the report, that it is the same each time, and what goes wrong."""

import json
import math
import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from processes import ON_CPU, ROOT, run, torchrun
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from gpt2ft.data.reading import DataError
from gpt2ft.errors import SettingsError
from gpt2ft.model.pretrained import ModelError
from gpt2ft.report.schema import Report
from gpt2ft.report.table import BITS, BY_HEART, DISTINCT_2, ENDS, NATS, PERPLEXITY, WORDS, measured
from gpt2ft.runs import evaluate_model
from gpt2ft.runs.export import write_folder
from gpt2ft.runs.loaded_model import find_model, load_model, read_run_settings
from gpt2ft.runs.measurements import Subject, short_names, training_runs
from gpt2ft.settings.measuring import EvaluateSettings
from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.sections import ModelSettings

FEW = {"data": ("quickstart:held_out",), "num_prompts": 21, "max_new_tokens": 12, "precision": "fp32"}


@pytest.fixture(scope="module")
def run_folder(run_sft, tiny_weights_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "tuned"
    run_sft(folder, 6, path=tiny_weights_folder, learning_rate=1e-3)
    return folder


@pytest.fixture
def evaluate(tmp_path, cache):
    """evaluate(*models, ...): the report, read from its file."""

    def evaluate(*models, **settings):
        file = tmp_path / "report.json"
        given = FEW | {"model": tuple(map(str, models)), "report": str(file), "cache": str(cache)} | settings
        evaluate_model.run(EvaluateSettings(**given))
        return json.loads(file.read_text())

    return evaluate


def copy_of(folder, target, change):
    """A model folder with its weights changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def reports(run_folder, tiny_weights_folder, tmp_path_factory, cache):
    """Base, run and checkpoint compared twice: texts of two files."""
    files = [tmp_path_factory.mktemp("reports") / f"{number}.json" for number in range(2)]
    models = (str(tiny_weights_folder), str(run_folder), str(run_folder / "checkpoints" / "step-00000006"))
    for file in files:
        evaluate_model.run(EvaluateSettings(**FEW, model=models, report=str(file), cache=str(cache)))
    return [file.read_text() for file in files]


def test_the_same_seed_gives_the_same_bytes(reports):
    assert reports[0] == reports[1]


def test_the_report_has_the_shape_that_is_promised(reports):
    report = json.loads(reports[0], parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    TypeAdapter(Report).validate_python(report, extra="forbid")
    base, tuned, checkpoint = report["models"]
    assert [model["name"] for model in (tuned, checkpoint)] == ["tuned", "tuned/step-00000006"]
    assert "difference" not in base["held_out"]
    assert "training" not in base
    assert tuned["held_out"]["difference"]["nats_per_token"]["high"] < 0  # it has learnt
    assert tuned["held_out"]["difference"] == checkpoint["held_out"]["difference"]
    assert tuned["weights"] == checkpoint["weights"]
    assert set(base["plain_text"]) == {"gettysburg", "independence"}
    assert set(tuned["learnt_by_heart"]) == {"grams_8"}
    facts = tuned["training"]
    assert facts["sources"][0]["source"] == "quickstart"
    assert 0 < facts["supervised_share"] < 1
    assert 0 < facts["fill"] <= 1
    assert facts["curves"]["eval/loss"][0][0] == 0
    assert [step for step, _ in facts["curves"]["train/loss"]] == [1, 2, 3, 4, 5, 6]
    conversations = report["conversations"]
    assert [len(conversation["turns"]) for conversation in conversations] == [1, 2, 1]
    assert all(len(turn["replies"]) == 3 for conversation in conversations for turn in conversation["turns"])
    assert base["replies"]["uses_earlier_turn"]["count"] == 6
    assert report["people"]["ends_by_itself"]["value"] == 0  # all of them are longer than a reply may be here
    assert report["overlap"]["conversations"] == report["data"]["conversations"] == 44
    assert report["settings_that_differ"] == {}


def test_the_command_gives_the_same_settings(reports, run_folder):
    (command,) = json.loads(reports[0])["commands"]
    parsed = parse_script(EvaluateSettings, "model", command.split()[2:])
    assert parsed.models[1] == str(run_folder)
    assert {name: getattr(parsed, name) for name in FEW} == FEW


@pytest.mark.long
def test_two_processes_measure_the_same(reports, cache, tmp_path):
    expected = json.loads(reports[0])
    arguments = expected["commands"][0].split()[2:]
    file = tmp_path / "report.json"
    script = ROOT / "launch" / "evaluate.py"
    run([*torchrun(2), script, *arguments, "--report", file, "--cache", cache], **ON_CPU)
    found = json.loads(file.read_text())
    assert found["conversations"] == expected["conversations"]
    for one, other in zip(found["models"], expected["models"], strict=True):
        assert one["replies"] == other["replies"]
        for part in ("by_depth", "by_place"):
            for name, loss in other["held_out"][part].items():
                assert one["held_out"][part][name] == pytest.approx(loss, rel=1e-5)


def test_identical_models_differ_by_nothing(evaluate, run_folder):
    one, other = evaluate(run_folder, run_folder)["models"]
    assert one["name"] != other["name"]
    for difference in other["held_out"]["difference"].values():
        assert difference == {"value": 0, "low": 0, "high": 0}
    same = [
        {name: value for name, value in model.items() if name not in ("name", "held_out")} for model in (one, other)
    ]
    assert same[0] == same[1]


def test_a_model_that_fails_is_shown_failing(evaluate, tiny_weights_folder, tmp_path):
    def nan(weights):
        weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = math.nan

    def huge(weights):
        weights["transformer.h.1.mlp.c_fc.weight"].fill_(3e38)

    broken = [copy_of(tiny_weights_folder, tmp_path / change.__name__, change) for change in (nan, huge)]
    report = evaluate(tiny_weights_folder, *broken)
    sound, *failed = report["models"]
    assert "failed" not in sound
    assert all("finite" in model["failed"] for model in failed)
    assert all("held_out" not in model and "replies" not in model for model in failed)
    turns = [turn for conversation in report["conversations"] for turn in conversation["turns"]]
    assert all(turn["replies"][0] and turn["replies"][1:] == [None, None] for turn in turns)
    assert any("finite" in warning for warning in report["warnings"])
    TypeAdapter(Report).validate_python(report, extra="forbid")
    swapped = evaluate(broken[0], tiny_weights_folder)["models"]
    assert "failed" in swapped[0]
    assert "difference" not in swapped[1]["held_out"]
    with pytest.raises(ModelError, match="finite"):
        evaluate(*broken[:1])
    with pytest.raises(ModelError, match="nowhere"):
        evaluate(tiny_weights_folder, "nowhere")


@pytest.fixture(scope="module")
def other_vocabulary(tiny_model_folder, tmp_path_factory):
    """A model with the first 700 merges alone, and random weights."""
    shape, folder = tmp_path_factory.mktemp("shape"), tmp_path_factory.mktemp("other") / "other"
    known = json.loads((tiny_model_folder / "vocab.json").read_text())
    vocabulary = {token: id for token, id in known.items() if id < 956} | {"<|endoftext|>": 956}
    merges = (tiny_model_folder / "merges.txt").read_text().splitlines(keepends=True)
    config = json.loads((tiny_model_folder / "config.json").read_text())
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 956)
    (shape / "vocab.json").write_text(json.dumps(vocabulary))
    (shape / "merges.txt").write_text("".join(merges[: 701 if merges[0].startswith("#") else 700]))
    (shape / "config.json").write_text(json.dumps(config | ids | {"vocab_size": 957}))
    loaded = load_model(ModelSettings(path=str(shape), random_init=True), seed=3)
    write_folder(folder, loaded.weights(), loaded.gpt2.config, loaded.tokenizer)
    return folder


def test_models_with_other_vocabularies_compare_by_bytes_alone(evaluate, tiny_weights_folder, other_vocabulary):
    report = evaluate(tiny_weights_folder, other_vocabulary)
    losses = [model["held_out"]["total"] for model in report["models"]]
    assert losses[0]["bytes"] == losses[1]["bytes"]
    assert losses[0]["tokens"] < losses[1]["tokens"]
    assert set(report["models"][1]["held_out"]["difference"]) == {"bits_per_byte"}


# --- one model ------------------------------------------------------------------------------------------------------


def test_of_one_model_all_stands_at_the_top_too(evaluate, run_folder, capsys):
    report = evaluate(run_folder, num_prompts=0)
    assert report["total"] == report["models"][0]["held_out"]["total"]
    assert set(report["by_source"]) == {"quickstart:held_out"}
    assert report["model"] == str(run_folder)
    assert "conversations" not in report
    assert "replies" not in report
    assert f"{report['total']['nats_per_token']:.4f}" in capsys.readouterr().out


def test_a_report_is_neither_overwritten_nor_left_where_nobody_asked(run_folder, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = FEW | {"num_prompts": 0, "cache": str(cache)}
    for name in ("report.json", "report-2.json", "report-3.json"):
        evaluate_model.run(EvaluateSettings(model=str(run_folder), **given))
        assert f"written to {run_folder / name}\n" in capsys.readouterr().out
    assert len({(run_folder / name).read_text() for name in ("report.json", "report-2.json", "report-3.json")}) == 1
    evaluate_model.run(EvaluateSettings(model="quickstart", random_init=True, **given))
    assert "not written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_newest_run_is_named(run_folder, cache, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "only").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "report.json"
    evaluate_model.run(EvaluateSettings(**FEW | {"num_prompts": 0}, report=str(report), cache=str(cache)))
    assert "runs/only" in capsys.readouterr().out
    assert json.loads(report.read_text())["model"] == "runs/only"
    with pytest.raises(ModelError, match="runs/only"):  # the others, on request
        find_model("runs")


def test_texts_of_one_s_own(evaluate, tiny_weights_folder, tmp_path):
    texts = {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        texts[str(tmp_path / folder / "page.txt")] = f"This is text {folder}, and it is long enough. " * 9
    for file, text in texts.items():
        Path(file).write_text(text)
    found = evaluate(tiny_weights_folder, text=tuple(texts), num_prompts=0)["models"][0]["plain_text"]
    assert {name: loss["bytes"] for name, loss in found.items()} == {
        name.removesuffix(".txt"): len(text) for name, text in texts.items()
    }


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_and_texts_are_one_sentence(content, evaluate, tiny_weights_folder, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    with pytest.raises(DataError, match="empty.jsonl"):
        evaluate(tiny_weights_folder, data=(str(empty),))
    for name in ("text", "prompts"):
        with pytest.raises(SettingsError, match=f"`{name}` = .*empty.jsonl"):
            evaluate(tiny_weights_folder, **{name: (str(empty),) if name == "text" else str(empty)})


def trained_on(run_folder, moved, data, **sections):
    """The run as if it had been trained on other data."""
    moved.mkdir()
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text()) | sections
    recipe["data"]["train"] = [str(data)]
    for name in ("model", "manifest.json", "metrics.jsonl"):
        (moved / name).symlink_to(run_folder / name)
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return moved


def test_labelled_replies_are_read_as_training_data_too(evaluate, run_folder, tmp_path):
    data = tmp_path / "labelled.jsonl"
    records = [{"prompt": f"Tea {n}?", "completion": f"Yes, {n}.", "label": n > 2} for n in range(4)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = evaluate(trained_on(run_folder, tmp_path / "moved", data, dpo={"loss": "kto"}), num_prompts=0)
    assert not report["overlap"]["problems"]
    assert report["overlap"]["exact"] == 0


def test_training_data_that_are_gone_are_said_to_be(evaluate, run_folder, tmp_path):
    report = evaluate(trained_on(run_folder, tmp_path / "moved", tmp_path / "gone.jsonl"))
    (problem,) = report["overlap"]["problems"]
    assert "gone.jsonl" in problem
    assert "learnt_by_heart" not in report
    assert "exact" not in report["overlap"]


def test_runs_that_have_taken_each_other_s_place_are_read_once(tmp_path):
    """SFT, DPO from it, and SFT from that into the folder of the first."""
    homes = [tmp_path / name for name in ("sft", "dpo")]
    for home, start in zip(homes, reversed(homes), strict=True):
        home.mkdir()
        recipe = {"model": {"path": str(start / "model")}, "data": {"train": [home.name]}}
        (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subject = Subject("sft", None, None, homes[0], homes[0], read_run_settings(homes[0]))
    assert [run.data.train for run in training_runs(subject)] == [("sft",), ("dpo",)]


def test_no_name_drives_the_terminal(evaluate, tiny_weights_folder, tmp_path, capsys):
    red = copy_of(tiny_weights_folder, tmp_path / "\x1b[31mred", lambda weights: None)
    assert "\x1b" in evaluate(tiny_weights_folder, red, num_prompts=0)["warnings"][0]
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["gpt2", "runs/a", "runs/b/"], ["gpt2", "a", "b"]),
        (["runs/a/model", "runs/a/checkpoints/step-00000010"], ["a/model", "a/step-00000010"]),
        (["quickstart", "runs/quickstart"], ["quickstart", "runs/quickstart"]),
        (["runs/a", "runs/a", "x/a"], ["runs/a (1)", "runs/a (2)", "x/a"]),
        (["/", "."], ["/", "."]),
    ],
)
def test_names_are_short_and_unlike_each_other(paths, names):
    assert short_names(paths) == names


def test_models_on_the_command_line():
    assert parse_script(EvaluateSettings, "model", ["a", "b", "c", "--data", "d"]).models == ("a", "b", "c")
    assert parse_script(EvaluateSettings, "model", ["--data", "d"]).models == ()
    one = parse_script(EvaluateSettings, "model", ["a", "--data", "d"])
    assert (one.model, one.models) == ("a", ("a",))


# --- all that a person gets ------------------------------------------------------------------------------------------


class Rows(HTMLParser):
    """Rows of all tables of a page, as lists of texts."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.is_open = [], False
        self.feed(page)

    def handle_starttag(self, name, attributes):
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        self.is_open |= name in ("td", "th")

    def handle_endtag(self, name):
        self.is_open &= name not in ("td", "th")

    def handle_data(self, data):
        if self.is_open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(run_folder, tiny_weights_folder, cache, tmp_path_factory):
    """Base and run compared twice by the script: two folders, and what it has printed."""
    folder = tmp_path_factory.mktemp("written")
    given = ["--data", "quickstart:held_out", "--num_prompts", 4, "--max_new_tokens", 8, "--precision", "fp32"]
    command = [sys.executable, ROOT / "launch" / "evaluate.py", tiny_weights_folder, run_folder, *given]
    ended = [run([*command, "--cache", cache, "--output", folder / name], **ON_CPU) for name in ("one", "other")]
    return folder / "one", folder / "other", ended[0]


def test_page_markdown_and_json_agree_and_the_same_seed_gives_the_same_bytes(written):
    folder, other, ended = written
    names = {"report.html", "report.md", "report.json"}
    assert {file.name for file in folder.iterdir()} == {file.name for file in other.iterdir()} == names
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert f"written to {folder / 'report.html'}" in ended.stdout

    page, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    report = json.loads((folder / "report.json").read_text())
    of_page = {row[0].strip(): row[1:] for row in Rows(page).rows if row}
    of_markdown = {row[0].strip(): row[1:] for row in (line.split("|")[1:-1] for line in markdown.splitlines()) if row}
    for figure in (NATS, PERPLEXITY, BITS, ENDS, WORDS, DISTINCT_2, BY_HEART):
        for number, model in enumerate(report["models"]):
            found = measured(model, figure.path)
            value = figure.write(found["value"] if isinstance(found, dict) else found)
            for rows in (of_page, of_markdown):
                assert rows[figure.label][number].split()[0] == value, figure.label
    replies = [reply["text"] for turn in report["conversations"][0]["turns"] for reply in turn["replies"]]
    assert len(replies) == 2
    assert all(reply.strip() in unescape(page) and reply.strip() in markdown for reply in replies)
    assert not re.search(r"""(src|action|data|poster)=|\bhref=["']?[^#"']|url\(["']?[^#"')]|@import""", page)


def test_lines_tell_how_far_each_model_is(written):
    """Where there is no terminal: of each model and part a line when it begins, and one when it is done."""
    _, _, ended = written
    assert "\r" not in ended.stderr
    told = re.findall(r"^(\S+) \((\d) of 2\): (.*) (\d+)/(\d+), (\S+) passed, (\S+) left$", ended.stderr, re.MULTILINE)
    parts = ["held-out streams", "plain-text streams", "replies"]
    by_part = {}
    for _, number, part, *counted in told:  # more lines in between where a part takes long
        by_part.setdefault((number, part), []).append(counted)
    assert list(by_part) == [(number, part) for number in "12" for part in parts]
    for (begun, total, *_), *_, (done, _, _, left) in by_part.values():
        assert int(begun) == 0 < int(done) == int(total)
        assert left == "00:00"
