"""The parts of the server, and what each may know."""

import ast
from pathlib import Path

import pytest

import gpt2ft.server

SERVER = Path(gpt2ft.server.__file__).parent


def imported(folder):
    """The modules that the files of a folder import, by file."""
    for file in sorted((SERVER / folder).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            yield from ((file.name, name) for name in names)


@pytest.mark.parametrize(
    ("folder", "unknown"),
    [
        ("http", ("gpt2ft.server.openai", "gpt2ft.server.routes", "fastapi", "pydantic")),
        ("openai", ("gpt2ft.server.http", "gpt2ft.server.routes", "fastapi", "starlette", "uvicorn", "asyncio")),
    ],
)
def test_http_knows_no_shape_of_openai_and_openai_no_http(folder, unknown):
    found = list(imported(folder))
    assert len(found) > 20
    assert not [(file, name) for file, name in found if f"{name}.".startswith(tuple(f"{part}." for part in unknown))]


def test_the_way_of_a_request_leads_through_every_file():
    files = {str(file.relative_to(SERVER)) for file in SERVER.rglob("*.py") if file.name != "__init__.py"}
    beside = {"page_files.py", "openai/strict_json.py"}
    assert len(files - beside) > 10
    assert [file for file in files - beside if file not in gpt2ft.server.__doc__] == []
