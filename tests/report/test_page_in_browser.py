"""The page as a browser shows it: on a phone and on paper, light and dark, and with nothing but itself."""

import pytest
from browser import TIMEOUT, open_browser
from report.made_up import made_up_report
from report.test_report_page import HOSTILE, with_texts

from gpt2ft.report.page import html

WIDTHS = (360, 800, 1280)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(params=["light", "dark"])
def show(request, browser, tmp_path):
    """show(report, width): a tab with its page, in light or dark, that must ask for nothing and complain of nothing."""
    tabs, said = [], []

    def show(report, width=1280):
        file = tmp_path / "report.html"
        file.write_text(html(report), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=request.param)
        context.set_default_timeout(TIMEOUT)
        tabs.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda asked: None if asked.url == file.as_uri() else said.append(asked.url))
        tab.goto(file.as_uri())
        return tab

    yield show
    for context in tabs:
        context.close()
    assert not said


def background(tab):
    return sum(map(int, tab.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")))


def test_it_fits_every_width_also_with_many_models_and_long_words(show):
    report = made_up_report()
    for number in range(4):
        report["models"].append(report["models"][1] | {"name": f"folder/{number}" * 20})
    for conversation in report["conversations"]:
        for turn in conversation["turns"]:
            turn["replies"] = [{"text": "w" * 500, "stopped": False}] * 7
    for width in WIDTHS:
        tab = show(report, width)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        covered = "[...document.querySelectorAll('.reply, td')].filter((e) => e.scrollWidth > e.clientWidth + 1).length"
        assert tab.evaluate(covered) == 0


def test_light_and_dark_follow_the_system_and_paper_is_white(show):
    tab = show(made_up_report())
    is_dark = tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (background(tab) < 200) == is_dark
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    assert (sum(map(int, tab.evaluate(ink).strip("rgb()").split(","))) > 500) == is_dark
    assert tab.pdf(format="A4").startswith(b"%PDF")
    tab.emulate_media(media="print")
    assert background(tab) == 3 * 255


def test_replies_of_all_models_stand_beside_each_other_and_above_the_tables(show):
    tab = show(made_up_report())
    tops = tab.evaluate("[...document.querySelectorAll('.replies')][0].querySelectorAll('.reply').length")
    assert tops == 3
    place = "(selector) => document.querySelector(selector).getBoundingClientRect().top"
    assert (
        len(
            {
                round(box["y"])
                for box in (r.bounding_box() for r in tab.locator(".replies").first.locator(".reply").all())
            }
        )
        == 1
    )
    assert tab.evaluate(place, ".replies") < 800
    assert tab.evaluate(place, ".replies") < tab.evaluate(place, "table")
    assert tab.locator("svg").count() == 5


def test_whatever_is_said_is_shown_as_it_is(show):
    for text in HOSTILE[:-2]:
        tab = show(with_texts(text))
        assert tab.locator(".reply p").first.inner_text() == text
        assert tab.locator("h1").all_inner_texts() == ["Did it help?"]


def test_it_has_no_barriers(show):
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(show(made_up_report()))
    assert not [violation["id"] for violation in results.response["violations"]]
