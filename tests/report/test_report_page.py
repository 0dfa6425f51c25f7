"""The page and its Markdown: whatever a model says is text, and the same report gives the same bytes."""

import builtins
import copy
import re
from html.parser import HTMLParser

from report.made_up import made_up_report

from gpt2ft.report.page import CURVES_NEED, html, markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "</p></article></main><h1>Gone</h1>",
    "<img src=https://evil.invalid/x onerror=alert(1)>",
    "<style>* { display: none }</style><link rel=stylesheet href=https://evil.invalid/x.css>",
    '"><b onmouseover=alert(1)>quoted</b>',
    "' autofocus onfocus=alert(1) x='",
    "{{ 7 * 191 }} {% raw %} {# gone #}",
    "```\n# Gone\n````\n![](https://evil.invalid/pixel) <b>bold</b>",
    "| a | b |\n|---|---|",
    "[click](javascript:alert(1)) &lt;b&gt; &#60;",
    "\x1b[31mred\x1b[0m \x00 \u202eright to left \ud800 \u2028",
    "$\\alpha$ $",
]


class Elements(HTMLParser):
    """Names and attributes of all elements, and the text of those of a class."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.attributes += [name for name, _ in attributes]


def with_texts(text):
    """A report that holds a text wherever people or models write one."""
    report = copy.deepcopy(made_up_report())
    report["models"][1] |= {"name": text, "model": text}
    report["models"][2]["failed"] = text
    report["warnings"] = report["commands"] = [text]
    report["settings_that_differ"] = {text: [text, None, 1]}
    report["models"][0]["plain_text"] = {text: report["models"][0]["plain_text"]["Gettysburg Address"]}
    for conversation in report["conversations"]:
        for turn in conversation["turns"]:
            turn["user"] = text
            turn["replies"] = [{"text": text, "stopped": True}] * 3
    return report


def test_whatever_is_said_is_text():
    harmless = Elements(html(with_texts("harmless")))
    assert len(harmless.names) > 500
    for text in HOSTILE:
        page = html(with_texts(text))
        found = Elements(page)
        assert found.names == harmless.names, text
        assert set(found.attributes) == set(harmless.attributes)
        assert "1337" not in page  # nor is it a template
        assert not re.search("[\x00\x1b\ud800]", page)
        page.encode("utf-8")


def test_nothing_is_fetched_and_nothing_runs():
    page = html(made_up_report())
    assert "default-src 'none'" in page
    assert not {"script", "link", "img", "iframe", "object"} & set(Elements(page).names)
    assert set(re.findall(r"url\(([^)#]*)", page)) <= {""}
    assert len(page) < 300_000


def test_the_same_report_gives_the_same_bytes():
    first, second = made_up_report(), made_up_report()
    assert html(first) == html(second)
    assert markdown(first) == markdown(second)
    assert " 20" not in re.sub(r"<(svg|dl).*?</\1>", "", html(first), flags=re.DOTALL)[:4000]  # no date


def test_replies_stand_in_fences_that_they_cannot_end():
    for text in HOSTILE:
        lines = markdown(with_texts(text)).splitlines()
        fence = None
        for line in lines:
            if fence is None and (opened := re.fullmatch("(`{3,})text", line)):
                fence = opened[1]
            elif line == fence:
                fence = None
            elif fence is None:
                assert "Gone" not in line or "\\" in line
                assert not re.search(r"(?<!\\)[<\[|]", re.sub(r"^\|.*\|$", "", line)), line
        assert fence is None


def test_a_table_of_markdown_has_as_many_columns_in_every_row():
    for text in ("plain", "a | b |"):
        rows = [line for line in markdown(with_texts(text)).splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5, 6}  # three models, and people


def test_without_matplotlib_the_page_says_what_to_install(monkeypatch):
    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *rest)

    find = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    page = html(made_up_report())
    assert CURVES_NEED.partition(":")[0] in page
    assert "<svg" not in page


def test_an_empty_reply_and_a_cut_one_are_said_to_be():
    report = made_up_report()
    report["conversations"][0]["turns"][0]["replies"][0] = {"text": " \n", "stopped": True}
    for text in (html(report), markdown(report)):
        assert "empty" in text
        assert "cut off" in text
        assert "the model has failed" in text
