"""The layer table of the design, read from the source: imports point up it, and nothing that is read is executed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpt2ft
from gpt2ft.__main__ import SCRIPTS

PACKAGE = Path(gpt2ft.__file__).parent
LAUNCH = PACKAGE.parent / "launch"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [  # a part imports itself and parts above its own line
    {"errors", "command_line", "wording", "preference_losses", "system"},
    {"settings", "conversation", "files", "hub", "random", "quickstart", "device"},
    {"stream", "checkpoint_verification"},
    {"checkpoint"},
    {"text", "model"},
    {"data", "inference"},
    {"objectives", "distributed"},
    {"training", "chat"},
    {"server", "report", "benchmark"},
    {"runs"},
    {"__main__", "api"},
]
NEVER = {  # although the table would allow it
    "text": {"torch", "accelerate", "datasets"},
    "model": {"conversation", "accelerate", "datasets", "torch.distributed"},
    "data": {"model", "accelerate"},
    "inference": {"accelerate", "datasets"},
    "objectives": {"model", "data", "text", "accelerate"},
    "distributed": {"model", "data", "text", "inference", "objectives", "stream"},
    "chat": {"data", "objectives", "distributed", "training", "accelerate", "datasets"},
    "server": {"data", "objectives", "distributed", "training", "accelerate", "datasets"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "__import__", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
WORDS = {"load_state", "weights_only", "trust_remote_code", "allow_pickle"}  # as attribute, name or keyword


def part_of(file: Path) -> str:
    """The line of the table a file belongs to: `data` for gpt2ft/data/plan.py, `stream` for gpt2ft/stream.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions too; names of a package's own parts are completed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            if node.module in ("gpt2ft", "torch"):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def upward_violations(part: str, source: str) -> list[str]:
    """What a file of `part` imports although the table does not let it."""
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = []
    for line, module in imports(source):
        package, _, rest = module.partition(".")
        target = rest.partition(".")[0] if package == "gpt2ft" else ""
        forbidden = NEVER.get(part, set())
        if target and target != part and level[target] >= level[part]:
            found.append(f"line {line}: {part} imports {module}, which is not above it")
        elif target in forbidden or package in forbidden or any(f"{module}.".startswith(f"{f}.") for f in forbidden):
            found.append(f"line {line}: {part} must know nothing of {module}")
    return found


def executions(source: str) -> list[str]:
    """Whatever would run code that comes with the data."""
    found = [(line, module) for line, module in imports(source) if module.partition(".")[0] in PICKLES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append((node.lineno, ast.unparse(node.func)))
        name = getattr(node, "attr", None) or getattr(node, "arg", None) or getattr(node, "id", None)
        if name in WORDS:
            found.append((node.lineno, name))
    return [f"line {line}: {what}" for line, what in found]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_point_up(file):
    if file != PACKAGE / "__init__.py":
        assert not upward_violations(part_of(file), file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "file", [*FILES, *sorted(LAUNCH.rglob("*.py"))], ids=lambda file: str(file.relative_to(PACKAGE.parent))
)
def test_nothing_that_is_read_is_executed(file):
    assert not executions(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.py")), ids=lambda file: file.name)
def test_scripts_only_name_themselves(file):
    """Whatever they do, `gpt2ft NAME` does too."""
    ours = {module for _, module in imports(file.read_text(encoding="utf-8")) if module.startswith("gpt2ft")}
    assert ours == {"gpt2ft.__main__"}
    assert file.stem in SCRIPTS


def test_the_package_itself_imports_nothing():
    ours = {module for _, module in imports((PACKAGE / "__init__.py").read_text(encoding="utf-8"))}
    assert ours == {"importlib", "typing"}


def test_every_part_has_its_line_in_the_table():
    parts = {part_of(file) for file in FILES} - {"__init__"}
    assert parts <= set().union(*LAYERS)
    assert len(parts) > 8


def test_the_checks_see_what_they_look_for():
    found = sum(len(upward_violations("model", source)) for source in (
        "from gpt2ft import text",
        "from gpt2ft.data.plan import Plan",
        "def f():\n    import gpt2ft.training.fit",
        "from torch import distributed",
        "import torch.distributed as dist",
        "from gpt2ft.conversation import Message",
    ))  # fmt: skip
    assert found == 6
    assert not upward_violations("model", "import torch\nfrom gpt2ft import stream\nfrom gpt2ft.model import gpt2")
    bad = ["import pickle", "torch.load(f)", "accelerator.load_state(f)", "yaml.load(f)", "f(trust_remote_code=True)"]
    bad += ["f(weights_only=False)"]
    bad += ["eval('1')", "exec(code)", "from pickle import loads", "__import__('os')"]
    assert all(executions(source) for source in bad)
    assert not executions("model.eval()\nmodel.load_state_dict(w)\nyaml.safe_load(t)\nsafetensors.torch.load_file(f)")
