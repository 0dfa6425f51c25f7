"""Trackers: refused in a sentence before anything is loaded, told the numbers and texts of a run, and gone on with."""

import contextlib
import importlib.util
import json
import struct
import sys

import pytest

from gpt2ft.checkpoint import TrainState
from gpt2ft.errors import SettingsError
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.training import trackers
from gpt2ft.training.trackers import RUNS, check_trackers
from gpt2ft.training.tracking import Tracker


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """One process; nothing of the person who runs the tests."""
    from accelerate import PartialState

    PartialState()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "NETRC", "TRACKIO_SPACE_ID", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def track(tmp_path):
    """with track("wandb", step=20) as tracker: of a run in tmp_path / "tea"."""

    @contextlib.contextmanager
    def track(*names, step=0):
        state = TrainState(step=step, evaluated_step=step)
        settings = {"training": {"seed": 7}, "tracking": list(names)}
        tracker = Tracker(tmp_path / "tea", state, 200, settings, active=True)
        with contextlib.closing(tracker):
            yield tracker

    (tmp_path / "tea").mkdir()
    return track


def tell(tracker, step):
    tracker.log(step, {"train/loss": 0.5, "data": "0f"})
    tracker.log_text(step, "samples/0", f"> Tea & <milk>?\n```\nAt {step}.")


