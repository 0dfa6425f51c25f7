"""What goes wrong ends in one sentence and a code, and leaves nothing behind that looks finished."""

import errno
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from facts import tells
from processes import run

from gpt2ft import checkpoint, device
from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.recipes import RECIPES, to_yaml
from gpt2ft.settings.scripts import SFTSettings

TREES = (RECIPES.parents[1] / "gpt2ft" / "quickstart" / "trees.jsonl").read_text(encoding="utf-8").splitlines()
STEPS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


def run_through_main(arguments):
    """What launch/sft.py does, in this process: the exit code, 0 where the run ends by itself."""
    from accelerate.state import AcceleratorState, GradientState

    from gpt2ft.runs import main, train_sft

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        main.run(train_sft.run, parse_recipe(SFTSettings, "", arguments))
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def recipe(tiny_model_folder, tmp_path):
    """The recipe of a run of two steps that saves after each."""
    settings = SFTSettings(
        model={"path": str(tiny_model_folder), "random_init": True},
        data={"train": ["quickstart"], "max_rank": 1, "max_length": 256, "cache": str(tmp_path / "cache")},
        training={
            "steps": STEPS,
            "tokens_per_micro_batch": 256,
            "micro_batches_per_step": 1,
            "save_every": 1,
            "log_every": 1,
        },
        output=str(tmp_path / "run"),
    )
    file = tmp_path / "two_steps.yaml"
    file.write_text(to_yaml(settings), encoding="utf-8")
    return file


@pytest.fixture
def failure(recipe, capsys, tmp_path):
    """failure(*arguments, code=2): the one sentence such a run ends with; nothing may look finished after it."""

    def failure(*arguments, code=2):
        assert run_through_main([str(recipe), *arguments]) == code
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1, told
        assert told[0].startswith("error: ")
        nothing_looks_finished(tmp_path / "run")
        return told[0].removeprefix("error: ")

    return failure


def nothing_looks_finished(run):
    assert not (run / "model").exists()
    assert not (run / "best").exists()
    for folder in (run / "checkpoints").glob("*"):
        assert folder.name.startswith("step-")
        checkpoint.verify(folder)


# --- hardware -------------------------------------------------------------------------------------------------------


def test_an_attention_that_cannot_train_here(failure, tmp_path):
    """Told before anything is read."""
    said = failure("--model.attention", "flex", "--data.train", str(tmp_path / "absent.jsonl"))
    assert tells(said, "FlexAttention ... CPU ... `--model.attention segments`")


