"""How much of the project each script loads: a model is used without what only training needs.

The scripts run to their ends in processes of their own; what they have imported until then counts, wherever it stands.
"""

import signal
from pathlib import Path
from urllib.request import urlopen

import pytest
from processes import run, start

import gpt2ft

PACKAGE = Path(gpt2ft.__file__).parent
TRAINING = (
    *("gpt2ft.data", "gpt2ft.training", "gpt2ft.objectives", "gpt2ft.distributed"),
    *("accelerate", "datasets", "deepspeed", "pyarrow", "transformers", "peft", "tensorboard"),
)
LISTED = """
import atexit, runpy, sys
def write():
    with open(modules, "w") as file:
        print(*sys.modules, sep="\\n", file=file)
modules, *sys.argv = sys.argv[1:]
atexit.register(write)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(name, modules, *arguments):
    """The words that run a script of launch/ and write what it has imported into the file `modules`."""
    return ["python", "-c", LISTED, modules, f"launch/{name}.py", *arguments]


def lines_of(modules):
    """The lines of the project in these modules."""
    files = set()
    for module in modules:
        if module.partition(".")[0] == "gpt2ft":
            path = PACKAGE.parent / module.replace(".", "/")
            files |= {file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()}
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def check(name, file, most):
    """The modules in `file` are none of training, and at most so many lines."""
    modules = file.read_text().split()
    assert "torch" in modules
    found = [module for module in modules if any(f"{module}.".startswith(f"{part}.") for part in TRAINING)]
    assert not found
    lines = lines_of(modules)
    print(f"launch/{name}.py reaches {lines:,} of {lines_of_all():,} lines")
    assert 1000 < lines < most
    return modules


def lines_of_all():
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py"))


def test_serving(tiny_weights_folder, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    file = tmp_path / "modules"
    with start(script("serve", file, tiny_weights_folder, "--port", 0), GPT2FT_API_KEY=None) as server:
        address = server.wait_for(r"is served at (http://\S+:\d+)")[1]
        assert b"ok" in urlopen(f"{address}/health", timeout=60).read()  # it listens, and so minds signals
        server.send_signal(signal.SIGTERM)
        server.finish()
    modules = check("serve", file, most=8000)
    assert "gpt2ft.server.engine" in modules
    assert not [module for module in modules if module.startswith("gpt2ft.server.comparison")]  # of one model
    assert "prompt_toolkit" not in modules


def test_chatting(tiny_weights_folder, tmp_path):
    file = tmp_path / "modules"
    done = run(script("chat", file, tiny_weights_folder, "--max_new_tokens", 5), typed="What is tea?\n")
    assert done.stdout
    modules = check("chat", file, most=7000)
    assert "gpt2ft.chat.session" in modules
    assert "fastapi" not in modules


def test_exporting(tiny_weights_folder, tmp_path):
    file = tmp_path / "modules"
    run(script("export", file, tiny_weights_folder, "--format", "hf", "--output", tmp_path / "hf"))
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    check("export", file, most=7000)


def test_training_on_one_cpu_leaves_deepspeed_alone(tiny_model_folder, tmp_path):
    """A dependency that takes seconds to be imported, and is needed by two strategies alone."""
    file = tmp_path / "modules"
    settings = ["--model.path", tiny_model_folder, "--model.random_init", "--data.max_length", 128]
    settings += ["--training.steps", 1, "--training.tokens_per_micro_batch", 128, "--training.sample_prompts", 0]
    run(script("sft", file, "quickstart", *settings, "--output", tmp_path / "run"))
    modules = file.read_text().split()
    assert "accelerate" in modules
    assert not {"deepspeed", "transformers"} & set(modules)


def test_the_check_sees_what_it_looks_for(tmp_path):
    (tmp_path / "modules").write_text("torch\ngpt2ft.runs.serve\ngpt2ft.data.plan\n")
    with pytest.raises(AssertionError, match="gpt2ft.data.plan"):
        check("serve", tmp_path / "modules", most=10**6)
    assert lines_of(["gpt2ft.errors", "torch"]) == len((PACKAGE / "errors.py").read_text().splitlines())
