"""What `pip install gpt2ft` brings: everything that the scripts need, with no clone beside it."""

import shutil
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, run

import gpt2ft

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed():
    """Setuptools finds packages by itself only where none lies elsewhere, as the recipes do."""
    package = Path(gpt2ft.__file__).parent
    folders = {file.parent.relative_to(package.parent) for file in package.rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == found | {"gpt2ft.recipes"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment with the wheel in it; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a folder of its own where it builds, and reads it the next time
    for name in ("gpt2ft", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], seconds=300)
    [wheel] = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gpt2ft/recipes/quickstart.yaml" in names
    assert {"gpt2ft/server/page/index.html", "gpt2ft/server/page/markdown-it/markdown-it.js"} <= {*names}
    assert any(name.endswith("licenses/gpt2ft/server/page/markdown-it/LICENSE") for name in names)
    report = ("page.html", "prompts.jsonl", "texts/gettysburg.txt")
    assert {f"gpt2ft/report/{name}" for name in report} <= {*names}
    venv.create(folder / "environment", with_pip=True)
    bin = folder / "environment" / "bin"
    run([bin / "pip", "install", "-q", "--no-deps", wheel], PYTHONPATH=None, seconds=300)
    [packages] = (folder / "environment").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return bin


@pytest.mark.long
def test_the_scripts_run_from_a_wheel_outside_the_clone(installed, tmp_path):
    def call(*words, **changes):
        return run([installed / words[0], *words[1:]], cwd=tmp_path, PYTHONPATH=None, **changes)

    where = call("python", "-c", "import gpt2ft; print(gpt2ft.__file__)").stdout
    assert where.startswith(str(installed.parent))
    assert "quickstart" in call("gpt2ft", "sft", "--help").stdout
    done = call("gpt2ft", "sft", "--training.steps", "2", "--training.sample_tokens", "8")
    assert done.stdout.splitlines()[-2] == "next: gpt2ft chat runs/quickstart"
    launcher = [installed / "python", "-m", "accelerate.commands.launch", "-m", "gpt2ft", "sft"]
    again = run([*launcher, "--training.steps", "2", "--output", "by-launcher"], cwd=tmp_path, PYTHONPATH=None)
    assert "finished: by-launcher/model" in again.stdout
    weights = [
        (tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("runs/quickstart", "by-launcher")
    ]
    assert weights[0] == weights[1]
    assert call("gpt2ft", "chat", "runs/quickstart", "--max_new_tokens", "4", typed="Hello\n").stdout
    call("gpt2ft", "export", "runs/quickstart", "--format", "hf", "--output", "exported")
    assert (tmp_path / "exported" / "config.json").is_file()
