"""What lies in an output folder is compared by settings, before data are read, and both ways on are named."""

import re
from types import SimpleNamespace

import pytest

from gpt2ft.checkpoint import TrainState
from gpt2ft.errors import SettingsError
from gpt2ft.runs import resume
from gpt2ft.runs.earlier_run import refuse_other_run
from gpt2ft.runs.output import Output
from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.recipes import to_yaml
from gpt2ft.settings.scripts import DPOSettings, SFTSettings


def parse(*words):
    return parse_recipe(SFTSettings, "quickstart", [str(word) for word in words])


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """refusal(before, now, is_finished): what is said where a run lies in runs/quickstart; nothing where it goes on."""
    monkeypatch.chdir(tmp_path)

    def refusal(before, now, is_finished=True):
        folder = tmp_path / "runs" / "quickstart"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(to_yaml(before), encoding="utf-8")
        try:
            refuse_other_run(folder, now, is_finished)
        except SettingsError as error:
            return str(error)
        return ""

    return refusal


def test_other_data_go_into_another_folder(refusal, tmp_path):
    """The obvious next command after the quickstart."""
    (tmp_path / "mine.json").write_text("[]")
    said = refusal(parse(), parse("--data.train", "mine.json"))
    assert "`data.train` was quickstart quickstart:more and is now mine.json" in said
    assert f"`--output {tmp_path}/runs/mine`" in said
    assert "`--resume never`" in said
    (tmp_path / "runs" / "mine").mkdir()
    assert "runs/mine-2`" in refusal(parse(), parse("--data.train", "mine.json@0.5"))
    assert "runs/quickstart-2`" in refusal(parse(), parse("--data.train", "oasst1"))
    (tmp_path / "my chats.csv").write_text("")
    assert f"`--output '{tmp_path}/runs/my chats'`" in refusal(parse(), parse("--data.train", "my chats.csv"))
    (tmp_path / ".hidden").mkdir()
    assert "runs/quickstart-2`" in refusal(parse(), parse("--data.train", ".hidden"))


@pytest.mark.parametrize(("source", "below"), [(".", "."), ("..", "sub"), ("./", ".")])
def test_a_folder_without_a_name_of_its_own_names_none(source, below, refusal, tmp_path, monkeypatch):
    (tmp_path / below).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / below)
    assert f"/runs/{tmp_path.name}`" in refusal(parse(), parse("--data.train", source))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.epochs", 30], "`training.epochs` was 4 and is now 30"),
        (["--training.steps", 9], "`training.steps` was none and is now 9"),
        (["--optimizer.learning_rate", "2e-3"], "`optimizer.learning_rate` was 0.001 and is now 0.002"),
        (["--lora.rank", 4], "`lora.rank` was 0 and is now 4"),
        (["--model.path", "gpt2"], "`model.path` was quickstart and is now gpt2"),
        (["--data.max_rank", "none"], "`data.max_rank` was 1 and is now none"),
        (["--data.reviewed_only", "false"], "`data.reviewed_only` was true and is now false"),
        (["--data.languages", "en", "de"], "`data.languages` was empty and is now en de"),
    ],
)
def test_a_changed_setting_is_named_as_it_was_set(refusal, words, said, is_finished):
    found = refusal(parse(), parse(*words), is_finished)
    assert said in found
    assert found.count(" was ") == 1 + is_finished
    assert ("finished" in found) == is_finished
    assert "`--output " in found
    assert "`--resume never`" in found


def test_what_may_change_meanwhile_is_no_other_run(refusal):
    now = parse("--training.log_every", 3, "--data.cache", "x", "--output", "y", "--training.keep_checkpoints", 5)
    assert refusal(parse(), now, is_finished=False) == ""
    assert "another" not in refusal(parse(), now)
    steps = parse("--training.steps", 5)
    assert refusal(steps, parse()).count(" was ") == 2  # one of them for the run; nothing is said of passes
    assert refusal(steps, parse("--training.steps", 5, "--training.epochs", 9), is_finished=False) == ""


def test_the_same_command_goes_on_until_it_is_finished(refusal):
    assert refusal(parse(), parse(), is_finished=False) == ""
    said = refusal(parse(), parse())
    assert "is finished: pass `--resume never`" in said


def test_another_kind_of_training_is_another_run(refusal):
    said = refusal(parse(), parse_recipe(DPOSettings, "quickstart-dpo", []))
    assert "it was fine-tuned, and is now to be tuned on preferences" in said
    assert "`model.path`" not in said


def test_what_follows_from_other_data_is_not_named_beside_them(refusal):
    said = refusal(parse(), parse("--data.train", "oasst1", "--lora.rank", 2))
    assert re.findall(r"`([\w.]+)` was", said) == ["data.train", "lora.rank"]


def test_a_recipe_that_cannot_be_read_is_left_to_the_later_comparison(refusal, tmp_path):
    refusal(parse(), parse())
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").write_text("training: {no_longer: 3}\n")
    refuse_other_run(tmp_path / "runs" / "quickstart", parse(), is_finished=False)
    with pytest.raises(SettingsError, match="is finished"):
        refuse_other_run(tmp_path / "runs" / "quickstart", parse(), is_finished=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenised_data": ["b"], "steps": 3}, "the training data have changed;"),
        ({"held_out_data": {"b": 1}}, "the held-out data have changed;"),
        ({"initial_weights": "b"}, "the weights that it started from have changed;"),
        ({"precision": "bf16"}, "`precision` was 'fp32' and is now 'bf16';"),
    ],
)
def test_content_that_has_changed_is_said_in_words(changed, said, monkeypatch, tmp_path):
    saved = {"tokenised_data": ["a"], "held_out_data": {}, "initial_weights": "a", "precision": "fp32", "steps": 2}
    monkeypatch.setattr(resume, "once_a_machine", lambda accelerator, work: work())
    monkeypatch.setattr(resume.checkpoint, "find_newest", lambda root, verbose: tmp_path)
    monkeypatch.setattr(resume.checkpoint, "read_state", lambda folder: (TrainState(), saved))
    monkeypatch.setattr(resume, "identity_of", lambda setup: saved | changed)
    setup = SimpleNamespace(settings=parse(), accelerator=None, is_main=False)
    with pytest.raises(SettingsError, match=r"cannot be continued: (.*)`--resume never`") as error:
        resume.find_resume_point(setup, Output(str(tmp_path)))
    assert said in str(error.value)
