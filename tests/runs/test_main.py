"""Every error ends a script with its own exit code and one sentence; a mistake of ours keeps its traceback."""

from pathlib import Path

import pytest
import torch
from processes import run

from gpt2ft import errors
from gpt2ft.__main__ import run_script
from gpt2ft.benchmark.training import Recompiled
from gpt2ft.checkpoint_verification import CheckpointError
from gpt2ft.data.reading import DataError
from gpt2ft.device import DeviceError
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.signals import Preempted
from gpt2ft.model.pretrained import ModelError
from gpt2ft.runs import main
from gpt2ft.runs.verify import NotVerified
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.training.fit import TrainingDiverged
from gpt2ft.training.memory_probe import DoesNotFit
from gpt2ft.training.preflight import PreflightError
from gpt2ft.training.reference_store import ReferenceLogProbError

RESUMES = SFTSettings(data={"train": ["quickstart"]})
ENDS = [  # error, exit code, said by every process, says that the same command goes on
    (errors.SettingsError, 2, False, False),
    (errors.NetworkError, 2, False, False),
    (DataError, 2, False, False),
    (ModelError, 2, False, False),
    (LaunchError, 2, False, False),
    (DeviceError, 2, False, False),
    (CheckpointError, 2, False, False),
    (PreflightError, 2, False, False),
    (ReferenceLogProbError, 2, False, False),
    (Preempted, 75, False, True),
    (TrainingDiverged, 1, False, False),
    (Recompiled, 1, False, False),
    (NotVerified, 1, False, False),
    (DoesNotFit, 1, True, False),
    (OSError, 1, True, True),
    (torch.OutOfMemoryError, 1, True, False),
    (KeyboardInterrupt, 130, False, True),
]


@pytest.fixture
def end(monkeypatch, capsys):
    """end(error, settings, rank): the exit code of a script in which it is raised, and what it says."""

    def end(error, settings, rank="0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)

        def work(_):
            raise error("it is so")

        with pytest.raises(SystemExit) as exit:
            main.run(work, settings)
        return exit.value.code, capsys.readouterr().err

    return end


@pytest.mark.parametrize(("error", "code", "everywhere", "resumes"), ENDS, ids=[end[0].__name__ for end in ENDS])
def test_the_end_of_a_script(end, error, code, everywhere, resumes):
    found, said = end(error, RESUMES)
    assert found == code
    label = "stopped" if error in (Preempted, KeyboardInterrupt) else "error"
    assert said.startswith(f"{label}: ")
    assert ("continues from the newest checkpoint" in said) == resumes
    assert "continues" not in end(error, RESUMES.model_copy(update={"resume": "never"}))[1]
    assert "continues" not in end(error, None)[1]
    found, said = end(error, RESUMES, rank="1")
    assert found == code
    assert said.startswith("error on rank 1: ") if everywhere else said == ""


def test_an_error_of_the_system_names_its_file_once(capsys):
    def work(_):
        Path("/absent/file").read_bytes()

    with pytest.raises(SystemExit, match="1"):
        main.run(work, None)
    assert capsys.readouterr().err == "error: /absent/file: No such file or directory\n"


def test_every_error_that_ends_a_script_is_tested_here():
    assert set(errors.Gpt2ftError.__subclasses__()) == {
        kind for kind, *_ in ENDS if issubclass(kind, errors.Gpt2ftError)
    }


def test_ctrl_c_while_the_libraries_load(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2ft.__main__.importlib.import_module", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_script("chat", ["quickstart"])
    assert capsys.readouterr().err == "stopped: by Ctrl-C\n"


def test_a_mistake_of_ours_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        main.run(lambda settings: 1 // 0, None)


def test_the_errors_of_a_library_are_looked_for_only_where_it_is_loaded():
    program = "import sys; from gpt2ft.runs import main; main.run(lambda _: print('torch' in sys.modules) or 1 // 0, 0)"
    ended = run(["python", "-c", program], code=1)
    assert ended.stdout == "False\n"
    assert ended.stderr.splitlines()[-1].startswith("ZeroDivisionError")
