"""The contents of the page's files; tests/server/page has their behaviour."""

import hashlib
import re
import tomllib
from pathlib import Path, PurePath

import gpt2ft.server

PAGE = Path(gpt2ft.server.__file__).parent / "page"
PROJECT = Path(gpt2ft.server.__file__).parents[2] / "pyproject.toml"


MARKDOWN_IT = "d5432491790141da046b1197353705db03264f40b5727f3b4b591f5aba193e30"  # of what npm has as 15.0.3


def files():
    return [file for file in PAGE.rglob("*") if file.is_file()]


def test_the_library_is_the_one_that_was_published_and_names_its_licences():
    library = (PAGE / "markdown-it" / "markdown-it.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() == MARKDOWN_IT
    assert library.startswith(b"/*! markdown-it 15.0.3 ")
    licences = (PAGE / "markdown-it" / "LICENSE").read_text()
    parts = set(re.findall(rb"//#region node_modules/([^/]+)/", library)) | {b"markdown-it"}
    assert {f"=== {part.decode()} " for part in parts} <= set(re.findall(r"=== \S+ ", licences))
    project = tomllib.loads(PROJECT.read_text())["project"]
    assert "gpt2ft/server/page/markdown-it/LICENSE" in project["license-files"]


def test_there_is_no_way_to_make_markup_of_text():
    sources = {file.name: file.read_text() for file in files() if file.suffix in (".js", ".html")}
    assert len(sources) > 5
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|createContextualFragment"
    code = r"\beval\b|Function\(|setTimeout\([\"'`]"
    for name, source in sources.items():
        assert not re.search(f"{markup}|{code}", source), name
    assert not re.search(r"\s(style|on\w+)=|<script>|<style", sources["index.html"])


def test_no_file_names_another_server():
    for file in PAGE.iterdir():  # of the library all tests in the browser say that it asks nobody
        if file.is_file():
            addresses = set(re.findall(r"https?:[^\s\"]*|[\"'(]//", file.read_text()))
            assert addresses <= {"http://www.w3.org/2000/svg"}, file.name


def test_every_file_is_installed():
    patterns = tomllib.loads(PROJECT.read_text())["tool"]["setuptools"]["package-data"]["gpt2ft"]
    for file in files():
        path = PurePath("server/page") / file.relative_to(PAGE)
        assert any(path.match(pattern) for pattern in patterns), path  # as setuptools: * stays within a folder
