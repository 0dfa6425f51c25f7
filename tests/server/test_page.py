"""The contents of the page's files; tests/server/page has their behaviour."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import gpt2ft.server

PAGE = Path(gpt2ft.server.__file__).parent / "page"
PROJECT = Path(gpt2ft.server.__file__).parents[2] / "pyproject.toml"


def test_there_is_no_way_to_make_markup_of_text():
    sources = {file.name: file.read_text() for file in PAGE.iterdir() if file.suffix in (".js", ".html")}
    assert len(sources) > 5
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|createContextualFragment"
    code = r"\beval\b|Function\(|setTimeout\([\"'`]"
    for name, source in sources.items():
        assert not re.search(f"{markup}|{code}", source), name
    assert not re.search(r"\s(style|on\w+)=|<script>|<style", sources["index.html"])


def test_no_file_names_another_server():
    for file in PAGE.iterdir():
        addresses = set(re.findall(r"https?:[^\s\"]*|[\"'(]//", file.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name


def test_every_file_is_installed():
    patterns = tomllib.loads(PROJECT.read_text())["tool"]["setuptools"]["package-data"]["gpt2ft"]
    for file in PAGE.iterdir():
        assert any(fnmatch(f"server/page/{file.name}", pattern) for pattern in patterns)