def test_a_gpu_that_cannot_be_used(failure, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "find_gpu", lambda is_for_cpus: "/dev/nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tells(failure(), "/dev/nvidia0 ... ACCELERATE_USE_CPU=true")


# --- data -----------------------------------------------------------------------------------------------------------


def test_a_data_file_that_is_not_there(failure, tmp_path):
    (tmp_path / "trees.jsonl").write_text("\n".join(TREES))
    said = failure("--data.train", str(tmp_path / "tree.jsonl"))
    assert f"{tmp_path}/tree.jsonl' must be a name or a file, but no such file exists" in said
    assert f"did you mean `{tmp_path}/trees.jsonl`?" in said


@pytest.mark.parametrize("content", ["", "\n\n", "[]\n", '{"message_tree_id": "1"}\n'])
def test_a_data_file_with_nothing_in_it(failure, tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    assert f"{tmp_path}/empty.jsonl" in failure("--data.train", str(tmp_path / "empty.jsonl"))


def test_data_without_a_reply(failure, tmp_path):
    tree = json.loads(TREES[0])
    tree["prompt"]["replies"] = []
    (tmp_path / "questions.jsonl").write_text(json.dumps(tree))
    said = failure("--data.train", str(tmp_path / "questions.jsonl"))
    assert said.startswith(f"{tmp_path}/questions.jsonl ")
    assert "no reply 1" in said


def test_a_line_that_was_cut_short(failure, tmp_path):
    (tmp_path / "cut.jsonl").write_text("\n".join([*TREES[:2], TREES[2][:80]]))
    said = failure("--data.train", str(tmp_path / "cut.jsonl"))
    assert said.startswith(f"{tmp_path}/cut.jsonl:3: must be one JSON object, but does not parse: ")


def test_a_compressed_file_that_was_cut_short(failure, tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(TREES).encode())[:-100])
    assert "cut.jsonl.gz: must be a whole and readable file" in failure("--data.train", str(tmp_path / "cut.jsonl.gz"))


def test_everything_held_out(failure):
    assert "all of them are held out" in failure("--data.eval", "quickstart")


def test_nothing_held_out(failure):
    assert "`data.eval_fraction` = 1e-06 holds no conversation out" in failure("--data.eval_fraction", "0.000001")


def test_a_context_that_nothing_fits(failure):
    assert "nothing fits `data.max_length` = 4 tokens: left out are" in failure("--data.max_length", "4")


def test_a_cache_that_cannot_be_written(failure, tmp_path):
    (tmp_path / "file").touch()
    said = failure("--data.cache", str(tmp_path / "file" / "cache"))
    assert said.startswith(f"the cache folder {tmp_path}/file/cache cannot be written")
    assert said.endswith("set `data.cache` to another")


# --- settings and models --------------------------------------------------------------------------------------------


def test_a_key_that_is_not_a_setting(failure, recipe):
    recipe.write_text(recipe.read_text().replace("\n  steps:", "\n  stesp:"))
    assert failure().endswith("there is no setting `training.stesp` (did you mean `training.steps`?)")


def test_more_context_than_the_model_has(failure):
    said = failure("--data.max_length", "512", "--training.tokens_per_micro_batch", "512")
    assert said.startswith("`data.max_length` ")
    assert "256" in said
    assert "512" in said


@pytest.fixture
def model_folder(tiny_model_folder, tmp_path):
    """A whole model folder of our own making, to be spoilt."""
    from gpt2ft.runs.export import write_folder
    from gpt2ft.runs.loaded_model import load_model
    from gpt2ft.settings.sections import ModelSettings

    policy = load_model(ModelSettings(path=str(tiny_model_folder), random_init=True), seed=0)
    write_folder(tmp_path / "weights", policy.weights(), policy.gpt2.config, policy.tokenizer)
    return tmp_path / "weights"


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


SPOILT = {
    "another width": (lambda f: edit_config(f, n_embd=64), "safetensors: `transformer.h.0.attn.c_attn.bias` must"),
    "more layers": (lambda f: edit_config(f, n_layer=3), "lacks 12 parameters, the first is `h.2."),
    "fewer layers": (lambda f: edit_config(f, n_layer=1), "is not a parameter of this GPT-2"),
    "heads that do not divide": (lambda f: edit_config(f, n_head=3), "config.json: `n_embd` must be"),
    "another model": (lambda f: edit_config(f, model_type="llama"), "`model_type` must be 'gpt2', but is 'llama'"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    "a config cut short": (lambda f: cut_in_half(f / "config.json"), "config.json must be JSON"),
    "weights cut short": (lambda f: cut_in_half(f / "model.safetensors"), "is not a readable safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle and is never"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "a vocabulary cut short": (lambda f: cut_in_half(f / "vocab.json"), "vocab"),
    "no vocabulary": (lambda f: [(f / n).unlink() for n in ("vocab.json", "merges.txt", "tokenizer.json")], "vocab"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_model_folder_that_cannot_be_used(failure, model_folder, how):
    spoil, said = SPOILT[how]
    spoil(model_folder)
    assert said in failure("--model.path", str(model_folder), "--model.random_init", "false")


def test_the_folder_was_usable_before_it_was_spoilt(recipe, model_folder):
    assert run_through_main([str(recipe), "--model.path", str(model_folder), "--model.random_init=false"]) == 0


def test_a_model_that_is_not_there(failure, tmp_path):
    said = failure("--model.path", str(tmp_path / "absent"))
    assert said.startswith("the model must be a folder or one of quickstart, distilgpt2, gpt2, ")
    assert f"but '{tmp_path}/absent' is neither" in said


# --- the folder of the run ------------------------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_output(failure, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for output in ("taken", "taken/run"):
        said = failure("--output", str(tmp_path / output))
        assert said.startswith(f"`output` = {tmp_path / output} cannot be written to: ")
    for output in ("taken", "taken/run"):
        failure("--output", str(tmp_path / output), "--resume", "never")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def disk_full_at(monkeypatch):
    """disk_full_at(3): the third file of tensors does not fit on the disk."""
    import safetensors.torch

    whole = safetensors.torch.save_file
    count = []

    def disk_full_at(number):
        def save_file(tensors, file, metadata=None):
            count.append(file)
            if len(count) == number:
                Path(file).write_bytes(b"half of")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            whole(tensors, file, metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    return disk_full_at


@pytest.mark.parametrize(
    ("number", "saved"), [(1, 0), (3, 0), (4, 1), (6, 1), (7, 2)], ids=["first", "first", "second", "second", "model/"]
)
def test_a_disk_that_fills_up_leaves_what_was_whole_and_the_run_goes_on(
    failure, disk_full_at, monkeypatch, recipe, tmp_path, number, saved
):
    """Three files make a checkpoint, one the model."""
    disk_full_at(number)
    said = failure(code=1)
    assert "No space left on device" in said
    assert "` continues from the newest checkpoint" in said
    assert len(checkpoint.folders(tmp_path / "run" / "checkpoints")) == saved
    monkeypatch.undo()
    assert run_through_main([str(recipe)]) == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_checkpoints_that_are_all_damaged(failure, recipe, tmp_path, capsys):
    assert run_through_main([str(recipe)]) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    for folder in checkpoint.folders(tmp_path / "run" / "checkpoints"):
        cut_in_half(folder / "exp_avg.safetensors")
    capsys.readouterr()
    assert run_through_main([str(recipe)]) == 2
    *warnings, last = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: ") for line in warnings] == [True] * STEPS
    assert last.startswith("error: of 2 checkpoints in ")
    assert not (tmp_path / "run" / "model").exists()


# --- the process ----------------------------------------------------------------------------------------------------

ON_A_SMALL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_disk_that_is_really_full(recipe, tmp_path):
    """No file may grow beyond 100 kB: what is printed and logged fits, a checkpoint does not."""
    done = run(["python", "-c", ON_A_SMALL_DISK, "launch/sft.py", recipe], code=1)
    told = done.stderr.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"error: {tmp_path}/run/checkpoints/")
    assert "model.safetensors could not be written: " in told[0]
    assert "step 1/2" in done.stdout
    nothing_looks_finished(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