def metrics(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- wandb ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """As in a process of its own; its service ends with the test."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield wandb
    wandb.teardown()


def records(folder):
    """Records that an offline run has written: a log in LevelDB's format of blocks, records of protobuf in it.

    All of it is there once wandb's service has ended.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    (file,) = folder.glob("*.wandb")
    content, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(folder):
    """{step: {name: value}} of an offline run; parts of a value have names of their own."""
    rows = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows[items["_step"]] = items
    return rows


def test_wandb_has_numbers_texts_and_settings_and_a_resume_goes_on_with_its_run(track, wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    with track("wandb") as tracker:
        tell(tracker, 10)
        tell(tracker, 20)
        tell(tracker, 30)
    (folder,) = (tmp_path / "tea" / "wandb").glob("offline-run-*")
    rows = history(folder)
    assert {step: row["train/loss"] for step, row in rows.items()} == {10: 0.5, 20: 0.5, 30: 0.5}
    assert not any("data" in row for row in rows.values())
    assert rows[10]["samples/0/_type"] == "html-file"
    page = (folder / "files" / rows[20]["samples/0/path"]).read_text()
    assert "&gt; Tea &amp; &lt;milk&gt;?\n```\nAt 20." in page
    (run,) = [record.run for record in records(folder) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("gpt2ft", "tea")
    assert "7" in {item.value_json for item in run.config.update if item.key == "training.seed"}
    known = json.loads((tmp_path / "tea" / RUNS).read_text())
    assert known == {"wandb": run.run_id}
    assert not (tmp_path / "tea" / "tensorboard").exists()
    folder.rename(tmp_path / "first")  # the next may begin within the same second, by which it is named
    with track("wandb", step=20) as tracker:
        tell(tracker, 30)
    (later,) = (tmp_path / "tea" / "wandb").glob("offline-run-*")
    assert later.name.endswith(f"-{run.run_id}")
    assert [*history(later)] == [30]
    with track("wandb"):  # from the start again, and so another one
        pass
    assert json.loads((tmp_path / "tea" / RUNS).read_text()) != known


def refusal(*names):
    with pytest.raises(SettingsError) as refused:
        check_trackers(names)
    (line,) = str(refused.value).splitlines()
    assert f"`tracking` = {names[0]}" in line
    return line


def test_wandb_without_a_key_is_refused_with_the_ways_on(wandb, tmp_path, monkeypatch):
    said = refusal("wandb")
    assert all(way in said for way in ("wandb login", "WANDB_API_KEY", "WANDB_MODE=offline"))
    (tmp_path / "keys").write_text("machine example.org login user password abc\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    refusal("wandb")
    (tmp_path / "keys").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    check_trackers(["wandb"])


@pytest.mark.parametrize(("name", "value"), [("WANDB_API_KEY", "0" * 40), ("WANDB_MODE", "offline")])
def test_wandb_with_a_key_or_offline_may_begin(name, value, wandb, monkeypatch):
    monkeypatch.setenv(name, value)
    check_trackers(["wandb"])


# --- the others -----------------------------------------------------------------------------------------------------


def test_trackio_has_numbers_and_texts_and_a_resume_goes_on_with_its_run(track, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    check_trackers(["trackio"])
    for step in (0, 10):
        with track("trackio", step=step) as tracker:
            tell(tracker, step + 10)
    name = json.loads((tmp_path / "tea" / RUNS).read_text())["trackio"]
    assert name.startswith("tea-")
    storage = trackio.sqlite_storage.SQLiteStorage
    assert storage.get_runs("gpt2ft") == [name]
    logs = storage.get_logs("gpt2ft", name)
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == {10: 0.5, 20: 0.5}
    texts = [log["samples/0"]["_value"] for log in logs if "samples/0" in log]
    assert [text.splitlines()[-2] for text in texts] == ["At 10.", "At 20."]


def test_mlflow_has_numbers_texts_and_settings_and_a_resume_goes_on_with_its_run(track, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for step in (0, 10):
        with track("mlflow", step=step) as tracker:
            tell(tracker, step + 10)
    client = mlflow.MlflowClient()
    known = json.loads((tmp_path / "tea" / RUNS).read_text())["mlflow"]
    run = client.get_run(known)
    assert run.info.run_name == "tea"
    assert run.data.params["training.seed"] == "7"
    assert [(one.step, one.value) for one in client.get_metric_history(known, "train/loss")] == [(10, 0.5), (20, 0.5)]
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/samples/0/step-00000020.txt").endswith("At 20.")


# --- any ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find(module))
    assert f"pip install {name}" in refusal(name, "tensorboard")


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "here" / "mlflow").mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(tmp_path / "here")])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    assert "pip install mlflow" in refusal("mlflow")


def test_a_space_without_a_token_is_refused(monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/curves")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: find("json" if module == "trackio" else module))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "TRACKIO_SPACE_ID" in refusal("trackio")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    check_trackers(["trackio"])


def test_several_and_none(track, tmp_path):
    with track() as tracker:
        tell(tracker, 10)
    assert metrics(tmp_path / "tea") == [10]
    assert [file.name for file in (tmp_path / "tea").iterdir()] == ["metrics.jsonl"]
    problems = SFTSettings(data={"train": ("a",)}, tracking=("tensorboard", "tensorboard")).problems()
    assert "`tracking`" in "".join(problems)
    assert SFTSettings().tracking == ("tensorboard",)
    for none in ("none", ["none"], []):
        assert SFTSettings(tracking=none).tracking == ()
    assert SFTSettings(tracking="wandb").tracking == ("wandb",)
    with pytest.raises(ValueError, match="tracking"):
        SFTSettings(tracking=["none", "wandb"])


def test_one_that_fails_later_is_named_once_and_the_run_goes_on(track, tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise ConnectionError("the server is gone")

    with track("tensorboard") as tracker:
        monkeypatch.setattr(TensorBoardTracker, "log", fail)
        for step in (10, 20):
            tell(tracker, step)
    assert metrics(tmp_path / "tea") == [10, 20]
    said = capsys.readouterr().err
    assert said.count("tensorboard") == 1
    assert "the server is gone" in said


def test_one_that_cannot_be_started_is_refused(track, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def fail(self):
        raise ValueError("the key is of another account")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    with pytest.raises(SettingsError, match="`tracking` = tensorboard .*another account"), track("tensorboard"):
        pass


@pytest.mark.parametrize("text", ["", "a", "``", "```", "x ```` y `"])
def test_code_ends_where_it_should(text):
    first, *middle, last = trackers._as_code(text).split("\n")
    assert first == last
    assert "\n".join(middle) == text
    assert first not in text
